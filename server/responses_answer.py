"""The answer of /v1/responses: a list of output items, whole or as typed events."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from eaglerun.messages import Finished, FinishReason, Tokens
from eaglerun.server.chat_answer import ChatOptions, Choice, tail_of
from eaglerun.server.failures import new_id
from eaglerun.server.parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Part,
    Reasoning,
)

Event = dict[str, Any]


@dataclass(slots=True)
class _Open:
    """The item that is being written. ``text``: its text, or a call's arguments."""

    index: int
    item: dict[str, Any]
    text: list[str] = field(default_factory=list)


class OutputItems:
    """Output items made of parsed parts; a part of another kind ends the open item.

    Each method returns the events that a stream tells of it.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: _Open | None = None

    def add(self, part: Part) -> list[Event]:
        match part:
            case Reasoning(text):
                return self._add_text("reasoning", text)
            case Content(text):
                return self._add_text("message", text)
            case CallStart(name=name):
                return [*self.end(), *self._start_call(name)]
            case CallArguments(json=text):
                assert self._open is not None
                self._open.text.append(text)
                return [self._event("function_call_arguments.delta", delta=text)]
            case CallEnd():
                return self.end()

    def end(self, complete: bool = True) -> list[Event]:
        """Close the open item; ``complete`` false: the answer was cut off in it."""
        if self._open is None:
            return []
        item, text = self._open.item, "".join(self._open.text)
        item["status"] = "completed" if complete else "incomplete"
        if item["type"] == "function_call":
            item["arguments"] = text
            name = item["name"]
            events = [self._event("function_call_arguments.done", arguments=text, name=name)]
        else:
            reasoning = item["type"] == "reasoning"
            part = _text_part(reasoning, text)
            item["content"] = [part]
            more: dict[str, Any] = {} if reasoning else {"logprobs": []}
            kind = "reasoning_text.done" if reasoning else "output_text.done"
            events = [
                self._event(kind, content_index=0, text=text, **more),
                self._event("content_part.done", content_index=0, part=part),
            ]
        events.append(
            {
                "type": "response.output_item.done",
                "output_index": self._open.index,
                "item": item,
            }
        )
        self._open = None
        return events

    def _add_text(self, kind: str, text: str) -> list[Event]:
        events = []
        if self._open is None or self._open.item["type"] != kind:
            events = [*self.end(), *self._start_text(kind)]
        assert self._open is not None
        self._open.text.append(text)
        if kind == "reasoning":
            events.append(self._event("reasoning_text.delta", content_index=0, delta=text))
        else:
            events.append(
                self._event("output_text.delta", content_index=0, delta=text, logprobs=[])
            )
        return events

    def _start_text(self, kind: str) -> list[Event]:
        reasoning = kind == "reasoning"
        item: dict[str, Any] = {"type": kind, "id": f"{'rs' if reasoning else 'msg'}_{new_id()}"}
        if reasoning:
            item["summary"] = []
        else:
            item["role"] = "assistant"
        added = self._start(item | {"content": [], "status": "in_progress"})
        part = _text_part(reasoning, "")
        return [added, self._event("content_part.added", content_index=0, part=part)]

    def _start_call(self, name: str) -> list[Event]:
        item = {
            "type": "function_call",
            "id": f"fc_{new_id()}",
            "call_id": f"call_{new_id()}",
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
        return [self._start(item)]

    def _start(self, item: dict[str, Any]) -> Event:
        self._open = _Open(len(self.items), item)
        self.items.append(item)
        return {
            "type": "response.output_item.added",
            "output_index": self._open.index,
            "item": dict(item),
        }

    def _event(self, kind: str, **values: object) -> Event:
        assert self._open is not None
        event = {
            "type": f"response.{kind}",
            "item_id": self._open.item["id"],
            "output_index": self._open.index,
        }
        return event | values


def _text_part(reasoning: bool, text: str) -> dict[str, Any]:
    if reasoning:
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _Response:
    """What the whole and the streamed answer share.

    ``echo`` are the fields of the response object that repeat the request.
    """

    def __init__(self, options: ChatOptions, echo: Mapping[str, Any]) -> None:
        self._options = options
        self._echo = echo
        self._choice = Choice(options)
        self._output = OutputItems()

    def _add(self, parts: list[Part]) -> list[Event]:
        if not self._options.include_reasoning:
            parts = [part for part in parts if type(part) is not Reasoning]
        return [event for part in parts for event in self._output.add(part)]

    def _finish(self, event: Finished) -> list[Event]:
        events = self._add(self._choice.finish(event))
        return events + self._output.end(complete=event.reason is FinishReason.STOP)

    def _object(self, status: str) -> dict[str, Any]:
        options, finished = self._options, self._choice.finished
        body: dict[str, Any] = {
            "id": options.id,
            "object": "response",
            "created_at": options.created,
            "status": status,
            "model": options.model,
            "output": self._output.items,
            "error": None,
            "incomplete_details": None,
            "usage": None,
        }
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if finished is not None:
            tail = tail_of(options, [self._choice])
            body["usage"] = _usage(tail["usage"])
            if "metrics" in tail:
                body["metrics"] = tail["metrics"]
        return {**body, **self._echo}

    @property
    def _status(self) -> str:
        assert self._choice.finished is not None
        return {
            FinishReason.STOP: "completed",
            FinishReason.LENGTH: "incomplete",
            FinishReason.ABORT: "cancelled",
        }[self._choice.finished.reason]


class ResponsesBody(_Response):
    """The one response object."""

    streams = False

    def tokens(self, event: Tokens) -> bytes:
        self._add(self._choice.feed(event))
        return b""

    def finished(self, event: Finished) -> bytes:
        self._finish(event)
        return b""

    def end(self) -> bytes:
        return orjson.dumps(self._object(self._status))

    def failed(self, error: dict[str, Any]) -> bytes:
        raise AssertionError("nothing of a whole answer is sent before its end")


class ResponsesStream(_Response):
    """Numbered events, each under its type's name."""

    streams = True

    def __init__(self, options: ChatOptions, echo: Mapping[str, Any]) -> None:
        super().__init__(options, echo)
        self._number = 0

    def tokens(self, event: Tokens) -> bytes:
        return self._begin() + self._write(self._add(self._choice.feed(event)))

    def finished(self, event: Finished) -> bytes:
        return self._begin() + self._write(self._finish(event))

    def end(self) -> bytes:
        kind = "completed" if self._status == "completed" else "incomplete"
        return self._write([{"type": f"response.{kind}", "response": self._object(self._status)}])

    def failed(self, error: dict[str, Any]) -> bytes:
        response = self._object("failed")
        response["error"] = {"code": "server_error", "message": error["error"]["message"]}
        return self._write([{"type": "response.failed", "response": response}])

    def _begin(self) -> bytes:
        if self._number:
            return b""
        response = self._object("in_progress")
        kinds = ("response.created", "response.in_progress")
        return self._write([{"type": kind, "response": response} for kind in kinds])

    def _write(self, events: list[Event]) -> bytes:
        chunks = []
        for event in events:
            data = orjson.dumps(event | {"sequence_number": self._number})
            self._number += 1
            chunks.append(b"event: %s\ndata: %s\n\n" % (event["type"].encode(), data))
        return b"".join(chunks)


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
