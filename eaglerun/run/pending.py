"""A launched step: its outputs on their way to the host, and how long its parts took."""

import itertools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.errors import RankFailed
from eaglerun.kernels.rows import Emitted
from eaglerun.messages import TokenLogprobs
from eaglerun.plan.step import StepPlan, StepResult, StepTimes
from eaglerun.sampling import LogprobRows


@dataclass(slots=True)
class AuxRows:
    """Captured hidden states [num_taps, n, H] of positions ``start`` ... of the sequence in a slot.

    Of a decode row all verified positions are here; the first num_accepted + 1 are the text's. The
    device alone knows where they start: until the step's result is there, ``start`` is -1.

    arriving  the start of a decode row, on its way to the host
    """

    slot_id: int
    start: int
    hidden: Tensor
    arriving: Tensor | None = None

    def arrive(self) -> None:
        """Read the start; the device has reached the end of the step."""
        if self.arriving is not None:
            self.start, self.arriving = int(self.arriving), None


# Slices of a chunk's rows, and the known token after each row.
PromptLogprobs = tuple[list[LogprobRows], tuple[int, ...]]


@dataclass(slots=True)
class Decoded:
    """On their way to the host: what was emitted, of no fewer sequences and tokens than the plan's,
    drafts [B, >= num_propose], num_experts [1], and log-probabilities."""

    emitted: Emitted
    drafts: Tensor
    num_experts: Tensor
    logprobs: LogprobRows | None


@dataclass(slots=True)
class Prefilled:
    """``broken`` [chunks]: rows whose hidden states are not finite. ``drafts`` [final chunks, >=
    num_propose]; None where none was made."""

    sampled: Tensor
    broken: Tensor
    logprobs: LogprobRows | None
    prompt: list[PromptLogprobs | None]
    drafts: Tensor | None


class PendingStep:
    """A launched step. ``result`` waits for the device, but not for ever."""

    def __init__(
        self,
        plan: StepPlan,
        decoded: Decoded | None,
        prefilled: Prefilled | None,
        aux: list[AuxRows],
        clock: "Clock",
    ) -> None:
        self.plan = plan
        self.aux = aux
        self._decoded = decoded
        self._prefilled = prefilled
        self._clock = clock

    def result(self, timeout_s: float) -> StepResult:
        """Wait for the device and read what it computed.

        Raises  RankFailed where the step is not done after ``timeout_s``.
        """
        plan = self.plan
        if not self._clock.wait(timeout_s):
            raise RankFailed(
                f"step {plan.step_id} is not done after {timeout_s:g} s: the device hangs"
            )
        for kept in self.aux:
            kept.arrive()
        num_experts = 0
        decode: tuple[tuple[int, ...], ...] = ()
        accepted: tuple[int, ...] = ()
        broken: tuple[bool, ...] = ()
        broken_prefill: tuple[bool, ...] = ()
        drafts: tuple[tuple[int, ...], ...] = ()
        prefill_drafts: tuple[tuple[int, ...], ...] = ()
        decode_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if self._decoded is not None:
            count, width = len(plan.decode), plan.num_drafts + 1
            emitted = self._decoded.emitted
            rows = emitted.tokens[:count, :width].tolist()
            decode = tuple(tuple(t for t in row if t >= 0) for row in rows)
            accepted = tuple(emitted.accepted[:count].tolist())
            broken = tuple(map(bool, emitted.broken[:count].tolist()))
            num_experts = int(self._decoded.num_experts)
            if plan.num_propose:
                made = self._decoded.drafts[:count].tolist()
                drafts = tuple(
                    tuple(ids[: row.num_propose])
                    for ids, row in zip(made, plan.decode, strict=True)
                )
            if self._decoded.logprobs is not None:
                flat = token_logprobs(self._decoded.logprobs, [t for row in rows for t in row])
                decode_logprobs = tuple(
                    tuple(flat[b * width : b * width + len(ids)]) for b, ids in enumerate(decode)
                )
        prefill: tuple[int, ...] = ()
        prefill_logprobs: tuple[TokenLogprobs | None, ...] = ()
        prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if self._prefilled is not None:
            tokens = iter(self._prefilled.sampled.tolist())
            broken_prefill = tuple(map(bool, self._prefilled.broken.tolist()))
            prefill = tuple(next(tokens) if c.samples else -1 for c in plan.prefill)
            if self._prefilled.logprobs is not None:
                ids = [t for t in prefill if t >= 0]
                flat_one = iter(token_logprobs(self._prefilled.logprobs, ids))
                prefill_logprobs = tuple(
                    next(flat_one) if c.samples else None for c in plan.prefill
                )
            prompt_logprobs = tuple(map(_of_prompt, self._prefilled.prompt))
            if self._prefilled.drafts is not None:
                after = iter(self._prefilled.drafts.tolist())
                prefill_drafts = tuple(
                    tuple(next(after)[: c.num_propose]) if c.samples else () for c in plan.prefill
                )
        return StepResult(
            step_id=plan.step_id,
            decode=decode,
            num_accepted=accepted,
            prefill=prefill,
            decode_logprobs=decode_logprobs,
            prefill_logprobs=prefill_logprobs,
            prompt_logprobs=prompt_logprobs,
            drafts=drafts,
            prefill_drafts=prefill_drafts,
            num_experts=num_experts,
            broken=broken,
            broken_prefill=broken_prefill,
            times=self._clock.times(),
        )


def reached(event: torch.cuda.Event, timeout_s: float) -> bool:
    """Wait for the device to reach an event; False where it has not after ``timeout_s``.

    The event is asked again and again, because synchronize() knows no end; between two questions
    other threads may run.
    """
    deadline = time.monotonic() + timeout_s
    while not event.query():
        if time.monotonic() > deadline:
            return False
        time.sleep(0)
    return True


class Clock:
    """Times of a step's parts: events on a GPU, wall time on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        # (part that ended here, when)
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._mark("begin")

    def start(self) -> None:
        self._mark("other")

    def target_done(self) -> None:
        self._mark("target")

    def draft_done(self) -> None:
        self._mark("draft")

    def end(self) -> None:
        self._mark("other")

    def wait(self, timeout_s: float) -> bool:
        """Until the device has reached the last mark; what was copied to the host is there then.

        False where it has not after ``timeout_s``.
        """
        last = self._marks[-1][1]
        return not isinstance(last, torch.cuda.Event) or reached(last, timeout_s)

    def times(self) -> StepTimes:
        spent = {"target": 0.0, "draft": 0.0, "other": 0.0}
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            spent[part] += _between_ms(before, after)
        return StepTimes(spent["target"], spent["draft"], sum(spent.values()))

    def _mark(self, part: str) -> None:
        if self._gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((part, event))
        else:
            self._marks.append((part, time.perf_counter()))


def _between_ms(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return (after - before) * 1e3
    assert isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event)
    elapsed: float = before.elapsed_time(after)
    return elapsed


def token_logprobs(rows: LogprobRows, tokens: list[int]) -> list[TokenLogprobs]:
    """One TokenLogprobs per row; rows and tokens run in parallel."""
    chosen, rank = rows.chosen.tolist(), rows.rank.tolist()
    ids, top = rows.top_ids.tolist(), rows.top.tolist()
    return [
        TokenLogprobs(token, chosen[i], rank[i], tuple(zip(ids[i], top[i], strict=True)))
        for i, token in enumerate(tokens)
    ]


def _of_prompt(asked: PromptLogprobs | None) -> tuple[TokenLogprobs, ...]:
    found: list[TokenLogprobs] = []
    if asked is not None:
        parts, tokens = asked
        for part in parts:
            after = tokens[len(found) : len(found) + part.chosen.shape[0]]
            found += token_logprobs(part, list(after))
    return tuple(found)
