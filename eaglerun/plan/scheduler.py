"""The policy of the engine: plan() -> StepPlan, commit(StepResult) -> events.

The scheduler may plan step n + 1 while step n runs. It then knows lengths only as bounds: plan()
reserves for the upper bound, commit() of step n sets the truth. A sequence in flight is preempted
or aborted only at its commit; what was computed for a sequence that had ended is discarded, and
its blocks and slot are given back only when its last step in flight is committed.

Four owners stand behind it: Queue (who waits), Residency (who runs, with which slot and blocks),
endings (who has ended, and why) and Outbox (what is to be told). Pace, where a bound is set, learns
how many prefill rows a step may take while streams wait for it.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from eaglerun.errors import EngineError
from eaglerun.messages import Event, Failed, FinishReason, TokenLogprobs, Tokens
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import DraftLengthPolicy
from eaglerun.plan.endings import Ending, finished, may_have_ended, take, tokens_event
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.outbox import Outbox
from eaglerun.plan.pace import Budget, Pace
from eaglerun.plan.parts import admission, decode_row, num_positions, prefill_chunk, step_plan
from eaglerun.plan.queue import Queue
from eaglerun.plan.residency import Residency
from eaglerun.plan.sequence import Sequence, Status
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan, StepResult
from eaglerun.stats import EngineStats


@dataclass(slots=True)
class _InFlight:
    """A plan whose result is still to come, and whose rows are whose."""

    plan: StepPlan
    decode: list[Sequence]
    prefill: list[Sequence]


class Scheduler:
    """Owns every Sequence: nobody changes one but itself and the owners that it asks."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, policy: DraftLengthPolicy) -> None:
        self.limits = limits
        self.pool = pool
        self.policy = policy
        # Sizes the prefill of steps that streams wait for; None: whatever there is room for.
        self.pace = None if limits.max_itl_ms is None else Pace(limits.max_itl_ms)
        self.stats = EngineStats()
        self._queue = Queue()
        self._residency = Residency(limits, pool)
        self._in_flight: deque[_InFlight] = deque()
        self._outbox = Outbox()
        self._step_id = 0

    # What the engine asks.

    @property
    def num_running(self) -> int:
        return len(self._residency.running)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def has_work(self) -> bool:
        residency = self._residency
        return bool(self._queue or residency.running or residency.leaving or self._outbox)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that still holds something, in no order."""
        yield from self._residency
        yield from self._queue

    def add(self, seq: Sequence) -> None:
        self._outbox.expect(seq.request.request_id)
        self._queue.add(seq)

    def abort(self, request_id: str) -> bool:
        """End a request's sequences: at once, or at their commit where a step is in flight.

        Returns whether any was open.
        """
        found = False
        for seq in list(self.sequences()):
            if seq.request.request_id != request_id or seq.status is Status.ENDED:
                continue
            found = True
            if seq.num_in_flight:
                seq.abort_requested = True
            else:
                if seq.status is Status.WAITING:
                    self._queue.remove(seq)
                self._end(seq, Ending(FinishReason.ABORT))
        return found

    def fail_all(self, message: str) -> list[Event]:
        """Every open request fails; nothing is in flight any more (the ranks are gone)."""
        open_ids: dict[str, None] = {}
        for seq in self.sequences():
            if seq.status is not Status.ENDED:
                open_ids[seq.request.request_id] = None
            seq.status = Status.ENDED
        events = [*self.take_events(), *(Failed(request_id, message) for request_id in open_ids)]
        self._residency.clear()
        self._queue.clear()
        self._in_flight.clear()
        self._outbox.clear()
        return events

    def preempt(self, request_id: str) -> None:
        """Give a running request's blocks back as soon as nothing of it is in flight; it returns
        to the queue and is recomputed."""
        for seq in self._residency.running:
            if seq.request.request_id == request_id:
                seq.preempt_requested = True

    def is_open(self, request_id: str) -> bool:
        """Whether an end of the request is still to be handed out."""
        return self._outbox.is_open(request_id)

    def oldest_slots(self) -> dict[int, Sequence]:
        """The sequences of the oldest step in flight, by slot."""
        flight = self._in_flight[0]
        return {seq.slot_id: seq for seq in [*flight.decode, *flight.prefill]}

    def take_events(self) -> list[Event]:
        return self._outbox.take()

    def check_integrity(self) -> None:
        """EngineError if blocks or slots leaked. For tests and the idle loop."""
        self._residency.check_integrity()

    # Plan.

    def plan(self) -> StepPlan | None:
        """The next step, or None: nothing to do, or a commit must come first."""
        for seq in [s for s in self._residency.running if s.preempt_requested]:
            if not seq.num_in_flight:
                self._preempt(seq)
        k = self._choose_k()
        decode = self._plan_decode(k)
        if decode is None:
            return None
        budget = self._prefill_budget([row for _, row in decode])
        prefill = self._plan_prefill(k, budget)
        admissions: list[Admission] = []
        while budget.is_open and (admitted := self._admit()) is not None:
            admissions.append(admission(admitted))
            prefill.append((admitted, self._take_chunk(admitted, k, budget)))
        if not decode and not prefill:
            return None
        return self._launch(admissions, decode, prefill)

    def _choose_k(self) -> int:
        limits = self.limits
        if not limits.has_draft:
            return 0
        k = self.policy.num_draft_tokens(self._step_id, self.num_running)
        if not 0 <= k <= limits.num_draft_tokens:
            raise EngineError(f"the policy drafts {k}, allowed 0 to {limits.num_draft_tokens}")
        return k

    def _plan_decode(self, k: int) -> list[tuple[Sequence, DecodeRow]] | None:
        """Rows of the sequences past their prefill; None if blocks are short until a commit."""
        rows = []
        index = 0
        running = self._residency.running
        while index < len(running):
            seq = running[index]
            index += 1
            if not seq.prefill_planned or may_have_ended(seq, self.limits):
                continue
            row = decode_row(seq, k, self.limits)
            while not self._residency.reserve(seq, num_positions(row, self.limits)):
                if self._in_flight:
                    return None
                victim = running[-1]
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                rows.append((seq, row))
        return rows

    def _preempt(self, seq: Sequence) -> None:
        self._residency.preempt(seq)
        self.stats.preemptions += 1
        self._queue.add(seq)

    def _prefill_budget(self, decode: list[DecodeRow]) -> Budget:
        rows = self.limits.max_num_batched_tokens - sum(row.num_drafts + 1 for row in decode)
        return Budget(rows) if self.pace is None else self.pace.budget(rows, decode)

    def _plan_prefill(self, k: int, budget: Budget) -> list[tuple[Sequence, PrefillChunk]]:
        chunks = []
        for seq in self._residency.running:
            if not budget.is_open:
                break
            if not seq.prefill_planned and not seq.abort_requested and not seq.preempt_requested:
                chunks.append((seq, self._take_chunk(seq, k, budget)))
        return chunks

    def _take_chunk(self, seq: Sequence, k: int, budget: Budget) -> PrefillChunk:
        chunk = prefill_chunk(seq, k, budget.rows(seq.num_planned), self.limits)
        budget.take(chunk)
        return chunk

    def _admit(self) -> Sequence | None:
        """Give the best waiting sequence a slot and blocks for its prefill, if they are there."""
        if not self._residency.has_slot:
            return None
        seq = self._queue.pop()
        if seq is None:
            return None
        if not self._residency.admit(seq):
            self._queue.add(seq)
            return None
        seq.prompt_logprobs = []
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed
            # A request's other answers share the prompt of its first.
            if seq.index == 0:
                self.stats.prompt_tokens += seq.num_prompt_tokens
                self.stats.cached_tokens += seq.num_cached_tokens
        return seq

    def _launch(
        self,
        admissions: list[Admission],
        decode: list[tuple[Sequence, DecodeRow]],
        prefill: list[tuple[Sequence, PrefillChunk]],
    ) -> StepPlan:
        """Freeze the step and move the bounds of its sequences."""
        parts: list[tuple[Sequence, DecodeRow | PrefillChunk]] = [*decode, *prefill]
        updates = [update for seq, _ in parts for update in self._residency.updates(seq)]
        plan = step_plan(self._step_id, admissions, updates, decode, prefill)
        self._step_id += 1
        for seq, part in parts:
            seq.launched(part)
        self._in_flight.append(_InFlight(plan, [s for s, _ in decode], [s for s, _ in prefill]))
        return plan

    # Commit.

    def commit(self, result: StepResult) -> list[Event]:
        """Apply the oldest step in flight: exact lengths, trimming, endings, published blocks."""
        flight = self._in_flight.popleft()
        if flight.plan.step_id != result.step_id:
            raise EngineError(f"result of step {result.step_id}, not {flight.plan.step_id}")
        self.stats.steps += 1
        if self.pace is not None:
            self.pace.learn(flight.plan, result.times)
        for c, (seq, chunk) in enumerate(zip(flight.prefill, flight.plan.prefill, strict=True)):
            if self._stands(seq, chunk, bool(result.broken_prefill) and result.broken_prefill[c]):
                asked = result.prompt_logprobs[c] if result.prompt_logprobs else ()
                logprob = result.prefill_logprobs[c] if result.prefill_logprobs else None
                seq.drafts = result.prefill_drafts[c] if result.prefill_drafts else ()
                self._commit_chunk(seq, chunk, result.prefill[c], asked, logprob)
        for b, (seq, row) in enumerate(zip(flight.decode, flight.plan.decode, strict=True)):
            if self._stands(seq, row, bool(result.broken) and result.broken[b]):
                logprobs = result.decode_logprobs[b] if result.decode_logprobs else ()
                seq.drafts = result.drafts[b] if result.drafts else ()
                self._commit_row(seq, row, result.decode[b], result.num_accepted[b], logprobs)
        self.stats.check_identity()
        return self.take_events()

    def _stands(self, seq: Sequence, part: DecodeRow | PrefillChunk, broken: bool) -> bool:
        """Whether what was computed for the sequence counts.

        It is discarded where the sequence had ended. Numbers that are not finite end it, and
        nothing of the step is kept.
        """
        seq.landed(part)
        if seq.status is Status.ENDED:
            self.stats.steps_discarded += 1
            self._residency.release(seq)
            return False
        if broken:
            self._end(seq, Ending(FinishReason.ERROR))
        return not broken

    def _commit_chunk(
        self,
        seq: Sequence,
        chunk: PrefillChunk,
        token: int,
        prompt_logprobs: tuple[TokenLogprobs, ...],
        logprob: TokenLogprobs | None,
    ) -> None:
        seq.num_computed = chunk.end
        if chunk.prompt_logprobs >= 0:
            known = seq.num_prompt_tokens - 1 - chunk.start
            seq.prompt_logprobs += prompt_logprobs[:known]
        if chunk.samples:
            self.stats.prefill_samples += 1
            self._emit(seq, (token,), 0, () if logprob is None else (logprob,))
        else:
            self._residency.publish(seq)
            if seq.abort_requested:
                self._end(seq, Ending(FinishReason.ABORT))

    def _commit_row(
        self,
        seq: Sequence,
        row: DecodeRow,
        tokens: tuple[int, ...],
        num_accepted: int,
        logprobs: tuple[TokenLogprobs, ...],
    ) -> None:
        seq.num_computed += len(tokens)
        self.stats.add_decode_row(len(seq.token_ids), row.num_drafts, num_accepted)
        if row.num_drafts:
            seq.acceptance.add(row.num_drafts, num_accepted)
        self._emit(seq, tokens, num_accepted, logprobs)

    def _emit(
        self,
        seq: Sequence,
        tokens: tuple[int, ...],
        num_accepted: int,
        logprobs: tuple[TokenLogprobs, ...],
    ) -> None:
        """Tell of the new tokens, up to the sequence's end if it is among them."""
        taken = take(seq, tokens, self.limits)
        kept = taken.num_tokens
        self.stats.emitted_tokens += kept
        self.stats.trimmed_tokens += len(tokens) - kept
        seq.num_computed = min(seq.num_computed, len(seq.token_ids) - 1)
        self._residency.publish(seq)
        self._outbox.add(tokens_event(seq, tokens[:kept], taken.text, num_accepted, logprobs))
        if taken.ending is not None:
            self._end(seq, taken.ending)

    def _end(self, seq: Sequence, ending: Ending) -> None:
        """The sequence's last event; its memory follows once nothing of it is in flight."""
        held = "" if seq.text is None else seq.text.finish()
        if held:
            self._outbox.add(Tokens(seq.request.request_id, seq.index, (), held))
        was_running = seq.status is Status.RUNNING
        seq.status = Status.ENDED
        if was_running:
            self._residency.leave(seq)
        self.stats.finished[ending.reason] = self.stats.finished.get(ending.reason, 0) + 1
        self._outbox.add(finished(seq, ending))
