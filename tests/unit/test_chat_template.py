"""The chat template: what it refuses and reads, where it is found, and a message continued."""

import json
from pathlib import Path

import pytest

from eaglerun.chat_template import ChatTemplate, load_chat_template
from eaglerun.errors import CheckpointError, RequestError

USER = [{"role": "user", "content": "hi"}]


def test_a_refusal_names_the_messages():
    """The sandbox itself is tested with the routes that everybody can reach."""
    for source, words in (
        ("{{ raise_exception('no') }}", "messages: the prompt is refused by the chat template: no"),
        ("{{ 1 / 0 }}", "messages: the chat template cannot render these messages"),
        ("{{ 'x' * 999999999 }}", "messages: the prompt is too long"),
    ):
        with pytest.raises(RequestError, match=f"^{words}$"):
            ChatTemplate(source, {}).render(USER, None, 999, add_generation_prompt=True)


def test_names_that_a_template_reads():
    source = "{% set own = mode %}{{ own }}{{ bos_token }}{{ tools }}{{ namespace }}{{ x.y }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.variables == {"mode", "x"}


def test_a_list_of_templates_has_one_for_tools(tmp_path: Path):
    listed = [
        {"name": "default", "template": "plain {% generation %}{{ a }}{% endgeneration %}"},
        {"name": "tool_use", "template": "tools {{ b }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    template = load_chat_template(tmp_path)
    assert template is not None and template.variables == {"a", "b"}
    texts = [
        template.render(USER, tools, 99, add_generation_prompt=True, a=1, b=2)
        for tools in (None, [], [{"name": "f"}])
    ]
    assert texts == ["plain 1", "plain 1", "tools 2"]


def continued(source: str, *messages: dict[str, object]) -> str:
    return ChatTemplate(source, {}).render(
        messages, None, 999, add_generation_prompt=False, continue_final_message=True
    )


def test_the_final_message_is_continued():
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}."
    answer = {"role": "assistant", "content": "Once upon "}
    assert continued(source, *USER, answer) == "<user>hi</><assistant>Once upon "
    # The message itself stays as it was.
    assert answer["content"] == "Once upon "


def test_what_cannot_be_continued():
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RequestError, match="the final message has no text to continue"):
        continued(shown, {"role": "assistant", "content": None})
    with pytest.raises(RequestError, match="does not show the final message"):
        continued("nothing", *USER)
    with pytest.raises(RequestError, match="needs add_generation_prompt to be false"):
        ChatTemplate(shown, {}).render(
            USER, None, 999, add_generation_prompt=True, continue_final_message=True
        )


def test_where_a_template_is_found(tmp_path: Path):
    def rendered(file: Path | None = None) -> str:
        template = load_chat_template(tmp_path, file)
        assert template is not None
        return template.render(USER, None, 999, add_generation_prompt=True)

    assert load_chat_template(tmp_path) is None
    config = {"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert rendered() == "<s>old"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}new")
    assert rendered() == "<s>new"
    other = tmp_path / "other.jinja"
    with pytest.raises(CheckpointError, match="other.jinja does not exist"):
        rendered(other)
    other.write_bytes(b"caf\xe9")
    with pytest.raises(CheckpointError, match="other.jinja is not UTF-8"):
        rendered(other)
    other.write_text("other")
    assert rendered(other) == "other"
