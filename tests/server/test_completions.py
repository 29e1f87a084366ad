"""/v1/completions, /tokenize and /detokenize."""

from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeEngine, Script, Stage, make_app, post

STAGE = Stage()


def says(*answers: str, **script: Any) -> FakeEngine:
    return FakeEngine(Script(lambda request, i: answers[i % len(answers)], **script))


def ask(engine: FakeEngine, **fields: Any) -> Any:
    reply = STAGE.post(engine, "/v1/completions", {"prompt": "ab"} | fields)
    assert reply.status == 200, reply.body
    return reply.events() if fields.get("stream") else reply.json()


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices that a stream amounts to."""
    assert events[-1] == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        assert event["object"] == "text_completion"
        for part in event["choices"]:
            empty = {"text": "", "logprobs": None, "index": part["index"]}
            choice = choices.setdefault(part["index"], empty)
            assert "finish_reason" not in choice
            choice["text"] += part["text"]
            if part["logprobs"] is not None:
                known = choice["logprobs"] or dict.fromkeys(part["logprobs"], [])
                choice["logprobs"] = {k: known[k] + part["logprobs"][k] for k in known}
            if part["finish_reason"] is not None:
                for name in ("finish_reason", "stop_reason"):
                    choice[name] = part[name]
            if "tokens" in part:
                choice["tokens"] = choice.get("tokens", []) + part["tokens"]
    return [choices[i] for i in range(len(choices))]


def test_a_plain_completion():
    engine = says("<mm:think>cd")
    answer = ask(engine, max_tokens=20)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    [choice] = answer["choices"]
    # No parser: the markers are text here.
    assert choice == {
        "index": 0,
        "text": "<mm:think>cd",
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 4
    assert engine.requests[0].prompt_ids == tuple(TOKENIZER.encode("ab").ids)


def test_the_length_is_16_unless_said():
    assert ask(says("x" * 50))["choices"][0]["text"] == "x" * 16
    assert ask(says("x" * 50), max_tokens=None)["choices"][0]["text"] == "x" * 50


def test_several_prompts_and_answers():
    def script(request, i):
        return TOKENIZER.decode(request.prompt_ids) + str(i)

    engine = FakeEngine(Script(script))
    body = {"prompt": ["a", "bc"], "n": 2, "max_tokens": 9, "speculation": {"report": True}}
    answer = ask(engine, **body)
    assert [c["text"] for c in answer["choices"]] == ["a0", "a1", "bc0", "bc1"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    assert len(answer["metrics"]["speculative_decoding"]["per_choice"]) == 4
    texts = [c["text"] for c in joined(ask(engine, **body, stream=True))]
    assert texts == ["a0", "a1", "bc0", "bc1"]
    ids = [request.request_id for request in engine.requests]
    assert len(set(ids)) == 4


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]]])
def test_prompts_as_token_ids(prompt):
    engine = says("x")
    ids = [TOKENIZER.encode(chr(i)).ids[0] for i in (97, 98)]
    prompt = [ids] if isinstance(prompt[0], list) else ids
    answer = ask(engine, prompt=prompt, echo=True)
    assert answer["choices"][0]["text"] == "abx"
    assert engine.requests[0].prompt_ids == tuple(ids)


def test_echo_and_logprobs():
    [choice] = ask(says("cd"), echo=True, logprobs=2)["choices"]
    assert choice["text"] == "abcd"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "d", "[e~["]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"b": -0.5, "c": -1.5}
    [choice] = ask(says("cd"), logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"][0] == {"c": -0.5}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"echo": True},
        {"logprobs": 1},
        {"stop": ["cd"]},
        {"max_tokens": 2},
        {"speculation": {"tokens": True}},
    ],
)
def test_a_stream_says_what_a_whole_answer_says(fields):
    engine = says("abécde", "x", groups=(1, 2, 4))
    answer = ask(engine, **fields)
    events = ask(engine, stream=True, stream_options={"include_usage": True}, **fields)
    assert joined(events) == answer["choices"]
    assert events[-2]["usage"] == answer["usage"] and events[-2]["choices"] == []


def test_one_prompt_that_fails_ends_the_answer():
    engine = says("abcdef", fail=2)
    reply = STAGE.post(engine, "/v1/completions", {"prompt": ["a", "b"]})
    assert reply.status == 503 and reply.error["message"] == "the engine died"
    [*_, last] = ask(engine, prompt=["a", "b"], stream=True)
    assert last["error"]["message"] == "the engine died"


def test_tokens_and_back():
    app = make_app()
    reply = post(app, "/tokenize", {"prompt": "né[e~[", "return_token_strs": True})
    answer = reply.json()
    assert answer["count"] == 4 and answer["max_model_len"] == 4096
    assert answer["token_strs"] == ["n", "\ufffd", "\ufffd", "[e~["]
    body = {"tokens": answer["tokens"]}
    assert post(app, "/detokenize", body).json() == {"prompt": "né[e~["}
    body["skip_special_tokens"] = True
    assert post(app, "/detokenize", body).json() == {"prompt": "né"}
    reply = post(app, "/detokenize", {"tokens": [262]})
    assert reply.status == 400 and reply.error["param"] == "tokens"


def test_a_conversation_as_tokens():
    app = make_app()
    engine = says("x")
    messages = [{"role": "user", "content": "hi"}]
    kwargs = {"thinking_mode": "disabled"}
    body = {"messages": messages, "chat_template_kwargs": kwargs}
    tokens = post(app, "/tokenize", body).json()["tokens"]
    STAGE.post(engine, "/v1/chat/completions", body)
    assert tuple(tokens) == engine.requests[0].prompt_ids
    shorter = post(app, "/tokenize", body | {"add_generation_prompt": False}).json()["tokens"]
    assert tokens[: len(shorter)] == shorter
    for body in ({}, {"prompt": "x", "messages": messages}):
        assert post(app, "/tokenize", body).error["param"] == "prompt"
