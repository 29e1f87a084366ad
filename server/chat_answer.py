"""The answer of /v1/chat/completions, streamed or whole, from the same parsed parts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from eaglerun.messages import Finished, FinishReason, TokenLogprobs, Tokens
from eaglerun.server.failures import new_id
from eaglerun.server.logprobs import ContentTokens, chat_logprobs, prompt_logprobs
from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import CallArguments, CallStart, Content, Part, Reasoning
from eaglerun.server.parsers.reasoning import THINK_CLOSE, THINK_OPEN
from eaglerun.server.stream import DONE, sse
from eaglerun.server.usage import speculation_metrics, usage, usage_so_far
from eaglerun.server.vocabulary import Vocabulary

# Reasoning stands under both of the names that clients look for.
REASONING = ("reasoning_content", "reasoning")


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What an answer must hold beyond its text.

    num_top_logprobs  None: no log-probabilities
    num_draft_tokens  the most drafts a step of this request
    is_named_call     the request named the function that is called
    continuous_usage  usage so far in every chunk
    report            speculation metrics at the end;  trace: which tokens were accepted drafts
    """

    id: str
    created: int
    model: str
    n: int
    new_parser: Callable[[], OutputParser]
    vocabulary: Vocabulary
    prompt_ids: tuple[int, ...]
    num_draft_tokens: int
    is_named_call: bool = False
    num_top_logprobs: int | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    include_reasoning: bool = True
    report: bool = False
    trace: bool = False


class Choice:
    """One of the n answers: its parser and what is counted of it."""

    def __init__(self, options: ChatOptions) -> None:
        self._parser = options.new_parser()
        self._is_named_call = options.is_named_call
        self._open = options.vocabulary.id_of(THINK_OPEN)
        self._close = options.vocabulary.id_of(THINK_CLOSE)
        self._in_reasoning = self._parser.in_reasoning
        self._content = None
        if options.num_top_logprobs is not None:
            self._content = ContentTokens(options.vocabulary, options.skip_special_tokens)
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finished: Finished | None = None

    def feed(self, event: Tokens) -> list[Part]:
        self.num_tokens += len(event.token_ids)
        before = self._in_reasoning
        parts = self._parser.feed(event.text)
        self._in_reasoning = self._parser.in_reasoning
        if before or self._in_reasoning or _has_reasoning(parts):
            self.num_reasoning_tokens += self._count(event.token_ids, before)
        return parts

    def finish(self, event: Finished) -> list[Part]:
        self.finished = event
        return self._parser.finish(cut=event.reason is not FinishReason.STOP)

    def logprobs(
        self, parts: list[Part], tokens: Iterable[TokenLogprobs] = ()
    ) -> list[TokenLogprobs]:
        """The tokens that are now known to be the content's; none if nobody asked."""
        return [] if self._content is None else self._content.take(tokens, parts)

    @property
    def finish_reason(self) -> str:
        """The reason by OpenAI's rules: a call of the function that the request named is none."""
        assert self.finished is not None
        called = self._parser.num_calls and not self._is_named_call
        if self.finished.reason is FinishReason.STOP and called:
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
        self._choices = [Choice(options) for _ in range(options.n)]
        self._plain = options.num_top_logprobs is None and not (
            options.trace or options.return_token_ids or options.continuous_usage
        )
        self._content = [self._around(i, "content") for i in range(options.n)]
        self._reasoning = [self._around(i, *REASONING) for i in range(options.n)]
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
                    return start + orjson.dumps(part.text).join(self._content[index])
                if type(part) is Reasoning and self._options.include_reasoning:
                    return start + orjson.dumps(part.text).join(self._reasoning[index])
        return start + self._chunk(index, parts, event)

    def finished(self, event: Finished) -> bytes:
        index = event.index
        start = b"" if self._begun[index] else self._begin(index)
        choice = self._choices[index]
        parts = choice.finish(event)
        more = self._logprobs(choice.logprobs(parts))
        more |= {"finish_reason": choice.finish_reason, "stop_reason": event.stop_reason}
        return start + sse(self._object(index, self._delta(parts), more))

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
        chunk = self._object(index, {"role": "assistant", "content": ""}, {})
        if self._options.return_token_ids:
            chunk["prompt_token_ids"] = self._options.prompt_ids
        return sse(chunk)

    def _chunk(self, index: int, parts: list[Part], event: Tokens) -> bytes:
        options = self._options
        delta = self._delta(parts)
        more = self._logprobs(self._choices[index].logprobs(parts, event.logprobs))
        if options.return_token_ids:
            more["token_ids"] = event.token_ids
        if options.trace:
            more["tokens"] = trace_of(event, options.vocabulary)
        return sse(self._object(index, delta, more)) if delta or more else b""

    def _logprobs(self, tokens: list[TokenLogprobs]) -> dict[str, Any]:
        num_top = self._options.num_top_logprobs
        if num_top is None or not tokens:
            return {}
        content = chat_logprobs(tokens, num_top, self._options.vocabulary)
        return {"logprobs": {"content": content, "refusal": None}}

    def _delta(self, parts: list[Part]) -> dict[str, Any]:
        """The parts of one event as one delta."""
        delta: dict[str, Any] = {}
        calls: dict[int, dict[str, Any]] = {}
        for part in parts:
            if type(part) is Content:
                delta["content"] = delta.get("content", "") + part.text
            elif type(part) is Reasoning:
                if self._options.include_reasoning:
                    text = delta.get(REASONING[0], "") + part.text
                    delta |= dict.fromkeys(REASONING, text)
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
        usage: dict[str, Any] = dict(self._usage)
        if self._options.continuous_usage:
            num_tokens = sum(choice.num_tokens for choice in self._choices)
            num_reasoning = sum(choice.num_reasoning_tokens for choice in self._choices)
            num_prompt = len(self._options.prompt_ids)
            usage = {"usage": usage_so_far(num_prompt, num_tokens, num_reasoning)}
        return self._head | {"choices": [choice]} | usage

    def _around(self, index: int, *names: str) -> list[bytes]:
        """The bytes of a chunk before, between and after the text, which is that of ``names``."""
        chunk = sse(self._object(index, dict.fromkeys(names, "\0"), {}))
        return chunk.rsplit(b'"\\u0000"', len(names))


@dataclass(slots=True)
class _Message:
    """The parts of one choice, put together."""

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
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
        self._choices = [Choice(options) for _ in range(options.n)]
        self._messages = [_Message() for _ in range(options.n)]

    def tokens(self, event: Tokens) -> bytes:
        message, choice = self._messages[event.index], self._choices[event.index]
        parts = choice.feed(event)
        message.add(parts)
        message.logprobs += choice.logprobs(parts, event.logprobs)
        if self._options.return_token_ids:
            message.token_ids += event.token_ids
        if self._options.trace:
            message.trace += trace_of(event, self._options.vocabulary)
        return b""

    def finished(self, event: Finished) -> bytes:
        message, choice = self._messages[event.index], self._choices[event.index]
        parts = choice.finish(event)
        message.add(parts)
        message.logprobs += choice.logprobs(parts)
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
        if options.return_token_ids:
            body["prompt_token_ids"] = options.prompt_ids
        first = self._choices[0].finished
        if options.prompt_logprobs is not None and first is not None:
            body["prompt_logprobs"] = prompt_logprobs(
                options.prompt_ids,
                first.prompt_logprobs,
                options.prompt_logprobs,
                options.vocabulary,
            )
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
            answer |= dict.fromkeys(REASONING, "".join(message.reasoning) or None)
        if message.calls:
            answer["tool_calls"] = message.calls
        found: dict[str, Any] = {"index": index, "message": answer, "logprobs": None}
        if options.num_top_logprobs is not None:
            tokens = chat_logprobs(message.logprobs, options.num_top_logprobs, options.vocabulary)
            found["logprobs"] = {"content": tokens, "refusal": None}
        found["finish_reason"] = choice.finish_reason
        found["stop_reason"] = choice.finished.stop_reason
        if options.return_token_ids:
            found["token_ids"] = message.token_ids
        if options.trace:
            found["tokens"] = message.trace
        return found


def call_object(start: CallStart) -> dict[str, Any]:
    """A tool call without arguments yet; its id is new."""
    function = {"name": start.name, "arguments": ""}
    return {"id": f"call_{new_id()}", "type": "function", "function": function}
