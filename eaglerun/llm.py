"""LLM: the offline face. Prompts in, answers out, in order."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from eaglerun.config import resolve
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
    """What has arrived of one sequence."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finished: Finished | None = None


class LLM:
    """An engine and its tokenizer, in this process.

    ``config`` takes every setting of eaglerun.config by name (dtype, max_num_seqs, lag ...); an
    unknown one is a ConfigError that names the nearest.
    """

    def __init__(
        self,
        model: str = "demo",
        draft: str | None = None,
        num_draft_tokens: int = 3,
        **config: object,
    ) -> None:
        settings = {**config, "model": model, "num_draft_tokens": num_draft_tokens}
        if draft is not None:
            settings["draft"] = draft
        self.engine = Engine.from_config(resolve(settings), progress=True)
        self._calls = 0

    @classmethod
    def from_engine(cls, engine: Engine) -> "LLM":
        """An LLM around an engine that stands already."""
        llm = cls.__new__(cls)
        llm.engine = engine
        llm._calls = 0
        return llm

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt (text, or token ids), in order.

        Raises  RequestError for a prompt or parameter that can never run, before anything runs;
                EngineError if a request failed.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts", "is one string; give a list of prompts")
        each = _per_prompt(params, len(prompts))
        self._calls += 1
        requests = [
            Request(f"llm-{self._calls}-{i}", self._encode(prompt, i), sampling)
            for i, (prompt, sampling) in enumerate(zip(prompts, each, strict=True))
        ]
        collected: dict[tuple[str, int], _Collected] = {}
        for request in requests:
            self.engine.check(request)
            for index in range(request.sampling.n):
                collected[request.request_id, index] = _Collected()
        try:
            for request in requests:
                self.engine.submit(request)
            with tqdm(total=len(collected), disable=not progress, unit="answer") as bar:
                while self.engine.has_work:
                    for event in self.engine.step():
                        bar.update(_collect(event, collected))
        except BaseException:
            # The next call starts from an engine with nothing in it.
            self.engine.close()
            raise
        return [self._output(request, collected) for request in requests]

    def _encode(self, prompt: Prompt, index: int) -> tuple[int, ...]:
        if isinstance(prompt, list | tuple):
            if any(type(token) is not int for token in prompt):
                raise RequestError(f"prompts[{index}]", "token ids must be integers")
            return tuple(prompt)
        if not isinstance(prompt, str):
            raise RequestError(f"prompts[{index}]", f"{prompt!r} is no text and no list of ids")
        if self.engine.tokenizer is None:
            raise RequestError("prompts", "text needs a tokenizer, and the model has none")
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
        parts = self.engine.aux.pop((request.request_id, index), None)
        if parts is None:
            return None
        size = len(request.prompt_ids) + num_output - 1
        first = parts[0].hidden
        whole = torch.full((first.shape[0], size, first.shape[2]), torch.nan, dtype=first.dtype)
        for part in parts:
            end = min(part.start + part.hidden.shape[1], size)
            whole[:, part.start : end] = part.hidden[:, : max(end - part.start, 0)]
        return whole


def _collect(event: Event, collected: dict[tuple[str, int], _Collected]) -> int:
    """File an event; 1 if it ended an answer."""
    if isinstance(event, Failed):
        raise EngineError(f"request {event.request_id}: {event.message}")
    got = collected[event.request_id, event.index]
    if isinstance(event, Tokens):
        got.tokens += event.token_ids
        got.text.append(event.text)
        got.logprobs += event.logprobs
        return 0
    got.finished = event
    return 1


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
