"""The answer of /v1/chat/completions, streamed or whole, from the same parsed parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from eaglerun.messages import Finished, FinishReason, TokenLogprobs, Tokens
from eaglerun.server.failures import new_id
from eaglerun.server.logprobs import chat_logprobs
from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import CallArguments, CallStart, Content, Part, Reasoning
from eaglerun.server.parsers.reasoning import THINK_CLOSE, THINK_OPEN
from eaglerun.server.stream import DONE, sse
from eaglerun.server.usage import speculation_metrics, usage
from eaglerun.server.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What an answer must hold beyond its text.

    num_top_logprobs  None: no log-probabilities
    num_draft_tokens  the most drafts a step of this request
    report            speculation metrics at the end;  trace: which tokens were accepted drafts
    """

    id: str
    created: int
    model: str
    n: int
    new_parser: Callable[[], OutputParser]
    vocabulary: Vocabulary
    num_draft_tokens: int
    num_top_logprobs: int | None = None
    include_usage: bool = False
    include_reasoning: bool = True
    report: bool = False
    trace: bool = False


class Choice:
    """One of the n answers: its parser and what is counted of it."""

    def __init__(self, parser: OutputParser, vocabulary: Vocabulary) -> None:
        self._parser = parser
        self._open = vocabulary.id_of(THINK_OPEN)
        self._close = vocabulary.id_of(THINK_CLOSE)
        self._in_reasoning = parser.in_reasoning
        self.num_reasoning_tokens = 0
        self.finished: Finished | None = None

    def feed(self, event: Tokens) -> list[Part]:
        before = self._in_reasoning
        parts = self._parser.feed(event.text)
        self._in_reasoning = self._parser.in_reasoning
        if before or self._in_reasoning or _has_reasoning(parts):
            self.num_reasoning_tokens += self._count(event.token_ids, before)
        return parts

    def finish(self, event: Finished) -> list[Part]:
        self.finished = event
        return self._parser.finish(cut=event.reason is not FinishReason.STOP)

    @property
    def finish_reason(self) -> str:
        assert self.finished is not None
        if self.finished.reason is FinishReason.STOP and self._parser.num_calls:
            return "tool_calls"
        return self.finished.reason.value

    def _count(self, ids: tuple[int, ...], before: bool) -> int:
        """How many of the tokens of one event are reasoning, markers included."""
        start = 0 if before or self._open not in ids else ids.index(self._open)
        closed = not self._in_reasoning and self._close in ids[start:]
        return (ids.index(self._close, start) + 1 if closed else len(ids)) - start


def _has_reasoning(parts: list[Part]) -> bool:
    if len(parts) > 1:
        return any(type(part) is Reasoning for part in parts)
    return bool(parts) and type(parts[0]) is Reasoning


def trace_of(event: Tokens, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The tokens of an event and whether each was an accepted draft."""
    return [
        {"text": vocabulary.piece_text(id_), "drafted": i < event.num_accepted}
        for i, id_ in enumerate(event.token_ids)
    ]


def tail_of(options: ChatOptions, choices: Iterable[Choice]) -> dict[str, Any]:
    """What stands once at the end of an answer: usage, and metrics where asked for."""
    ended = [(c.finished, c.num_reasoning_tokens) for c in choices if c.finished is not None]
    tail: dict[str, Any] = {
        "usage": usage((event for event, _ in ended), sum(count for _, count in ended))
    }
    if options.report:
        stats = [event.speculation for event, _ in ended]
        tail["metrics"] = speculation_metrics(stats, options.num_draft_tokens)
    return tail


class ChatStream:
    """Chunks of chat.completion.chunk.

    Almost every event is a piece of content or reasoning and nothing else; its chunk is that
    text, encoded, between bytes that were made once for the choice.
    """

    streams = True

    def __init__(self, options: ChatOptions) -> None:
        self._options = options
        self._head = {
            "id": options.id,
            "object": "chat.completion.chunk",
            "created": options.created,
            "model": options.model,
        }
        self._usage = {"usage": None} if options.include_usage else {}
        self._choices = [Choice(options.new_parser(), options.vocabulary) for _ in range(options.n)]
        self._plain = options.num_top_logprobs is None and not options.trace
        self._content = [self._around(i, "content") for i in range(options.n)]
        self._reasoning = [self._around(i, "reasoning_content") for i in range(options.n)]
        self._begun = [False] * options.n

    def tokens(self, event: Tokens) -> bytes:
        index = event.index
        parts = self._choices[index].feed(event)
        start = b"" if self._begun[index] else self._begin(index)
        if self._plain:
            if not parts:
                return start
            if len(parts) == 1:
                part = parts[0]
                if type(part) is Content:
                    before, after = self._content[index]
                    return start + before + orjson.dumps(part.text) + after
                if type(part) is Reasoning and self._options.include_reasoning:
                    before, after = self._reasoning[index]
                    return start + before + orjson.dumps(part.text) + after
        return start + self._chunk(index, parts, event)

    def finished(self, event: Finished) -> bytes:
        index = event.index
        start = b"" if self._begun[index] else self._begin(index)
        choice = self._choices[index]
        delta = self._delta(choice.finish(event))
        more = {"finish_reason": choice.finish_reason, "stop_reason": event.stop_reason}
        return start + sse(self._object(index, delta, more))

    def end(self) -> bytes:
        options = self._options
        last = b""
        if options.include_usage or options.report:
            tail = tail_of(options, self._choices)
            if not options.include_usage:
                del tail["usage"]
            last = sse(self._head | {"choices": []} | tail)
        return last + DONE

    def failed(self, error: dict[str, Any]) -> bytes:
        return sse(error)

    def _begin(self, index: int) -> bytes:
        self._begun[index] = True
        return sse(self._object(index, {"role": "assistant", "content": ""}, {}))

    def _chunk(self, index: int, parts: list[Part], event: Tokens) -> bytes:
        options = self._options
        delta = self._delta(parts)
        more: dict[str, Any] = {}
        if options.num_top_logprobs is not None:
            tokens = chat_logprobs(event.logprobs, options.num_top_logprobs, options.vocabulary)
            more["logprobs"] = {"content": tokens, "refusal": None}
        if options.trace:
            more["tokens"] = trace_of(event, options.vocabulary)
        return sse(self._object(index, delta, more)) if delta or more else b""

    def _delta(self, parts: list[Part]) -> dict[str, Any]:
        """The parts of one event as one delta."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            if type(part) is Content:
                delta["content"] = delta.get("content", "") + part.text
            elif type(part) is Reasoning:
                if self._options.include_reasoning:
                    known = delta.get("reasoning_content", "")
                    delta["reasoning_content"] = known + part.text
            elif type(part) is CallStart:
                calls[part.call] = call_object(part) | {"index": part.call}
            elif type(part) is CallArguments:
                call = calls.setdefault(
                    part.call, {"index": part.call, "function": {"arguments": ""}}
                )
                call["function"]["arguments"] += part.json
        if calls:
            delta["tool_calls"] = list(calls.values())
        return delta

    def _object(self, index: int, delta: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more
        return self._head | {"choices": [choice]} | self._usage

    def _around(self, index: int, name: str) -> tuple[bytes, bytes]:
        """The bytes of a chunk before and after the text of ``name``."""
        mark = '"\\u0000"'
        chunk = sse(self._object(index, {name: "\0"}, {}))
        before, _, after = chunk.rpartition(mark.encode())
        return before, after


@dataclass(slots=True)
class _Message:
    """The parts of one choice, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            if type(part) is Content:
                self.content.append(part.text)
            elif type(part) is Reasoning:
                self.reasoning.append(part.text)
            elif type(part) is CallStart:
                self.calls.append(call_object(part))
            elif type(part) is CallArguments:
                self.calls[part.call]["function"]["arguments"] += part.json


class ChatBody:
    """The one chat.completion object."""

    streams = False

    def __init__(self, options: ChatOptions) -> None:
        self._options = options
        self._choices = [Choice(options.new_parser(), options.vocabulary) for _ in range(options.n)]
        self._messages = [_Message() for _ in range(options.n)]

    def tokens(self, event: Tokens) -> bytes:
        message = self._messages[event.index]
        message.add(self._choices[event.index].feed(event))
        if self._options.num_top_logprobs is not None:
            message.logprobs += event.logprobs
        if self._options.trace:
            message.trace += trace_of(event, self._options.vocabulary)
        return b""

    def finished(self, event: Finished) -> bytes:
        self._messages[event.index].add(self._choices[event.index].finish(event))
        return b""

    def end(self) -> bytes:
        options = self._options
        body = {
            "id": options.id,
            "object": "chat.completion",
            "created": options.created,
            "model": options.model,
            "choices": [self._choice(i) for i in range(options.n)],
        }
        return orjson.dumps(body | tail_of(options, self._choices))

    def failed(self, error: dict[str, Any]) -> bytes:
        raise AssertionError("nothing of a whole answer is sent before its end")

    def _choice(self, index: int) -> dict[str, Any]:
        options, choice, message = self._options, self._choices[index], self._messages[index]
        assert choice.finished is not None
        content = "".join(message.content)
        answer: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not message.calls else None,
            "refusal": None,
        }
        if options.include_reasoning:
            answer["reasoning_content"] = "".join(message.reasoning) or None
        if message.calls:
            answer["tool_calls"] = message.calls
        found: dict[str, Any] = {"index": index, "message": answer, "logprobs": None}
        if options.num_top_logprobs is not None:
            tokens = chat_logprobs(message.logprobs, options.num_top_logprobs, options.vocabulary)
            found["logprobs"] = {"content": tokens, "refusal": None}
        found["finish_reason"] = choice.finish_reason
        found["stop_reason"] = choice.finished.stop_reason
        if options.trace:
            found["tokens"] = message.trace
        return found


def call_object(start: CallStart) -> dict[str, Any]:
    """A tool call without arguments yet; its id is new."""
    function = {"name": start.name, "arguments": ""}
    return {"id": f"call_{new_id()}", "type": "function", "function": function}
