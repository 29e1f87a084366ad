"""The answer of /v1/completions, streamed or whole: plain text, no parser."""

from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from eaglerun.messages import Finished, FinishReason, TokenLogprobs, Tokens
from eaglerun.server.chat_answer import trace_of
from eaglerun.server.logprobs import CompletionLogprobs, extend, prompt_logprobs
from eaglerun.server.stream import DONE, sse
from eaglerun.server.usage import speculation_metrics, usage, usage_so_far
from eaglerun.server.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class CompletionOptions:
    """What an answer must hold beyond its text.

    prompts     request id -> (first choice, prompt text, prompt ids), in the order asked
    n           choices of each prompt
    echo_only   the prompt without an answer: the one token that the engine makes is left out
    logprobs    None: none
    """

    id: str
    created: int
    model: str
    prompts: dict[str, "EchoedPrompt"]
    n: int
    vocabulary: Vocabulary
    num_draft_tokens: int
    echo: bool = False
    echo_only: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    report: bool = False
    trace: bool = False

    @property
    def num_choices(self) -> int:
        return self.n * len(self.prompts)

    def ended(self, event: Finished) -> Finished:
        """The end of a choice as it is told."""
        if not self.echo_only:
            return event
        return replace(event, reason=FinishReason.LENGTH, stop_reason=None, num_output_tokens=0)

    def choice_of(self, event: Tokens | Finished) -> int:
        return self.prompts[event.request_id].first_choice + event.index

    def head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
        }

    def tail(self, finished: list[Finished]) -> dict[str, Any]:
        """What stands once at the end."""
        tail: dict[str, Any] = {"usage": usage(finished, 0)}
        if self.report:
            stats = [event.speculation for event in finished]
            tail["metrics"] = speculation_metrics(stats, self.num_draft_tokens)
        return tail


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """One prompt: its text (if it may be echoed) and ids, and its first choice's index."""

    first_choice: int
    text: str
    token_ids: tuple[int, ...]


class CompletionStream:
    """Chunks of text_completion; an echoed prompt comes with a choice's first chunk."""

    streams = True

    def __init__(self, options: CompletionOptions) -> None:
        self._options = options
        self._head = options.head()
        self._usage = {"usage": None} if options.include_usage else {}
        self._plain = options.logprobs is None and not (
            options.trace or options.return_token_ids or options.continuous_usage
        )
        self._num_tokens = 0
        self._around = [self._text_around(i) for i in range(options.num_choices)]
        self._logprobs = [
            CompletionLogprobs(options.logprobs or 0, options.vocabulary)
            for _ in range(options.num_choices)
        ]
        self._begun = [False] * options.num_choices
        self._finished: dict[int, Finished] = {}

    def tokens(self, event: Tokens) -> bytes:
        index = self._options.choice_of(event)
        start = b"" if self._begun[index] else self._begin(index, event.request_id)
        if self._options.echo_only:
            return start
        self._num_tokens += len(event.token_ids)
        if self._plain:
            if not event.text:
                return start
            before, after = self._around[index]
            return start + before + orjson.dumps(event.text) + after
        more: dict[str, Any] = {}
        if self._options.logprobs is not None:
            pairs = [(token.token_id, token) for token in event.logprobs]
            more["logprobs"] = self._logprobs[index].add(pairs)
        if self._options.return_token_ids:
            more["token_ids"] = event.token_ids
        if self._options.trace:
            more["tokens"] = trace_of(event, self._options.vocabulary)
        return start + sse(self._object(index, event.text, more))

    def finished(self, event: Finished) -> bytes:
        event, index = self._options.ended(event), self._options.choice_of(event)
        start = b"" if self._begun[index] else self._begin(index, event.request_id)
        self._finished[index] = event
        more = {"finish_reason": event.reason.value, "stop_reason": event.stop_reason}
        return start + sse(self._object(index, "", more))

    def end(self) -> bytes:
        last = b""
        if self._options.include_usage or self._options.report:
            tail = self._options.tail([event for _, event in sorted(self._finished.items())])
            if not self._options.include_usage:
                del tail["usage"]
            last = sse(self._head | {"choices": []} | tail)
        return last + DONE

    def failed(self, error: dict[str, Any]) -> bytes:
        return sse(error)

    def _begin(self, index: int, request_id: str) -> bytes:
        self._begun[index] = True
        options = self._options
        if not (options.echo or options.return_token_ids):
            return b""
        prompt = options.prompts[request_id]
        more = {"prompt_token_ids": prompt.token_ids} if options.return_token_ids else {}
        return sse(self._object(index, prompt.text if options.echo else "", more))

    def _object(self, index: int, text: str, more: dict[str, Any]) -> dict[str, Any]:
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None} | more
        usage: dict[str, Any] = dict(self._usage)
        if self._options.continuous_usage:
            num_prompt = sum(len(p.token_ids) for p in self._options.prompts.values())
            usage = {"usage": usage_so_far(num_prompt, self._num_tokens, None)}
        return self._head | {"choices": [choice]} | usage

    def _text_around(self, index: int) -> tuple[bytes, bytes]:
        """The bytes of a chunk before and after its text."""
        before, _, after = sse(self._object(index, "\0", {})).rpartition(b'"\\u0000"')
        return before, after


@dataclass(slots=True)
class _Text:
    """What one choice has so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)
    finished: Finished | None = None


class CompletionBody:
    """The one text_completion object."""

    streams = False

    def __init__(self, options: CompletionOptions) -> None:
        self._options = options
        self._choices = [_Text() for _ in range(options.num_choices)]

    def tokens(self, event: Tokens) -> bytes:
        choice = self._choices[self._options.choice_of(event)]
        if self._options.echo_only:
            return b""
        choice.text.append(event.text)
        choice.token_ids += event.token_ids
        if self._options.logprobs is not None:
            choice.logprobs += event.logprobs
        if self._options.trace:
            choice.trace += trace_of(event, self._options.vocabulary)
        return b""

    def finished(self, event: Finished) -> bytes:
        self._choices[self._options.choice_of(event)].finished = self._options.ended(event)
        return b""

    def end(self) -> bytes:
        choices = [self._choice(i, choice) for i, choice in enumerate(self._choices)]
        finished = [choice.finished for choice in self._choices if choice.finished is not None]
        body = self._options.head() | {"choices": choices} | self._options.tail(finished)
        return orjson.dumps(body)

    def failed(self, error: dict[str, Any]) -> bytes:
        raise AssertionError("nothing of a whole answer is sent before its end")

    def _choice(self, index: int, choice: _Text) -> dict[str, Any]:
        options, finished = self._options, choice.finished
        assert finished is not None
        prompt = options.prompts[finished.request_id]
        found: dict[str, Any] = {
            "index": index,
            "text": (prompt.text if options.echo else "") + "".join(choice.text),
            "logprobs": None,
            "finish_reason": finished.reason.value,
            "stop_reason": finished.stop_reason,
        }
        if options.logprobs is not None:
            shape = CompletionLogprobs(options.logprobs, options.vocabulary)
            if options.echo:
                known = finished.prompt_logprobs or (None,) * len(prompt.token_ids)
                found["logprobs"] = shape.add(zip(prompt.token_ids, known, strict=True))
            generated = shape.add((token.token_id, token) for token in choice.logprobs)
            found["logprobs"] = extend(found["logprobs"], generated)
        if options.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(
                prompt.token_ids,
                finished.prompt_logprobs,
                options.prompt_logprobs,
                options.vocabulary,
            )
        if options.return_token_ids:
            found["prompt_token_ids"] = prompt.token_ids
            found["token_ids"] = choice.token_ids
        if options.trace:
            found["tokens"] = choice.trace
        return found
