"""Conversations as dicts: one or several, parts and calls brought to one form, faults named."""

import pytest

from eaglerun.conversation import checked_tools, conversations
from eaglerun.errors import RequestError

USER = {"role": "user", "content": "hi"}


def test_one_conversation_or_several():
    assert conversations([USER]) == [("messages", [USER])]
    assert conversations([[USER], (USER, USER)]) == [
        ("messages[0]", [USER]),
        ("messages[1]", [USER, USER]),
    ]


def test_parts_and_calls():
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    bare = {"name": "g"}
    [(_, turns)] = conversations(
        [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "tool_calls": [call, bare]},
        ]
    )
    assert turns[0] == {"role": "user", "content": "ab"}
    assert turns[1]["content"] is None
    assert [c["function"] for c in turns[1]["tool_calls"]] == [
        {"name": "f", "arguments": {"x": 1}},
        {"name": "g", "arguments": {}},
    ]
    # The call that was given stays as it was.
    assert call["function"]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages: is empty"),
        ("hi", "messages: 'hi' is no list of messages"),
        (USER, "messages: .* is no list of messages"),
        ([[]], r"messages\[0\]: is empty"),
        (["hi"], r"messages\[0\]: 'hi' is no message"),
        ([[USER], USER], r"messages\[1\]: .* is no message, and no list"),
        ([USER, "hi"], r"messages\[1\]: 'hi' is no message"),
        ([{"content": "hi"}], r"messages\[0\].role: None is no role"),
        ([{"role": "user"}], r"messages\[0\].content: is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: 3 is no text"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\]: a part of type 'image_url'; allowed is text alone",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 3}]}],
            r"content\[0\].text: 3 is no text",
        ),
        ([{"role": "assistant", "tool_calls": "f"}], "tool_calls: 'f' is no list of calls"),
        ([{"role": "assistant", "tool_calls": [3]}], r"tool_calls\[0\]: has no function with"),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}],
            r"tool_calls\[0\].function.arguments: should be a JSON object",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            r"tool_calls\[0\].function.arguments: should be a JSON object",
        ),
    ],
)
def test_faults_are_named(messages, words):
    with pytest.raises(RequestError, match=words):
        conversations(messages)


def test_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    assert checked_tools(None) is None
    assert checked_tools([tool, {"name": "g"}]) == [tool, {"name": "g"}]
    for tools, words in (
        (tool, "tools: .* is no list of tools"),
        ([{"type": "function"}], r"tools\[0\]: has no function with a name"),
        (["f"], r"tools\[0\]: has no function with a name"),
    ):
        with pytest.raises(RequestError, match=words):
            checked_tools(tools)
