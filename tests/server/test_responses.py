"""/v1/responses: items, their events, and conversations that come back."""

from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeEngine, Script, Stage

NS = "]<]minimax[>["
CALL = (
    f'{NS}<tool_call>{NS}<invoke name="get_weather">{NS}<city>Paris{NS}</city>{NS}</invoke>'
    f"{NS}</tool_call>"
)
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}

STAGE = Stage()


def says(answer: str, **script: Any) -> FakeEngine:
    return FakeEngine(Script(lambda request, i: answer, **script))


def ask(engine: FakeEngine, **fields: Any) -> Any:
    reply = STAGE.post(engine, "/v1/responses", {"input": "hi"} | fields)
    assert reply.status == 200, reply.body
    return reply.events() if fields.get("stream") else reply.json()


def prompt_of(engine: FakeEngine) -> str:
    return TOKENIZER.decode(engine.requests[-1].prompt_ids, skip_special_tokens=False)


def without_ids(value: Any) -> Any:
    """Ids and times are new in every answer."""
    if isinstance(value, dict):
        hidden = ("id", "call_id", "item_id", "created_at")
        return {k: without_ids(v) for k, v in value.items() if k not in hidden}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_a_text():
    answer = ask(says("<mm:think>hm</mm:think>Hello"), metadata={"a": "b"}, temperature=0.5)
    assert answer["id"].startswith("resp_") and answer["object"] == "response"
    assert answer["status"] == "completed" and answer["error"] is None
    assert answer["metadata"] == {"a": "b"} and answer["temperature"] == 0.5
    assert answer["store"] is False and answer["tools"] == []
    reasoning, message = answer["output"]
    assert reasoning["type"] == "reasoning" and reasoning["summary"] == []
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (message["type"], message["role"], message["status"]) == (
        "message",
        "assistant",
        "completed",
    )
    assert message["content"] == [
        {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
    ]
    usage = answer["usage"]
    assert usage["output_tokens"] == 10
    assert usage["output_tokens_details"] == {"reasoning_tokens": 4}
    assert usage["total_tokens"] == usage["input_tokens"] + 10


def test_function_calls():
    answer = ask(says("Look." + CALL), tools=[TOOL], tool_choice="auto")
    message, call = answer["output"]
    assert message["content"][0]["text"] == "Look."
    assert call["type"] == "function_call" and call["status"] == "completed"
    assert (call["name"], call["arguments"]) == ("get_weather", '{"city":"Paris"}')
    assert call["id"].startswith("fc_") and call["call_id"].startswith("call_")
    assert answer["tools"] == [TOOL | {"description": None}]


def test_a_forced_function():
    engine = says(f"{NS}<city>Rome{NS}</city>{NS}</invoke>{NS}</tool_call>")
    choice = {"type": "function", "name": "get_weather"}
    answer = ask(engine, tools=[TOOL], tool_choice=choice)
    assert prompt_of(engine).endswith('<invoke name="get_weather">')
    [call] = answer["output"]
    assert call["arguments"] == '{"city":"Rome"}' and answer["tool_choice"] == choice


def test_an_answer_that_is_cut_off():
    answer = ask(says("abcdef"), max_output_tokens=3)
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["output"][0]["status"] == "incomplete"
    events = ask(says("abcdef"), max_output_tokens=3, stream=True)
    assert events[-1]["type"] == "response.incomplete"


@pytest.mark.parametrize("groups", [(1,), (4,), (100,)])
@pytest.mark.parametrize(
    "text", ["plain", "<mm:think>hm</mm:think>Look." + CALL + CALL, "", "<mm:think>on and on"]
)
def test_a_stream_says_what_a_whole_answer_says(text, groups):
    engine = says(text, groups=groups)
    fields = {"tools": [TOOL], "speculation": {"report": True}}
    answer = ask(engine, **fields)
    events = ask(engine, **fields, stream=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert without_ids(events[-1]["response"]) == without_ids(answer)
    assert "metrics" in answer

    # The events alone amount to the same items.
    items: list[dict[str, Any]] = []
    texts: list[str] = []
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        index = event["output_index"]
        if kind == "output_item.added":
            assert index == len(items) and event["item"]["status"] == "in_progress"
            items.append(event["item"])
            texts.append("")
            continue
        if kind == "output_item.done":
            assert event["item"]["id"] == items[index]["id"]
            items[index] = event["item"]
            continue
        assert event["item_id"] == items[index]["id"]
        if kind.endswith(".delta"):
            assert event["delta"]
            texts[index] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == texts[index]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == texts[index]
        else:
            assert kind in ("content_part.added", "content_part.done")
    assert without_ids(items) == without_ids(answer["output"])
    for item, text in zip(items, texts, strict=True):
        whole = item["arguments"] if "arguments" in item else item["content"][0]["text"]
        assert whole == text


def test_a_conversation_comes_back():
    engine = says("ok")
    first = ask(says("<mm:think>hm</mm:think>Look." + CALL), tools=[TOOL])
    call = first["output"][-1]
    ask(
        engine,
        instructions="Be brief.",
        input=[
            {"role": "user", "content": "Weather?"},
            *first["output"],
            {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"},
            {"role": "user", "content": [{"type": "input_text", "text": "And?"}]},
        ],
    )
    prompt = prompt_of(engine)
    assert "]~b]developer\nBe brief.[e~[" in prompt
    turn = "]~b]ai\n<mm:think>hm</mm:think>Look." + CALL + "[e~["
    assert turn in prompt
    assert prompt.endswith("]~b]tool\nsunny[e~[\n]~b]user\nAnd?[e~[\n]~b]ai\n")


def test_a_stream_that_breaks_off():
    engine = says("abcdef", fail=2)
    events = ask(engine, stream=True)
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    assert response["status"] == "failed"
    assert response["error"] == {"code": "server_error", "message": "the engine died"}
