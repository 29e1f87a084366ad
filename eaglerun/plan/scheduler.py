"""The policy of the engine: plan() -> StepPlan, commit(StepResult) -> events.

The scheduler may plan step n + 1 while step n runs. It then knows lengths only as bounds: plan()
reserves for the upper bound, commit() of step n sets the truth. A sequence in flight is preempted
or aborted only at its commit; what was computed for a sequence that had ended is discarded, and
its blocks and slot are given back only when its last step in flight is committed.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

from eaglerun.errors import EngineError
from eaglerun.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    TokenLogprobs,
    Tokens,
)
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import DraftLengthPolicy
from eaglerun.plan.sequence import Sequence, Status
from eaglerun.plan.step import (
    Admission,
    BlockUpdate,
    DecodeRow,
    PrefillChunk,
    StepPlan,
    StepResult,
)
from eaglerun.stats import EngineStats


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What the scheduler may hand out.

    max_num_batched_tokens  rows of a step: decode rows first, prefill chunks take the rest
    max_chunk_tokens        rows of one prefill chunk
    has_draft               reserve the draft's slots too (its KV runs one position ahead)
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    max_model_len: int
    num_draft_tokens: int
    has_draft: bool
    prefix_caching: bool
    eos_token_ids: tuple[int, ...]


@dataclass(slots=True)
class _InFlight:
    """A plan whose result is still to come, and whose rows are whose."""

    plan: StepPlan
    decode: list[Sequence]
    prefill: list[Sequence]


class Scheduler:
    """Owns every Sequence, the block pool and the slots."""

    def __init__(self, limits: SchedulerLimits, pool: BlockPool, policy: DraftLengthPolicy) -> None:
        self.limits = limits
        self.pool = pool
        self.policy = policy
        self.stats = EngineStats()
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._running: list[Sequence] = []
        self._ending: list[Sequence] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[_InFlight] = deque()
        self._events: list[Event] = []
        # Answers of each request whose end has not been handed out yet.
        self._open: Counter[str] = Counter()
        self._step_id = 0

    # What the engine asks.

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ending or self._events)

    def sequences(self) -> Iterator[Sequence]:
        """Every sequence that still holds something, in no order."""
        yield from self._running
        yield from self._ending
        yield from (seq for _, seq in self._waiting)

    def add(self, seq: Sequence) -> None:
        self._open[seq.request.request_id] += 1
        heapq.heappush(self._waiting, (seq.order, seq))

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
                    self._waiting = [w for w in self._waiting if w[1] is not seq]
                    heapq.heapify(self._waiting)
                self._end(seq, FinishReason.ABORT)
        return found

    def fail_all(self, message: str) -> list[Event]:
        """Every open request fails; nothing is in flight any more (the ranks are gone)."""
        open_ids: dict[str, None] = {}
        for seq in list(self.sequences()):
            if seq.status is not Status.ENDED:
                open_ids[seq.request.request_id] = None
            if seq.slot_id >= 0:
                self._give_back(seq)
            seq.status = Status.ENDED
        events = [*self.take_events(), *(Failed(request_id, message) for request_id in open_ids)]
        self._waiting, self._running, self._ending = [], [], []
        self._in_flight.clear()
        self._open.clear()
        return events

    def preempt(self, request_id: str) -> None:
        """Give a running request's blocks back as soon as nothing of it is in flight; it returns
        to the queue and is recomputed."""
        for seq in self._running:
            if seq.request.request_id == request_id:
                seq.preempt_requested = True

    def is_open(self, request_id: str) -> bool:
        """Whether an end of the request is still to be handed out."""
        return self._open[request_id] > 0

    def oldest_slots(self) -> dict[int, Sequence]:
        """The sequences of the oldest step in flight, by slot."""
        flight = self._in_flight[0]
        return {seq.slot_id: seq for seq in [*flight.decode, *flight.prefill]}

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        for event in events:
            if isinstance(event, Finished):
                self._open[event.request_id] -= 1
                if not self._open[event.request_id]:
                    del self._open[event.request_id]
        return events

    def check_integrity(self) -> None:
        """EngineError if blocks or slots leaked. For tests and the idle loop."""
        holders = [*self._running, *self._ending]
        self.pool.check_integrity([seq.block_ids for seq in holders])
        slots = sorted([*self._free_slots, *(seq.slot_id for seq in holders)])
        if slots != list(range(self.limits.max_num_seqs)):
            raise EngineError(f"slots in use or free: {slots}")

    # Plan.

    def plan(self) -> StepPlan | None:
        """The next step, or None: nothing to do, or a commit must come first."""
        self._preempt_requested()
        limits = self.limits
        k = 0
        if limits.has_draft:
            k = self.policy.num_draft_tokens(self._step_id, len(self._running))
            if not 0 <= k <= limits.num_draft_tokens:
                raise EngineError(f"the policy drafts {k}, allowed 0 to {limits.num_draft_tokens}")
        admissions: list[Admission] = []
        decode = self._plan_decode(k)
        if decode is None:
            return None
        budget = limits.max_num_batched_tokens - sum(row.num_drafts + 1 for _, row in decode)
        prefill = self._plan_prefill(k, budget)
        budget -= sum(len(chunk.token_ids) for _, chunk in prefill)
        while budget > 0:
            seq = self._admit(admissions)
            if seq is None:
                break
            chunk = self._chunk(seq, k, budget)
            prefill.append((seq, chunk))
            budget -= len(chunk.token_ids)
        if not decode and not prefill:
            return None
        return self._launch(admissions, decode, prefill)

    def _launch(
        self,
        admissions: list[Admission],
        decode: list[tuple[Sequence, DecodeRow]],
        prefill: list[tuple[Sequence, PrefillChunk]],
    ) -> StepPlan:
        """Freeze the step and move the bounds of its sequences."""
        seqs = [seq for seq, _ in decode] + [seq for seq, _ in prefill]
        num_propose = [row.num_propose for _, row in decode]
        num_propose += [chunk.num_propose for _, chunk in prefill]
        logprobs = [-1 if s.sampling.logprobs is None else s.sampling.logprobs for s in seqs]
        plan = StepPlan(
            step_id=self._step_id,
            admissions=tuple(admissions),
            blocks=tuple(update for seq in seqs for update in self._block_updates(seq)),
            decode=tuple(row for _, row in decode),
            prefill=tuple(chunk for _, chunk in prefill),
            num_drafts=max((row.num_drafts for _, row in decode), default=0),
            num_propose=max(num_propose, default=0),
            num_logprobs=max(logprobs, default=-1),
        )
        self._step_id += 1
        for seq, row in decode:
            seq.max_in_flight_tokens += row.num_drafts + 1
            seq.min_in_flight_tokens += 1
            seq.num_proposed = row.num_propose
        for seq, chunk in prefill:
            seq.num_planned = chunk.end
            if chunk.samples:
                seq.max_in_flight_tokens += 1
                seq.min_in_flight_tokens += 1
                seq.num_proposed = chunk.num_propose
        for seq in seqs:
            seq.num_in_flight += 1
        self._in_flight.append(_InFlight(plan, [s for s, _ in decode], [s for s, _ in prefill]))
        return plan

    def _plan_decode(self, k: int) -> list[tuple[Sequence, DecodeRow]] | None:
        """Rows of the sequences past their prefill; None if blocks are short until a commit."""
        rows = []
        index = 0
        while index < len(self._running):
            seq = self._running[index]
            index += 1
            if not seq.prefill_planned or self._may_have_ended(seq):
                continue
            row = self._decode_row(seq, k)
            # The draft's row of the newest token is written even where nothing is proposed.
            ahead = max(row.num_propose, 1) if self.limits.has_draft else 0
            need = min(seq.max_len + row.num_drafts + ahead, self.limits.max_model_len)
            while not self._reserve(seq, need):
                if self._in_flight:
                    return None
                victim = self._running[-1]
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                rows.append((seq, row))
        return rows

    def _decode_row(self, seq: Sequence, k: int) -> DecodeRow:
        """How many drafts to judge now and to propose, never beyond max_model_len or max_tokens."""
        room = self.limits.max_model_len - seq.max_len - 1
        num_drafts = min(seq.num_proposed, room, self._tokens_left(seq) - 1)
        propose = self._num_propose(seq, k, room - num_drafts - 1)
        return DecodeRow(seq.slot_id, num_drafts, propose, seq.max_len)

    def _num_propose(self, seq: Sequence, k: int, room: int) -> int:
        """Drafts for the step after one that emits at least a token; ``room``: positions left."""
        wish = seq.sampling.num_draft_tokens
        limit = k if wish is None else min(k, wish)
        return max(min(limit, room, self._tokens_left(seq) - 2), 0)

    def _plan_prefill(self, k: int, budget: int) -> list[tuple[Sequence, PrefillChunk]]:
        chunks = []
        for seq in self._running:
            if budget <= 0:
                break
            if not seq.prefill_planned and not seq.abort_requested and not seq.preempt_requested:
                chunk = self._chunk(seq, k, budget)
                chunks.append((seq, chunk))
                budget -= len(chunk.token_ids)
        return chunks

    def _chunk(self, seq: Sequence, k: int, budget: int) -> PrefillChunk:
        start = seq.num_planned
        end = min(seq.prefill_len, start + min(budget, self.limits.max_chunk_tokens))
        samples = end == seq.prefill_len
        propose = self._num_propose(seq, k, self.limits.max_model_len - seq.prefill_len - 2)
        want = seq.sampling.prompt_logprobs
        return PrefillChunk(
            slot_id=seq.slot_id,
            token_ids=tuple(seq.token_ids[start:end]),
            start=start,
            next_token=-1 if samples else seq.token_ids[end],
            num_propose=propose if samples else 0,
            prompt_logprobs=-1 if want is None or start >= seq.num_prompt_tokens else want,
        )

    def _admit(self, admissions: list[Admission]) -> Sequence | None:
        """Give the best waiting sequence a slot and blocks for its prefill, if they are there."""
        if not self._waiting or not self._free_slots:
            return None
        held_back = []
        seq = None
        while self._waiting:
            entry = heapq.heappop(self._waiting)
            if _waits_for_leader(entry[1]):
                held_back.append(entry)
                continue
            seq = entry[1]
            break
        for entry in held_back:
            heapq.heappush(self._waiting, entry)
        if seq is None:
            return None
        hit = self._take_blocks(seq)
        if hit is None:
            heapq.heappush(self._waiting, (seq.order, seq))
            return None
        self._start(seq, hit)
        counted = seq.sampling.penalized
        admissions.append(
            Admission(
                slot_id=seq.slot_id,
                sampling=seq.sampling,
                seed=seq.seed,
                prompt_ids=seq.request.prompt_ids if counted else (),
                output_ids=tuple(seq.output_ids) if counted else (),
                num_output_tokens=seq.num_output_tokens,
                carry_block=seq.block_ids[hit - 1] if hit else -1,
            )
        )
        return seq

    def _take_blocks(self, seq: Sequence) -> int | None:
        """Blocks for the prefill and the token it samples; returns how many the prefix cache gave.

        None, and nothing taken, if too few are free. The last token is always recomputed, for
        its logits; a request for prompt log-probabilities recomputes all.
        """
        size = self.pool.block_size
        num_tokens = len(seq.token_ids)
        hits: list[int] = []
        if self.limits.prefix_caching and seq.sampling.prompt_logprobs is None:
            hits = self.pool.match(seq.names(size, (num_tokens - 1) // size))
        ahead = self.limits.num_draft_tokens + 1 if self.limits.has_draft else 1
        total = -(-min(num_tokens + ahead, self.limits.max_model_len) // size)
        if total - len(hits) > self.pool.num_free - self.pool.num_kept(hits):
            return None
        self.pool.share(hits)
        seq.block_ids = hits + self.pool.allocate(total - len(hits))
        return len(hits)

    def _start(self, seq: Sequence, num_hits: int) -> None:
        seq.slot_id = self._free_slots.pop()
        seq.status = Status.RUNNING
        seq.prefill_len = len(seq.token_ids)
        seq.num_planned = seq.num_computed = num_hits * self.pool.block_size
        seq.num_published = num_hits
        seq.num_blocks_sent = 0
        seq.prompt_logprobs = []
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed
            # A request's other answers share the prompt of its first.
            if seq.index == 0:
                self.stats.prompt_tokens += seq.num_prompt_tokens
                self.stats.cached_tokens += seq.num_cached_tokens
        self._running.append(seq)
        self._running.sort(key=lambda s: s.order)

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` positions, or False."""
        missing = -(-num_tokens // self.pool.block_size) - len(seq.block_ids)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            seq.block_ids += self.pool.allocate(missing)
        return True

    def _block_updates(self, seq: Sequence) -> Iterator[BlockUpdate]:
        if seq.num_blocks_sent < len(seq.block_ids):
            new = tuple(seq.block_ids[seq.num_blocks_sent :])
            yield BlockUpdate(seq.slot_id, seq.num_blocks_sent, new)
            seq.num_blocks_sent = len(seq.block_ids)

    def _may_have_ended(self, seq: Sequence) -> bool:
        """Whether a step in flight may bring, or surely brings, the sequence to its end."""
        return (
            seq.abort_requested
            or seq.preempt_requested
            or self._tokens_left(seq) <= 0
            or seq.max_len >= self.limits.max_model_len
        )

    def _tokens_left(self, seq: Sequence) -> int:
        """Tokens that max_tokens still allows, by the lower bound of the length."""
        if seq.sampling.max_tokens is None:
            return self.limits.max_model_len
        return seq.num_prompt_tokens + seq.sampling.max_tokens - seq.min_len

    # Preemption.

    def _preempt_requested(self) -> None:
        for seq in [s for s in self._running if s.preempt_requested and not s.num_in_flight]:
            self._preempt(seq)

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its tokens stay, its KV is recomputed or found by its prefix."""
        self._running.remove(seq)
        self._give_back(seq)
        seq.status = Status.WAITING
        seq.preempt_requested = False
        seq.num_proposed = 0
        seq.num_planned = seq.num_computed = seq.prefill_len = 0
        self.stats.preemptions += 1
        heapq.heappush(self._waiting, (seq.order, seq))

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.block_ids)
        seq.block_ids = []
        self._free_slots.append(seq.slot_id)
        seq.slot_id = -1

    # Commit.

    def commit(self, result: StepResult) -> list[Event]:
        """Apply the oldest step in flight: exact lengths, trimming, endings, published blocks."""
        flight = self._in_flight.popleft()
        if flight.plan.step_id != result.step_id:
            raise EngineError(f"result of step {result.step_id}, not {flight.plan.step_id}")
        self.stats.steps += 1
        for c, (seq, chunk) in enumerate(zip(flight.prefill, flight.plan.prefill, strict=True)):
            asked = result.prompt_logprobs[c] if result.prompt_logprobs else ()
            logprob = result.prefill_logprobs[c] if result.prefill_logprobs else None
            if result.broken_prefill and result.broken_prefill[c]:
                self._commit_broken(seq, int(chunk.samples), 1)
                continue
            self._commit_chunk(seq, chunk, result.prefill[c], asked, logprob)
        for b, (seq, row) in enumerate(zip(flight.decode, flight.plan.decode, strict=True)):
            logprobs = result.decode_logprobs[b] if result.decode_logprobs else ()
            if result.broken and result.broken[b]:
                self._commit_broken(seq, 1, row.num_drafts + 1)
                continue
            self._commit_row(seq, row, result.decode[b], result.num_accepted[b], logprobs)
        self.stats.check_identity()
        return self.take_events()

    def _commit_chunk(
        self,
        seq: Sequence,
        chunk: PrefillChunk,
        token: int,
        prompt_logprobs: tuple[TokenLogprobs, ...],
        logprob: TokenLogprobs | None,
    ) -> None:
        seq.num_in_flight -= 1
        if chunk.samples:
            seq.max_in_flight_tokens -= 1
            seq.min_in_flight_tokens -= 1
        if seq.status is Status.ENDED:
            self._discard(seq)
            return
        seq.num_computed = chunk.end
        if chunk.prompt_logprobs >= 0:
            known = seq.num_prompt_tokens - 1 - chunk.start
            seq.prompt_logprobs += prompt_logprobs[:known]
        if chunk.samples:
            self.stats.prefill_samples += 1
            self._emit(seq, (token,), 0, () if logprob is None else (logprob,))
        else:
            self._publish(seq)
            if seq.abort_requested:
                self._end(seq, FinishReason.ABORT)

    def _commit_row(
        self,
        seq: Sequence,
        row: DecodeRow,
        tokens: tuple[int, ...],
        num_accepted: int,
        logprobs: tuple[TokenLogprobs, ...],
    ) -> None:
        seq.num_in_flight -= 1
        seq.max_in_flight_tokens -= row.num_drafts + 1
        seq.min_in_flight_tokens -= 1
        if seq.status is Status.ENDED:
            self._discard(seq)
            return
        seq.num_computed += len(tokens)
        self.stats.add_decode_row(len(seq.token_ids), row.num_drafts, num_accepted)
        if row.num_drafts:
            seq.acceptance.add(row.num_drafts, num_accepted)
        self._emit(seq, tokens, num_accepted, logprobs)

    def _commit_broken(self, seq: Sequence, min_tokens: int, max_tokens: int) -> None:
        """A step whose numbers for the sequence are not finite ends it; nothing of it is kept."""
        seq.num_in_flight -= 1
        seq.max_in_flight_tokens -= max_tokens if min_tokens else 0
        seq.min_in_flight_tokens -= min_tokens
        if seq.status is Status.ENDED:
            self._discard(seq)
        else:
            self._end(seq, FinishReason.ERROR)

    def _discard(self, seq: Sequence) -> None:
        self.stats.steps_discarded += 1
        if not seq.num_in_flight:
            self._ending.remove(seq)
            self._give_back(seq)

    def _emit(
        self,
        seq: Sequence,
        tokens: tuple[int, ...],
        num_accepted: int,
        logprobs: tuple[TokenLogprobs, ...],
    ) -> None:
        """Append new tokens up to the earliest stop; what lies past it was never there."""
        reason: FinishReason | None = None
        stop_reason: str | int | None = None
        text = []
        kept = 0
        for token in tokens:
            seq.token_ids.append(token)
            kept += 1
            reason, stop_reason, piece = self._stop_at(seq, token)
            text.append(piece)
            if reason is not None:
                break
        if reason is None and seq.abort_requested:
            reason = FinishReason.ABORT
        self.stats.emitted_tokens += kept
        self.stats.trimmed_tokens += len(tokens) - kept
        seq.num_computed = min(seq.num_computed, len(seq.token_ids) - 1)
        self._publish(seq)
        if reason is not None and seq.text is not None:
            text.append(seq.text.finish())
        wanted = seq.sampling.logprobs
        self._events.append(
            Tokens(
                seq.request.request_id,
                seq.index,
                tokens[:kept],
                "".join(text),
                num_accepted,
                () if wanted is None else tuple(_best(lp, wanted) for lp in logprobs[:kept]),
            )
        )
        if reason is not None:
            self._end(seq, reason, stop_reason)

    def _stop_at(
        self, seq: Sequence, token: int
    ) -> tuple[FinishReason | None, str | int | None, str]:
        """Whether the sequence ends with its newest token, what matched, and the token's text."""
        sampling = seq.sampling
        may_stop = seq.num_output_tokens > sampling.min_tokens
        eos = not sampling.ignore_eos and token in self.limits.eos_token_ids
        if may_stop and (eos or token in sampling.stop_token_ids):
            named = token if token in sampling.stop_token_ids else None
            shown = ""
            if named is not None and sampling.include_stop_str_in_output and seq.text is not None:
                shown = seq.text.push(token, may_stop=False).text
            return FinishReason.STOP, named, shown
        text = ""
        if seq.text is not None:
            delta = seq.text.push(token, may_stop)
            text = delta.text
            if delta.stop is not None:
                return FinishReason.STOP, delta.stop, text
        limit = sampling.max_tokens
        if limit is not None and seq.num_output_tokens >= limit:
            return FinishReason.LENGTH, None, text
        if len(seq.token_ids) >= self.limits.max_model_len:
            return FinishReason.LENGTH, None, text
        return None, None, text

    def _end(
        self, seq: Sequence, reason: FinishReason, stop_reason: str | int | None = None
    ) -> None:
        """The sequence's last event; its memory follows once nothing of it is in flight."""
        held = "" if seq.text is None else seq.text.finish()
        if held:
            self._events.append(Tokens(seq.request.request_id, seq.index, (), held))
        was_running = seq.status is Status.RUNNING
        seq.status = Status.ENDED
        if was_running:
            self._running.remove(seq)
            if seq.num_in_flight:
                self._ending.append(seq)
            else:
                self._give_back(seq)
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        asked = seq.sampling.prompt_logprobs is not None
        self._events.append(
            Finished(
                request_id=seq.request.request_id,
                index=seq.index,
                reason=reason,
                stop_reason=stop_reason,
                num_prompt_tokens=seq.num_prompt_tokens,
                num_output_tokens=seq.num_output_tokens,
                num_cached_tokens=seq.num_cached_tokens or 0,
                seed=seq.seed,
                speculation=seq.acceptance.stats(),
                prompt_logprobs=(None, *seq.prompt_logprobs) if asked else None,
            )
        )

    def _publish(self, seq: Sequence) -> None:
        """Offer the blocks that are now full of committed tokens to later prompts."""
        if not self.limits.prefix_caching:
            return
        size = self.pool.block_size
        full = seq.num_computed // size
        if full > seq.num_published:
            names = seq.names(size, full)
            for i in range(seq.num_published, full):
                self.pool.publish(seq.block_ids[i], names[i])
            seq.num_published = full


def _waits_for_leader(seq: Sequence) -> bool:
    """A sibling waits until the first answer has computed the prompt, to share its blocks."""
    leader = seq.leader
    return (
        leader is not None
        and leader.status is not Status.ENDED
        and leader.num_computed < leader.num_prompt_tokens
        and leader.num_output_tokens == 0
    )


def _best(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    if len(logprobs.top) <= count:
        return logprobs
    top = logprobs.top[:count]
    return TokenLogprobs(logprobs.token_id, logprobs.logprob, logprobs.rank, top)
