"""Conversations given as plain dicts: checked, and brought to the form that templates expect."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from eaglerun.errors import RequestError

Message = Mapping[str, Any]
Conversation = Sequence[Message]
# How a prompt may ask MiniMax-M3 to think.
THINKING_MODES = ("enabled", "disabled", "adaptive")
# How OpenAI's APIs name a part that is text.
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


def conversations(
    messages: Conversation | Sequence[Conversation],
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each conversation with its name for error messages; ``messages`` is one, or a list of them.

    Raises RequestError, which names the message and the field that is wrong.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError("messages", f"{messages!r} is no list of messages")
    if not messages:
        raise RequestError("messages", "is empty")
    if isinstance(messages[0], Mapping):
        return [("messages", _turns(messages, "messages"))]
    named = [(f"messages[{i}]", turns) for i, turns in enumerate(messages)]
    return [(name, _turns(turns, name)) for name, turns in named]


def checked_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Tools in OpenAI's form, ``{"type": "function", "function": {...}}`` or the function alone."""
    if tools is None:
        return None
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError("tools", f"{tools!r} is no list of tools")
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise RequestError(f"tools[{i}]", "has no function with a name")
    return [dict(tool) for tool in tools]


def _turns(messages: object, name: str) -> list[dict[str, Any]]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(name, f"{messages!r} is no message, and no list of messages")
    if not messages:
        raise RequestError(name, "is empty")
    return [_turn(message, f"{name}[{i}]") for i, message in enumerate(messages)]


def _turn(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(name, f"{message!r} is no message: a dict with a role and a content")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{name}.role", f"{role!r} is no role; usual are system, user, assistant"
        )
    calls = _calls(message.get("tool_calls"), f"{name}.tool_calls")
    content = _content(message.get("content"), f"{name}.content")
    if content is None and not calls and not message.get("reasoning_content"):
        raise RequestError(f"{name}.content", "is missing")
    turn = {key: value for key, value in message.items() if value is not None}
    turn.pop("tool_calls", None)
    return turn | {"content": content} | ({"tool_calls": calls} if calls else {})


def _content(content: object, name: str) -> str | None:
    """Text, or a list of parts of text, as one text."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(name, f"{content!r} is no text and no list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS:
            raise RequestError(f"{name}[{i}]", f"a part of type {kind!r}; allowed is text alone")
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{name}[{i}].text", f"{part.get('text')!r} is no text")
        texts.append(part["text"])
    return "".join(texts)


def _calls(calls: object, name: str) -> list[dict[str, Any]]:
    """Earlier tool calls, their arguments as objects; OpenAI's API writes them as JSON text."""
    if calls is None:
        return []
    if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
        raise RequestError(name, f"{calls!r} is no list of calls")
    found = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{name}[{i}]", "has no function with a name")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(arguments, Mapping):
            raise RequestError(f"{name}[{i}].function.arguments", "should be a JSON object")
        made = {"name": function["name"], "arguments": dict(arguments)}
        found.append({"id": call.get("id"), "type": "function", "function": made})
    return found
