"""/v1/chat/completions: what is answered, and that a stream says the same as a whole answer."""

import json
from typing import Any

import pytest
from fake_engine import MODEL, TOKENIZER, FakeEngine, Script, Stage, make_app, post
from hypothesis import given, settings
from hypothesis import strategies as st

from eaglerun.server.settings import SamplingDefaults

NS = "]<]minimax[>["
USER = {"role": "user", "content": "hi"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
        },
    },
}
CALL = (
    f'{NS}<tool_call>\n{NS}<invoke name="get_weather">{NS}<city>Paris{NS}</city>'
    f"{NS}<days>{NS}<item>1{NS}</item>{NS}</days>{NS}</invoke>\n{NS}</tool_call>"
)

STAGE = Stage()


def says(*answers: str, **script: Any) -> FakeEngine:
    """An engine whose sequence i answers answers[i]."""
    return FakeEngine(Script(lambda request, i: answers[i % len(answers)], **script))


def ask(engine: FakeEngine, **fields: Any) -> dict[str, Any]:
    body = {"messages": [USER], "temperature": 0.0} | fields
    reply = STAGE.post(engine, "/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    return answer


def stream(engine: FakeEngine, **fields: Any) -> list[Any]:
    body = {"messages": [USER], "stream": True} | fields
    reply = STAGE.post(engine, "/v1/chat/completions", body)
    assert reply.status == 200, reply.body
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events()
    assert events.pop() == "[DONE]"
    return events


def joined(events: list[Any]) -> list[dict[str, Any]]:
    """The choices that a stream amounts to, as a whole answer has them (ids of calls left out)."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        assert event["object"] == "chat.completion.chunk"
        for part in event["choices"]:
            index, delta = part["index"], part["delta"]
            if index not in choices:
                assert delta == {"role": "assistant", "content": ""}
                message = {"content": "", "reasoning_content": "", "tool_calls": []}
                choices[index] = {"message": message, "logprobs": [], "tokens": []}
                continue
            choice = choices[index]
            assert "finish_reason" not in choice
            message = choice["message"]
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for name in ("content", "reasoning_content"):
                if name in delta:
                    assert delta[name]
                    message[name] += delta[name]
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"].startswith("call_") and call["type"] == "function"
                    message["tool_calls"].append(dict(call["function"]))
                else:
                    assert set(call) == {"index", "function"}
                    known = message["tool_calls"][call["index"]]
                    known["arguments"] += call["function"]["arguments"]
            if part["logprobs"] is not None:
                choice["logprobs"] += part["logprobs"]["content"]
            choice["tokens"] += part.get("tokens", [])
            if part["finish_reason"] is not None:
                choice["finish_reason"] = part["finish_reason"]
                choice["stop_reason"] = part["stop_reason"]
    return [choices[i] for i in range(len(choices))]


def whole(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The same view of a whole answer."""
    found = []
    for choice in answer["choices"]:
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        found.append(
            {
                "message": {
                    "content": message["content"] or "",
                    "reasoning_content": message["reasoning_content"] or "",
                    "tool_calls": calls,
                },
                "logprobs": (choice["logprobs"] or {"content": []})["content"],
                "tokens": choice.get("tokens", []),
                "finish_reason": choice["finish_reason"],
                "stop_reason": choice["stop_reason"],
            }
        )
    return found


def test_a_plain_answer():
    answer = ask(says("Hello!"), model=MODEL)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice == {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "Hello!",
            "refusal": None,
            "reasoning_content": None,
            "reasoning": None,
        },
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    prompt = answer["usage"]["prompt_tokens"]
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 7,
        "total_tokens": prompt + 7,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_reasoning_is_told_apart_and_counted():
    answer = ask(says("<mm:think>sum</mm:think>4"))
    assert answer["choices"][0]["message"]["reasoning_content"] == "sum"
    assert answer["choices"][0]["message"]["content"] == "4"
    # Both markers and three letters; then "4" and the end.
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}
    assert answer["usage"]["completion_tokens"] == 7
    hidden = ask(says("<mm:think>sum</mm:think>4"), include_reasoning=False)
    assert "reasoning_content" not in hidden["choices"][0]["message"]


@pytest.mark.parametrize("groups", [(1,), (2,), (3,), (5,), (20,), (1, 4, 2)])
def test_reasoning_is_counted_for_any_grouping(groups):
    answer = ask(says("\n</mm:think><mm:think>sum</mm:think>4", groups=groups))
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 5}


@pytest.mark.parametrize(
    ("mode", "end", "said"),
    [
        ("enabled", "<mm:think>", "sum</mm:think>4"),
        ("disabled", "</mm:think>", "4"),
        ("adaptive", "]~b]ai\n", "<mm:think>sum</mm:think>4"),
    ],
)
def test_thinking_modes(mode, end, said):
    engine = says(said)
    answer = ask(engine, chat_template_kwargs={"thinking_mode": mode})
    prompt = TOKENIZER.decode(engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith(end) and f"mode: {mode}." in prompt
    message = answer["choices"][0]["message"]
    assert message["content"] == "4"
    assert message["reasoning_content"] == (None if mode == "disabled" else "sum")


def test_effort_none_disables_thinking():
    engine = says("4")
    ask(engine, reasoning_effort="none")
    prompt = TOKENIZER.decode(engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith("</mm:think>")


def test_tool_calls():
    answer = ask(says("<mm:think>hm</mm:think>Checking.\n" + CALL), tools=[WEATHER])
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Checking.\n"
    [call] = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["function"] == {
        "name": "get_weather",
        "arguments": '{"city":"Paris","days":[1]}',
    }
    only = ask(says(CALL), tools=[WEATHER])
    assert only["choices"][0]["message"]["content"] is None


def test_tools_are_in_the_prompt_and_not_when_none_is_chosen():
    engine = says(CALL)
    answer = ask(engine, tools=[WEATHER], tool_choice="none")
    assert answer["choices"][0]["message"]["content"] == CALL
    ask(engine, tools=[WEATHER])
    without, with_tools = (
        TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False)
        for request in engine.requests
    )
    assert "get_weather" not in without
    assert '<tool>{"name": "get_weather", "description": "Weather of a city"' in with_tools


@pytest.mark.parametrize(
    ("choice", "finish_reason"),
    [
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, "stop"),
    ],
)
@pytest.mark.parametrize("mode", ["enabled", "disabled", "adaptive"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_forced_call_begins_in_the_prompt(choice, finish_reason, mode, streamed):
    engine = says(f"{NS}<city>Rome{NS}</city>{NS}</invoke>{NS}</tool_call>")
    fields = {
        "tools": [WEATHER],
        "tool_choice": choice,
        "chat_template_kwargs": {"thinking_mode": mode},
    }
    if streamed:
        [found] = joined(stream(engine, **fields))
    else:
        [found] = whole(ask(engine, **fields))
    prompt = TOKENIZER.decode(engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert prompt.endswith(f'</mm:think>{NS}<tool_call>\n{NS}<invoke name="get_weather">')
    assert found["message"] == {
        "content": "",
        "reasoning_content": "",
        "tool_calls": [{"name": "get_weather", "arguments": '{"city":"Rome"}'}],
    }
    assert found["finish_reason"] == finish_reason


def test_one_call_where_parallel_ones_are_unwanted():
    answer = ask(says(CALL + CALL), tools=[WEATHER], parallel_tool_calls=False)
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 1
    answer = ask(says(CALL + CALL), tools=[WEATHER])
    assert len(answer["choices"][0]["message"]["tool_calls"]) == 2


def test_history_goes_through_the_template():
    engine = says("ok")
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        {"role": "system", "content": "Be brief.", "type": "text"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    ask(engine, messages=messages)
    prompt = TOKENIZER.decode(engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert "]~b]developer\nBe brief.[e~[" in prompt
    assert "]~b]user\nab[e~[" in prompt
    assert f'<mm:think>hm</mm:think>{NS}<tool_call>{NS}<invoke name="get_weather">' in prompt
    assert f"{NS}<city>Rome{NS}</city>{NS}</invoke>" in prompt
    assert prompt.endswith("]~b]tool\nsunny[e~[\n]~b]ai\n")


def test_sampling_fields_reach_the_engine():
    engine = says("x")
    ask(
        engine,
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=7,
        stop="x",
        stop_token_ids=[1, 2],
        include_stop_str_in_output=True,
        min_tokens=1,
        ignore_eos=True,
        skip_special_tokens=False,
        logit_bias={"5": 1.5},
        max_completion_tokens=9,
        n=2,
        logprobs=True,
        top_logprobs=3,
        priority=-1,
        cache_salt="s",
        speculation={"num_draft_tokens": 2},
    )
    [request] = engine.requests
    assert (request.priority, request.cache_salt) == (-1, "s")
    p = request.sampling
    assert (p.temperature, p.top_p, p.top_k, p.min_p) == (0.5, 0.9, 4, 0.1)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (p.seed, p.stop, p.stop_token_ids) == (7, ("x",), (1, 2))
    assert p.include_stop_str_in_output and p.ignore_eos and not p.skip_special_tokens
    assert (p.min_tokens, p.max_tokens, p.n, p.logprobs) == (1, 9, 2, 3)
    assert (p.logit_bias, p.num_draft_tokens) == ({5: 1.5}, 2)


def test_sampling_defaults_are_the_checkpoints():
    engine = says("x")
    defaults = SamplingDefaults(temperature=0.7, top_p=0.95, top_k=40)
    app = make_app(engine, sampling=defaults)
    post(app, "/v1/chat/completions", {"messages": [USER], "top_k": 5})
    p = engine.requests[0].sampling
    assert (p.temperature, p.top_p, p.top_k, p.max_tokens, p.seed) == (0.7, 0.95, 5, None, None)


def test_several_answers():
    answer = ask(says("one", "two", "three"), n=3)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["one", "two", "three"]
    assert answer["usage"]["completion_tokens"] == 4 + 4 + 6


def test_logprobs():
    [choice] = ask(says("né"), logprobs=True, top_logprobs=2)["choices"]
    tokens = choice["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["n", "\ufffd", "\ufffd"]
    assert tokens[1]["bytes"] == [0xC3] and tokens[2]["bytes"] == [0xA9]
    assert [token["logprob"] for token in tokens] == [-0.5] * 3
    assert [len(token["top_logprobs"]) for token in tokens] == [2] * 3
    assert tokens[0]["top_logprobs"][0] == {"token": "n", "logprob": -0.5, "bytes": [110]}
    [choice] = ask(says("n"), logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []


def test_stop_strings_and_lengths():
    [choice] = ask(says("one STOP two"), stop=["STOP"])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one ", "stop")
    assert choice["stop_reason"] == "STOP"
    [choice] = ask(says("one two"), max_tokens=3)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one", "length")
    [choice] = ask(says(CALL), tools=[WEATHER], max_tokens=30)["choices"]
    assert choice["finish_reason"] == "length"


def test_speculation_report():
    answer = ask(says("one", "two"), n=2, speculation={"report": True})
    report = answer["metrics"]["speculative_decoding"]
    # Each of the two: groups of 1, 3 tokens; the second is one step of 3 drafts, 2 right.
    assert report["num_spec_steps"] == 2 and report["num_spec_tokens"] == 3
    assert report["num_draft_tokens"] == 6 and report["num_accepted_draft_tokens"] == 4
    assert report["mean_acceptance_length"] == 3.0
    assert report["draft_acceptance_rate"] == 0.6667
    assert report["acceptance_histogram"] == [0, 0, 2, 0]
    assert report["num_accepted_tokens_per_pos"] == [2, 2, 0]
    assert report["acceptance_rate_per_pos"] == [1.0, 1.0, 0.0]
    assert [r["num_spec_steps"] for r in report["per_choice"]] == [1, 1]
    off = ask(says("one"), speculation={"report": True, "num_draft_tokens": 0})
    report = off["metrics"]["speculative_decoding"]
    assert (report["num_spec_steps"], report["num_spec_tokens"]) == (0, 0)
    assert report["mean_acceptance_length"] == 1.0 and "per_choice" not in report
    assert "metrics" not in ask(says("one"))


def test_accepted_drafts_are_marked():
    fields = {"speculation": {"tokens": True}}
    engine = says("abcd", groups=(1, 3, 2))
    [choice] = ask(engine, **fields)["choices"]
    assert choice["tokens"] == [
        {"text": "a", "drafted": False},
        {"text": "b", "drafted": True},
        {"text": "c", "drafted": True},
        {"text": "d", "drafted": False},
        {"text": "[e~[", "drafted": False},
    ]
    assert joined(stream(engine, **fields))[0]["tokens"] == choice["tokens"]


def test_the_end_of_a_stream():
    events = stream(says("ab"), stream_options={"include_usage": True}, n=2)
    assert all(event["usage"] is None for event in events[:-1])
    last = events[-1]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    assert "metrics" not in last
    events = stream(says("ab"), speculation={"report": True})
    assert events[-1]["choices"] == [] and "usage" not in events[-1]
    assert events[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 1
    events = stream(says("ab"))
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_what_is_ready_leaves_in_one_write():
    engine = says("abcdef", groups=(1,), burst=True)
    reply = STAGE.post(engine, "/v1/chat/completions", {"messages": [USER], "stream": True})
    assert len(reply.chunks) == 1
    assert reply.body.count(b"data: ") == 1 + 6 + 1 + 1


def test_arguments_are_streamed_as_they_come():
    events = stream(says(CALL, groups=(1,)), tools=[WEATHER])
    deltas = [
        call["function"]["arguments"]
        for event in events
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert deltas == ["", '{"city":"', "P", "a", "r", "i", "s", '","days":[', "1", "]}"]


FRAGMENTS = ("<mm:think>", "</mm:think>", NS, CALL, "text ", "é", "\n", "<city>", '"', "😀", "]<]")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.sampled_from([{}, {"tools": [WEATHER]}]),
    st.sampled_from([{}, {"logprobs": True, "top_logprobs": 1}]),
    st.sampled_from([{}, {"stop": ["te", "d"]}, {"max_tokens": 5}, {"max_tokens": 60}]),
)
def test_a_stream_says_what_a_whole_answer_says(text, groups, burst, tools, logprobs, end):
    engine = says(text, "x" + text, groups=groups, burst=burst)
    fields = {"n": 2, "speculation": {"tokens": True}} | tools | logprobs | end
    answer = ask(engine, **fields)
    events = stream(engine, **fields, stream_options={"include_usage": True})
    assert joined(events) == whole(answer)
    assert events[-1]["usage"] == answer["usage"]
    for choice in whole(answer):
        for call in choice["message"]["tool_calls"]:
            # Only a call that the limit cut off is not whole.
            if choice["finish_reason"] != "length":
                assert isinstance(json.loads(call["arguments"]), dict)
