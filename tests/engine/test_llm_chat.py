"""LLM.chat renders and answers, LLM.stream tells as it goes, and both are seen in the bar."""

import dataclasses
from pathlib import Path

import pytest
from fake_engine import TEMPLATE, TOKENIZER
from pairs import tiny_pair
from served import write_checkpoint

from eaglerun.config import resolve
from eaglerun.errors import RequestError
from eaglerun.llm import LLM
from eaglerun.messages import Finished, SamplingParams, Tokens
from eaglerun.start import start_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
USER = {"role": "user", "content": "hi"}
HEAD = "]~!b[]~b]system\nI am a test. Current thinking mode: adaptive.[e~[\n]~b]developer"


@pytest.fixture(scope="module")
def models():
    return tiny_pair(vocab_size=TOKENIZER.get_vocab_size(), noise=0.3)


def make(models, path: Path | None, **settings: object) -> LLM:
    config = {"draft": "tiny", "max_model_len": 256, "num_kv_blocks": 200, "log_stats_every": 0}
    models = dataclasses.replace(models, tokenizer=TOKENIZER, path=path)
    return LLM.from_engine(start_engine(resolve(config | settings, environ={}), models))


@pytest.fixture(scope="module")
def llm(models, tmp_path_factory):
    return make(models, write_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def prompt_of(output) -> str:
    return TOKENIZER.decode(list(output.prompt_ids), skip_special_tokens=False)


def test_a_conversation_is_rendered_and_answered(llm: LLM):
    [out] = llm.chat([USER], GREEDY)
    assert prompt_of(out) == HEAD + "[e~[\n]~b]user\nhi[e~[\n]~b]ai\n"
    [same] = llm.generate([prompt_of(out)], GREEDY)
    assert (out.text, out.token_ids) == (same.text, same.token_ids) and len(out.token_ids) == 12


def test_several_conversations_each_with_its_params(llm: LLM):
    params = [GREEDY, dataclasses.replace(GREEDY, max_tokens=3)]
    outs = llm.chat([[USER], [{"role": "user", "content": "ho"}]], params)
    assert [len(out.token_ids) for out in outs] == [12, 3]
    assert outs[0].token_ids == llm.chat([USER], GREEDY)[0].token_ids
    assert "]~b]user\nho[e~[" in prompt_of(outs[1])


def test_tools_and_template_values(llm: LLM):
    tool = {"type": "function", "function": {"name": "look"}}
    [out] = llm.chat(
        [USER], GREEDY, tools=[tool], chat_template_kwargs={"thinking_mode": "enabled"}
    )
    assert '<tool>{"name": "look"}</tool>' in prompt_of(out)
    assert prompt_of(out).endswith("]~b]ai\n<mm:think>")


def test_the_last_message_is_continued(llm: LLM):
    answer = {"role": "assistant", "content": "Once upon"}
    prompts = llm.chat_prompts(
        [USER, answer], add_generation_prompt=False, continue_final_message=True
    )
    text = TOKENIZER.decode(list(prompts[0]), skip_special_tokens=False)
    assert text.endswith("]~b]ai\n</mm:think>Once upon")


def test_another_template(llm: LLM, models, tmp_path: Path):
    source = "{{ eos_token }}{{ messages[0].content }}"
    assert prompt_of(llm.chat([USER], GREEDY, chat_template=source)[0]) == "[e~[hi"
    file = tmp_path / "other.jinja"
    file.write_text("other {{ messages[0].content }}")
    other = make(models, write_checkpoint(tmp_path), chat_template=str(file))
    assert prompt_of(other.chat([USER], GREEDY)[0]) == "other hi"


@pytest.mark.parametrize(
    ("messages", "more", "words"),
    [
        ([], {}, "messages: is empty"),
        ([[USER], [{"role": "root", "content": "x"}]], {}, r"messages\[1\]: .* no root here"),
        ([USER], {"tools": [{}]}, r"tools\[0\]: has no function"),
        (
            [USER],
            {"chat_template_kwargs": {"thinking_mod": "x"}},
            "chat_template_kwargs.thinking_mod: .* did you mean 'thinking_mode'.; it reads think",
        ),
        ([USER], {"continue_final_message": True}, "needs add_generation_prompt to be false"),
        ([{"role": "user", "content": "x" * 300}], {}, "prompt: 3.. tokens leave no room"),
        (
            [[USER], [{"role": "user", "content": "x" * 300}]],
            {},
            r"prompts\[1\]: 3.. tokens leave no room",
        ),
        ([{"role": "user", "content": "\ud800"}], {}, "messages: is no Unicode text"),
    ],
)
def test_what_is_refused(llm: LLM, messages, more, words):
    with pytest.raises(RequestError, match=words):
        llm.chat(messages, GREEDY, **more)


def test_a_model_without_a_template(models, tmp_path: Path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    for path in (None, tmp_path / "nowhere"):
        llm = make(models, path)
        assert llm.chat_template is None
        with pytest.raises(RequestError, match="messages: the model tiny has no chat template"):
            llm.chat([USER], GREEDY)


def test_a_stream_tells_the_same_and_can_be_left(llm: LLM):
    prompt = llm.chat_prompts([USER])[0]
    events = list(llm.stream(prompt, GREEDY))
    assert isinstance(events[-1], Finished) and all(isinstance(e, Tokens) for e in events[:-1])
    ids = [id_ for event in events[:-1] for id_ in event.token_ids]
    expected = llm.generate([prompt], GREEDY)[0]
    assert tuple(ids) == expected.token_ids and events[-1].speculation == expected.speculation
    left = llm.stream(prompt, GREEDY)
    next(left)
    left.close()
    assert not llm.engine.has_work
    assert llm.generate([prompt], GREEDY)[0].token_ids == expected.token_ids


def test_the_bar_counts_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]):
    stats = llm.engine.stats.acceptance
    stop = llm.chat([USER], GREEDY)[0].token_ids[-1]
    steps, accepted = stats.steps, stats.accepted
    # The second ends early, far from all that it might have been.
    ending = dataclasses.replace(GREEDY, max_tokens=None, stop_token_ids=(stop,))
    outs = llm.chat([[USER], [USER]], [GREEDY, ending], progress=True)
    drawn = capsys.readouterr().err.split("\r")[-1]
    count = sum(len(out.token_ids) for out in outs)
    length = 1 + (stats.accepted - accepted) / (stats.steps - steps)
    assert "answered 2/2: 100%" in drawn and f"| {count} of at most {count} tokens [" in drawn
    assert " tokens/s" in drawn and f"acceptance length {length:.2f}" in drawn
    # Nothing is drawn without a terminal unless it is asked for.
    llm.chat([USER], GREEDY)
    llm.chat([USER], GREEDY, progress=False)
    assert capsys.readouterr().err == ""
