"""The chat template's sandbox, the tokenizer's pieces, and what a checkpoint's files say."""

import asyncio
import json

import pytest
from fake_engine import EOS, TEMPLATE, TOKENIZER
from tokenizers import Tokenizer, models

from eaglerun.errors import CheckpointError
from eaglerun.server.chat import load_chat, load_sampling
from eaglerun.server.failures import ApiError
from eaglerun.server.protocol import UserMessage
from eaglerun.server.settings import Limits, SamplingDefaults
from eaglerun.server.template import ChatTemplate
from eaglerun.server.vocabulary import Vocabulary

USER = [{"role": "user", "content": "hi"}]


def render(source: str, max_chars: int = 10_000, seconds: float = 5.0, **values: object) -> str:
    template = ChatTemplate(source, {"bos_token": "<s>"}, seconds)
    messages = values.pop("messages", USER)
    return template.render(messages, None, max_chars, add_generation_prompt=True, **values)


def test_the_dialect():
    assert render("{{ bos_token }}{{ messages[0].content }}") == "<s>hi"
    assert render("{{ {'a': 'é<'} | tojson }}") == '{"a": "é<"}'
    assert (
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert render("{% if true %}\n  a\n{% endif %}\n") == "  a\n"
    counts = "{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}"
    assert render(counts + "{% endfor %}{{ ns.n }}") == "3"
    assert render("{{ x }}{{ undefined_name }}", x="y") == "y"
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == 10
    assert render("{{ '-' * 3 }}{{ 7 % 4 }}") == "---3"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the chat template: roles"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", "is too long"),
        ("{{ 'x' * 999999999 }}", "is too long"),
        ("{{ 9 ** 9 }}", "operator that is not allowed"),
        ("{{ '%999999999d' % 1 }}", "operator that is not allowed"),
        ("{{ messages[0].nothing.at.all }}", "cannot render"),
        ("{{ messages + 1 }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ 'a'.ljust(999999999) }}", "cannot render"),
        ("{{ '{:999999999}'.format(1) }}", "cannot render"),
        ("{% for i in range(999999) %}{% endfor %}", "cannot render"),
    ],
)
def test_what_a_template_may_not(source, words):
    with pytest.raises(ApiError) as caught:
        render(source)
    assert caught.value.status_code == 400 and caught.value.param == "messages"
    assert words in caught.value.detail
    assert "dict" not in caught.value.detail


def test_a_template_ends_in_time():
    loops = "{% for a in range(9999) %}{% for b in range(9999) %}"
    nested = loops + "{% set c = m.x %}{% endfor %}{% endfor %}"
    with pytest.raises(ApiError) as caught:
        render(nested, seconds=0.05, m={"x": 1})
    assert caught.value.detail == "messages: the prompt takes too long to render"


def test_marks_of_training_change_nothing():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}!"
    )
    assert render(source) == "hi!"
    with pytest.raises(CheckpointError, match="the chat template is broken in line 1"):
        ChatTemplate("{% generation %}a", {}, 1.0)


def test_a_broken_template_is_found_at_start():
    with pytest.raises(CheckpointError, match="the chat template is broken in line 2: "):
        ChatTemplate("\n{% if %}", {}, 1.0)


def test_pieces():
    vocabulary = Vocabulary(TOKENIZER)
    ids = vocabulary.encode("né \n[e~[<mm:think>", add_special_tokens=False)
    pieces = [vocabulary.piece(id_) for id_ in ids]
    assert pieces == [b"n", b"\xc3", b"\xa9", b" ", b"\n", b"[e~[", b"<mm:think>"]
    assert vocabulary.piece_text(ids[1]) == "\ufffd"
    assert vocabulary.piece(99_999) == b""
    assert vocabulary.decode(ids, skip_special_tokens=True) == "né \n<mm:think>"
    assert vocabulary.id_of("[e~[") == EOS and vocabulary.id_of("x y") is None


def test_pieces_of_a_tokenizer_of_words():
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert Vocabulary(tokenizer).piece(0) == b"hello"


def test_templates_in_a_list(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))

    def prompts(listed: object) -> list[str]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
        chat = load_chat(tmp_path, Limits())
        messages = [UserMessage(role="user", content="hi")]

        async def ask() -> list[str]:
            found = [await chat.prompt(messages, t, template_kwargs={}) for t in ([], [{"a": 1}])]
            return [TOKENIZER.decode(prompt.token_ids) for prompt in found]

        texts = asyncio.run(ask())
        chat.close()
        return texts

    plain, tools = ({"name": n, "template": f"{n}!"} for n in ("default", "tool_use"))
    assert prompts([tools, plain]) == ["default!", "tool_use!"]
    assert prompts([plain]) == ["default!", "default!"]
    for wrong in ([tools], [], {"a": 1}, 5, ["default"]):
        with pytest.raises(CheckpointError, match="one that is named default"):
            prompts(wrong)


def test_files_of_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer.json is missing"):
        load_chat(tmp_path, Limits())
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "]~!b["}, "eos_token": "[e~[", "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def rendered(**options) -> str:
        chat = load_chat(tmp_path, Limits(), **options)
        chat.close()
        assert chat._template is not None
        return chat._template.render(USER, None, 9999, add_generation_prompt=True)

    assert rendered() == "old"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert rendered().startswith("]~!b[]~b]system\n")
    other = tmp_path / "other.jinja"
    other.write_text("{{ bos_token }}other{{ eos_token }}")
    assert rendered(template_file=other) == "]~!b[other[e~["
    with pytest.raises(CheckpointError, match=r"nowhere.jinja does not exist"):
        load_chat(tmp_path, Limits(), tmp_path / "nowhere.jinja")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not JSON"):
        load_chat(tmp_path, Limits())


def test_sampling_of_a_checkpoint(tmp_path):
    assert load_sampling(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "top_k": 40, "x": 1}')
    assert load_sampling(tmp_path) == SamplingDefaults(0.6, 0.95, 40)
    file.write_text('{"do_sample": false, "temperature": 0.6}')
    assert load_sampling(tmp_path).temperature == 0.0
    file.write_text('{"top_p": 7}')
    with pytest.raises(CheckpointError, match="generation_config.json: top_p: 7 is not in"):
        load_sampling(tmp_path)
