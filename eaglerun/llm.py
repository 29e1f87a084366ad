"""LLM: the offline face. Prompts or conversations in, answers out, in order."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eaglerun.chat_template import ChatTemplate, load_chat_template
from eaglerun.config import nearest, resolve
from eaglerun.conversation import Conversation, checked_tools, conversations
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError, EngineError, RequestError
from eaglerun.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    SpeculationStats,
    TokenLogprobs,
    Tokens,
)
from eaglerun.progress import TokenBar
from eaglerun.run.pending import AuxRows
from eaglerun.start import start_engine

Prompt = str | list[int] | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. ``seed`` repeats it; ``speculation`` counts its drafts.

    aux_hidden_states  [num_taps, prompt + output - 1, H], with return_aux_hidden_states only
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: tuple[TokenLogprobs, ...] | None
    speculation: SpeculationStats
    seed: int
    aux_hidden_states: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt; text, token_ids and so on are those of the first."""

    prompt_ids: tuple[int, ...]
    num_cached_tokens: int
    outputs: tuple[Completion, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.outputs[0].logprobs

    @property
    def speculation(self) -> SpeculationStats:
        return self.outputs[0].speculation

    @property
    def aux_hidden_states(self) -> Tensor | None:
        return self.outputs[0].aux_hidden_states


class _Collected:
    """Holds the events of one sequence so far; it can have ``most_tokens`` tokens."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finished: Finished | None = None


class LLM:
    """An engine and its tokenizer, in this process.

    ``config`` takes every setting of eaglerun.config by name (dtype, max_num_seqs, lag ...); an
    unknown one is a ConfigError that names the nearest.

    Bars are drawn on standard error while the models load, kernels are compiled, graphs captured
    and answers made: with ``progress`` True always, False never, None where that is a terminal.
    """

    def __init__(
        self,
        model: str = "demo",
        draft: str | None = None,
        num_draft_tokens: int = 3,
        progress: bool | None = None,
        **config: object,
    ) -> None:
        settings = {**config, "model": model, "num_draft_tokens": num_draft_tokens}
        if draft is not None:
            settings["draft"] = draft
        self.engine = start_engine(resolve(settings), progress=progress)
        self._calls = 0

    @classmethod
    def from_engine(cls, engine: Engine) -> "LLM":
        """An LLM around an engine that stands already."""
        llm = cls.__new__(cls)
        llm.engine = engine
        llm._calls = 0
        return llm

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The template of --chat-template, or else the checkpoint's; None where there is none."""
        file = self.engine.config.server.chat_template
        path = None if file is None else Path(file)
        if self.engine.path is not None:
            return load_chat_template(self.engine.path, path)
        return None

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt (text as it is, or token ids), in order.

        Raises  RequestError for a prompt or parameter that can never run, before anything runs;
                EngineError if a request failed.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts", "is one string; give a list of prompts")
        ids = [self._encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        return self._answer(ids, params, progress)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them, through the chat template.

        A message is a dict as in OpenAI's API. Texts are the model's own words, its thinking
        included. ``chat_template`` is a template's source that takes the place of the model's;
        ``chat_template_kwargs`` are values that it reads (MiniMax-M3's: thinking_mode).
        ``continue_final_message`` lets the answer go on with the last message, which needs
        ``add_generation_prompt=False``.

        Raises  as generate(), and RequestError where the template cannot render a conversation.
        """
        ids = self.chat_prompts(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self._answer(ids, params, progress)

    def chat_prompts(
        self,
        messages: Conversation | Sequence[Conversation],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[tuple[int, ...]]:
        """The prompts that chat() would answer, as token ids."""
        template = self.chat_template
        if chat_template is not None:
            template = ChatTemplate(chat_template, {} if template is None else template.tokens)
        if template is None:
            raise RequestError(
                "messages", f"the model {self.engine.model_name} has no chat template"
            )
        values = _template_values(chat_template_kwargs, template)
        checked = checked_tools(tools)
        prompts = []
        for name, turns in conversations(messages):
            try:
                text = template.render(
                    turns,
                    checked,
                    self.engine.config.server.max_prompt_chars,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    **values,
                )
            except RequestError as error:
                if error.field != "messages":
                    raise
                raise RequestError(name, error.message) from error
            prompts.append(self._encode(text, name))
        return prompts

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Generator[Tokens | Finished, None, None]:
        """Yield the events of one prompt's answers as they come; closing it aborts them.

        Raises  as generate().
        """
        [request] = self._requests([self._encode(prompt, "prompt")], params)
        self.engine.submit(request)
        ended = 0
        try:
            while ended < request.sampling.n:
                for event in self.engine.step():
                    if isinstance(event, Failed):
                        raise EngineError(f"request {event.request_id}: {event.message}")
                    ended += isinstance(event, Finished)
                    yield event
        finally:
            # The next call starts from an engine with nothing in it.
            if ended < request.sampling.n:
                self.engine.close()

    def _answer(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool | None,
    ) -> list[RequestOutput]:
        requests = self._requests(prompts, params)
        collected = {
            (request.request_id, index): _Collected(self._most_tokens(request))
            for request in requests
            for index in range(request.sampling.n)
        }
        try:
            for request in requests:
                self.engine.submit(request)
            most = sum(got.most_tokens for got in collected.values())
            with TokenBar(progress, most, len(collected), self._acceptance) as bar:
                while self.engine.has_work:
                    for event in self.engine.step():
                        _collect(event, collected, bar)
        except BaseException:
            # The next call starts from an engine with nothing in it.
            self.engine.close()
            raise
        return [self._output(request, collected) for request in requests]

    def _requests(
        self,
        prompts: Sequence[tuple[int, ...]],
        params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[Request]:
        """The prompts as requests that the engine takes."""
        each = _per_prompt(params, len(prompts))
        self._calls += 1
        requests = [
            Request(f"llm-{self._calls}-{i}", ids, sampling)
            for i, (ids, sampling) in enumerate(zip(prompts, each, strict=True))
        ]
        for i, request in enumerate(requests):
            try:
                self.engine.check(request)
            except RequestError as error:
                if error.field != "prompt" or len(requests) == 1:
                    raise
                raise RequestError(f"prompts[{i}]", error.message) from error
        return requests

    def _most_tokens(self, request: Request) -> int:
        """The longest that each answer to the request may become."""
        room = self.engine.max_model_len - len(request.prompt_ids)
        wish = request.sampling.max_tokens
        return room if wish is None else min(wish, room)

    def _acceptance(self) -> tuple[int, int]:
        counts = self.engine.stats.acceptance
        return counts.steps, counts.accepted

    def _encode(self, prompt: Prompt, name: str) -> tuple[int, ...]:
        if isinstance(prompt, list | tuple):
            if any(type(token) is not int for token in prompt):
                raise RequestError(name, "token ids must be integers")
            return tuple(prompt)
        if not isinstance(prompt, str):
            raise RequestError(name, f"{prompt!r} is no text and no list of ids")
        if self.engine.tokenizer is None:
            raise RequestError("prompts", "text needs a tokenizer, and the model has none")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(name, f"is no Unicode text: {error}") from None
        return tuple(self.engine.tokenizer.encode(prompt, add_special_tokens=False).ids)

    def _output(
        self, request: Request, collected: dict[tuple[str, int], _Collected]
    ) -> RequestOutput:
        outputs = []
        first: Finished | None = None
        for index in range(request.sampling.n):
            got = collected[request.request_id, index]
            if got.finished is None:
                raise EngineError(f"request {request.request_id} never finished")
            first = first or got.finished
            wants_logprobs = request.sampling.logprobs is not None
            outputs.append(
                Completion(
                    index=index,
                    text="".join(got.text),
                    token_ids=tuple(got.tokens),
                    finish_reason=got.finished.reason,
                    stop_reason=got.finished.stop_reason,
                    logprobs=tuple(got.logprobs) if wants_logprobs else None,
                    speculation=got.finished.speculation,
                    seed=got.finished.seed,
                    aux_hidden_states=self._aux(request, index, len(got.tokens)),
                )
            )
        assert first is not None
        return RequestOutput(
            prompt_ids=request.prompt_ids,
            num_cached_tokens=first.num_cached_tokens,
            outputs=tuple(outputs),
            prompt_logprobs=first.prompt_logprobs,
        )

    def _aux(self, request: Request, index: int, num_output: int) -> Tensor | None:
        """The hidden states of every position but the last, later steps over earlier ones."""
        filed = self.engine.aux.pop((request.request_id, index), None)
        if filed is None:
            return None
        parts = [part for part in filed if isinstance(part, AuxRows)]
        size = len(request.prompt_ids) + num_output - 1
        first = parts[0].hidden
        whole = torch.full((first.shape[0], size, first.shape[2]), torch.nan, dtype=first.dtype)
        for part in parts:
            end = min(part.start + part.hidden.shape[1], size)
            whole[:, part.start : end] = part.hidden[:, : max(end - part.start, 0)]
        return whole


def _collect(event: Event, collected: dict[tuple[str, int], _Collected], bar: TokenBar) -> None:
    """File an event, and show it in the bar."""
    if isinstance(event, Failed):
        raise EngineError(f"request {event.request_id}: {event.message}")
    got = collected[event.request_id, event.index]
    if isinstance(event, Tokens):
        got.tokens += event.token_ids
        got.text.append(event.text)
        got.logprobs += event.logprobs
        bar.add(len(event.token_ids))
        return
    got.finished = event
    bar.end(got.most_tokens - len(got.tokens))


def _template_values(
    given: Mapping[str, object] | None, template: ChatTemplate
) -> dict[str, object]:
    """Values for the template. RequestError for one that it does not read."""
    values = dict(given or {})
    known = dict.fromkeys(sorted(template.variables))
    for name in values:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise RequestError(
                f"chat_template_kwargs.{name}",
                f"the chat template does not read it{nearest(name, known)}; it reads {allowed}",
            )
    return values


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, list | tuple) or not all(
        isinstance(p, SamplingParams) for p in params
    ):
        raise ConfigError(f"params = {params!r}: expected SamplingParams, or a list of them")
    if len(params) != count:
        raise ConfigError(f"{len(params)} sampling params for {count} prompts: one, or as many")
    return list(params)
