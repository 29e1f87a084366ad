"""Driving an engine for a measurement: requests in, full decode steps observed."""

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from eaglerun.engine import Engine
from eaglerun.errors import EngineError
from eaglerun.messages import Failed, Finished, Request, SamplingParams, Tokens
from eaglerun.plan.step import StepPlan, StepResult

_RUNS = itertools.count()


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """``count`` prompts of random ids."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


class Steps:
    """An engine's observer: the steps in which ``num_sequences`` decoded and nothing prefilled.

    Times are of the device's parts, and from one commit to the next.
    """

    def __init__(self, num_sequences: int) -> None:
        self._num_sequences = num_sequences
        self._last: float | None = None
        self._values: dict[str, list[float]] = {}

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        now = time.perf_counter()
        full = len(plan.decode) == self._num_sequences and not plan.prefill
        if full and self._last is not None:
            for name, value in (
                ("step", (now - self._last) * 1e3),
                ("target", result.times.target_ms),
                ("draft", result.times.draft_ms),
                ("experts", float(result.num_experts)),
                ("context", sum(row.max_len for row in plan.decode) / len(plan.decode)),
            ):
                self._values.setdefault(name, []).append(value)
        self._last = now if full else None

    @property
    def count(self) -> int:
        return len(self._values.get("step", ()))

    def forget(self) -> None:
        """Count from here on."""
        self._values.clear()

    def median(self, name: str) -> float:
        """Of step, target and draft (ms), experts (summed over the layers) or context (the host's
        bound of a sequence's keys). ValueError where no step was full."""
        return statistics.median(self._values.get(name, ()))


@dataclass(slots=True)
class Times:
    """When a request was submitted, and each of its Tokens came: (when, how many tokens)."""

    submitted: float
    tokens: list[tuple[float, int]] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        return (self.tokens[0][0] - self.submitted) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean time of a token after the first event's."""
        later = sum(count for _, count in self.tokens[1:])
        return (self.tokens[-1][0] - self.tokens[0][0]) * 1e3 / max(later, 1)

    @property
    def gaps_ms(self) -> list[float]:
        """Between one event's arrival and the next one's."""
        return [(b[0] - a[0]) * 1e3 for a, b in itertools.pairwise(self.tokens)]


def submit(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    output_lens: Sequence[int],
    num_draft_tokens: int,
    ignore_eos: bool = True,
) -> dict[str, Times]:
    """Queue the prompts, greedy, K drafts a step where the engine has a draft.

    Returns the request ids, each with its time of submission.
    """
    run = next(_RUNS)
    drafts = num_draft_tokens if engine.num_draft_tokens else None
    params = SamplingParams(temperature=0.0, ignore_eos=ignore_eos, num_draft_tokens=drafts)
    found = {}
    for i, (prompt, length) in enumerate(zip(prompts, output_lens, strict=True)):
        sampling = dataclasses.replace(params, seed=i, max_tokens=length)
        request_id = f"bench-{run}-{i}"
        engine.submit(Request(request_id, prompt, sampling))
        found[request_id] = Times(time.perf_counter())
    return found


def run_to_end(engine: Engine, times: dict[str, Times]) -> float:
    """Step until nothing is left; fills ``times``. Returns the seconds it took.

    Raises  EngineError when a request fails.
    """
    begin = time.perf_counter()
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Failed):
                raise EngineError(f"{event.request_id}: {event.message}")
            if isinstance(event, Tokens) and event.token_ids:
                times[event.request_id].tokens.append((now, len(event.token_ids)))
    return time.perf_counter() - begin


def decode_steps(engine: Engine, steps: Steps, count: int) -> None:
    """Step until ``steps`` has seen ``count`` more full decode steps.

    Raises  EngineError when the requests end, or cannot all run at once, before that.
    """
    goal = steps.count + count
    while steps.count < goal:
        for event in engine.step():
            if isinstance(event, Finished | Failed):
                raise EngineError(f"{event.request_id} ended after {steps.count} full decode steps")
        if engine.num_waiting and not engine.num_running:
            raise EngineError(f"{engine.num_waiting} sequences wait: they do not run at once")


def stop(engine: Engine, request_ids: Sequence[str]) -> None:
    """Abort the requests and step until nothing of them is left."""
    for request_id in request_ids:
        engine.abort(request_id)
    while engine.has_work:
        engine.step()
