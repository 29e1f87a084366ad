"""One rank: run(StepPlan) -> StepResult, in five moves.

    fill       the plan's admissions and blocks enter DeviceState; the rows of the step stand
    target     forward over num_drafts + 1 rows a sequence, with aux capture
    accept     drafts judged, lengths and newest tokens moved on, on the device
    fill KV    the draft's keys and values of the tokens that became certain
    propose    num_propose draft passes, one row a sequence

The decode part runs first; each prefill part follows in launches of its own, so that a decode
row's bits do not depend on it. Nothing here waits for the device: the result does.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.batch import DecodeInputs, DeviceState
from eaglerun.kernels.reference.carry import store_carry
from eaglerun.kernels.reference.draft_inputs import kv_slots_of, verify_inputs
from eaglerun.messages import SamplingParams, TokenLogprobs
from eaglerun.models.attention import AttentionBatch, DraftKV, TargetKV
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.sampling import Features, LogprobRows, adjust, draw, filtered, logprobs_of
from eaglerun.speculative.eagle3 import Sampler, fill_accepted, propose
from eaglerun.speculative.verify import verify
from eaglerun.step import PrefillChunk, StepPlan, StepResult, StepTimes


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a rank must know besides its models.

    max_rows        rows of the largest forward
    synthetic       conditional acceptance rates by position; empty: judge by the target
    keep_aux        hand the captured hidden states out with each result
    """

    num_slots: int
    num_blocks: int
    block_size: int
    max_model_len: int
    max_rows: int
    num_draft_tokens: int
    eos_token_ids: tuple[int, ...]
    rejection: bool
    probabilistic_drafts: bool
    synthetic: tuple[float, ...]
    processed_logprobs: bool
    decode_batch_sizes: tuple[int, ...]
    keep_aux: bool


@dataclass(slots=True)
class AuxRows:
    """Captured hidden states [num_taps, n, H] of positions ``start`` ... of the sequence in a slot.

    Of a decode row all verified positions are here; the first num_accepted + 1 are the text's.
    """

    slot_id: int
    start: int
    hidden: Tensor


@dataclass(slots=True)
class _Decoded:
    emitted: Tensor
    accepted: Tensor
    logprobs: LogprobRows | None


@dataclass(slots=True)
class _Prefilled:
    sampled: Tensor
    logprobs: LogprobRows | None
    prompt: list[tuple[LogprobRows, tuple[int, ...]] | None]


class PendingStep:
    """A launched step. ``result`` waits for the device."""

    def __init__(
        self,
        plan: StepPlan,
        decoded: _Decoded | None,
        prefilled: _Prefilled | None,
        num_experts: Tensor,
        aux: list[AuxRows],
        times: StepTimes,
    ) -> None:
        self.plan = plan
        self.aux = aux
        self._decoded = decoded
        self._prefilled = prefilled
        self._num_experts = num_experts
        self._times = times

    def result(self) -> StepResult:
        plan = self.plan
        decode: tuple[tuple[int, ...], ...] = ()
        accepted: tuple[int, ...] = ()
        decode_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if self._decoded is not None:
            rows = self._decoded.emitted[: len(plan.decode)].tolist()
            decode = tuple(tuple(t for t in row if t >= 0) for row in rows)
            accepted = tuple(self._decoded.accepted[: len(plan.decode)].tolist())
            if self._decoded.logprobs is not None:
                width = len(rows[0])
                flat = _to_host(self._decoded.logprobs, [t for row in rows for t in row])
                decode_logprobs = tuple(
                    tuple(flat[b * width : b * width + len(ids)]) for b, ids in enumerate(decode)
                )
        prefill: tuple[int, ...] = ()
        prefill_logprobs: tuple[TokenLogprobs | None, ...] = ()
        prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
        if self._prefilled is not None:
            tokens = iter(self._prefilled.sampled.tolist())
            prefill = tuple(next(tokens) if c.samples else -1 for c in plan.prefill)
            if self._prefilled.logprobs is not None:
                ids = [t for t in prefill if t >= 0]
                flat_one = iter(_to_host(self._prefilled.logprobs, ids))
                prefill_logprobs = tuple(
                    next(flat_one) if c.samples else None for c in plan.prefill
                )
            prompt_logprobs = tuple(
                () if asked is None else tuple(_to_host(asked[0], list(asked[1])))
                for asked in self._prefilled.prompt
            )
        return StepResult(
            step_id=plan.step_id,
            decode=decode,
            num_accepted=accepted,
            prefill=prefill,
            decode_logprobs=decode_logprobs,
            prefill_logprobs=prefill_logprobs,
            prompt_logprobs=prompt_logprobs,
            num_experts=int(self._num_experts),
            times=self._times,
        )


class Runner:
    """Holds the models, their KV memory and the DeviceState of one rank."""

    def __init__(
        self, target: MiniMaxM3, draft: Eagle3Llama | None, options: RunnerOptions
    ) -> None:
        self.target = target
        self.draft = draft
        self.options = options
        weight = target.embed_tokens.weight
        self.device, dtype = weight.device, weight.dtype
        size = (options.num_blocks, options.block_size, self.device, dtype)
        self.target_kv = TargetKV.allocate(target.spec, *size)
        self.draft_kv: DraftKV | None = None
        self.block_carry: Tensor | None = None
        self.aux: Tensor | None = None
        hidden = target.spec.hidden_size
        if target.taps:
            self.aux = torch.empty(
                len(target.taps), options.max_rows, hidden, device=self.device, dtype=dtype
            )
        if draft is not None:
            self.draft_kv = DraftKV.allocate(draft.spec, *size)
            self.block_carry = torch.empty(
                options.num_blocks, draft.spec.hidden_size, device=self.device, dtype=dtype
            )
        self.state = DeviceState(
            num_slots=options.num_slots,
            max_blocks=-(-options.max_model_len // options.block_size),
            num_draft_tokens=options.num_draft_tokens,
            draft_hidden_size=None if draft is None else draft.spec.hidden_size,
            keeps_draft_probs=options.rejection and options.probabilistic_drafts,
            vocab_size=target.spec.vocab_size,
            device=self.device,
            dtype=dtype,
        )
        self.num_experts = torch.zeros(1, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step. Plans must come in the order they were made."""
        begin = time.perf_counter()
        for admission in plan.admissions:
            self.state.admit(admission, self.options.eos_token_ids, self.block_carry)
        for update in plan.blocks:
            self.state.set_blocks(update)
        self.num_experts.zero_()
        aux: list[AuxRows] = []
        clock = _Clock()
        decoded = self._decode(plan, aux, clock) if plan.decode else None
        experts = self.num_experts.clone()
        prefilled = self._prefill(plan, aux, clock) if plan.prefill else None
        times = StepTimes(
            target_ms=clock.target * 1e3,
            draft_ms=clock.draft * 1e3,
            total_ms=(time.perf_counter() - begin) * 1e3,
        )
        return PendingStep(plan, decoded, prefilled, experts, aux, times)

    # Decode part.

    def _decode(self, plan: StepPlan, aux: list[AuxRows], clock: "_Clock") -> _Decoded:
        state, options = self.state, self.options
        inputs = self._decode_inputs(plan)
        B, Q = inputs.slots.shape[0], plan.num_drafts + 1
        length = state.length[inputs.slots]
        drafts = state.draft_tokens[inputs.slots, : Q - 1]
        table = state.block_table[inputs.slots]
        ids, positions, kv_slots, seq_lens = verify_inputs(
            length,
            state.last_token[inputs.slots],
            drafts,
            inputs.num_drafts,
            table,
            options.block_size,
            Q,
        )
        batch = AttentionBatch(
            positions=positions.view(-1),
            kv_slots=kv_slots.view(-1),
            seq_ids=torch.arange(B, device=self.device).repeat_interleave(Q),
            block_tables=table,
            cu_seqlens_q=torch.arange(0, B * Q + 1, Q, dtype=torch.int32, device=self.device),
            seq_lens=seq_lens,
            max_q_len=Q,
            max_seq_len=inputs.max_seq_len,
            uniform=True,
            q_lens=(Q,) * B,
        )
        clock.start()
        hidden = self.target(ids.view(-1), batch, self.target_kv, self.aux, self.num_experts)
        logits = self.target.logits(hidden).view(B, Q, -1)
        features = self._features([row.slot_id for row in plan.decode])
        verified = verify(
            logits,
            drafts,
            None if state.draft_probs is None else state.draft_probs[inputs.slots, : Q - 1],
            inputs.num_drafts,
            length,
            inputs.slots,
            state.sampling,
            features,
            options.rejection,
            options.synthetic,
        )
        emitted, accepted = verified.emitted, verified.accepted
        num_emitted = (emitted >= 0).sum(dim=1)
        state.length[inputs.slots] = length + num_emitted
        newest = emitted.gather(1, accepted[:, None])[:, 0].clamp(min=0)
        state.last_token[inputs.slots] = newest
        state.sampling.add_tokens(inputs.slots, emitted, features.penalties)
        clock.target_done()
        if options.keep_aux and self.aux is not None:
            self._keep_decode_aux(plan, positions, Q, aux)
        if self.draft is not None and self.draft_kv is not None:
            fed = self._combine(B * Q, kv_slots.view(-1))
            fill_accepted(
                self.draft, self.draft_kv, emitted, fed, length, table, options.block_size
            )
            if plan.num_propose:
                row = torch.arange(B, device=self.device) * Q + accepted
                self._propose(
                    plan.num_propose,
                    inputs.slots,
                    newest,
                    fed[row],
                    length + num_emitted - 1,
                    inputs.num_propose,
                    inputs.max_seq_len + 1,
                    features,
                )
        clock.draft_done()
        logprobs = None
        if plan.num_logprobs >= 0:
            scored = verified.scored if options.processed_logprobs else logits
            flat = scored.view(B * Q, -1)
            logprobs = logprobs_of(flat, emitted.view(-1), plan.num_logprobs)
        return _Decoded(emitted, accepted, logprobs)

    def _decode_inputs(self, plan: StepPlan) -> DecodeInputs:
        """Slots and draft counts of the decode rows, padded to the next batch size."""
        rows = plan.decode
        sizes = [n for n in self.options.decode_batch_sizes if n >= len(rows)]
        padding = min(sizes) - len(rows) if sizes else 0
        columns = torch.tensor(
            [[row.slot_id, row.num_drafts, row.num_propose] for row in rows]
            + [[self.state.padding_slot, -1, 0]] * padding
        ).to(self.device)
        return DecodeInputs(
            slots=columns[:, 0],
            num_drafts=columns[:, 1],
            num_propose=columns[:, 2],
            max_seq_len=min(
                max(row.max_len + row.num_drafts for row in rows), self.options.max_model_len
            ),
        )

    # Prefill part.

    def _prefill(self, plan: StepPlan, aux: list[AuxRows], clock: "_Clock") -> _Prefilled:
        chunks = plan.prefill
        clock.start()
        batch = self._prefill_batch(chunks)
        ids = torch.tensor([t for c in chunks for t in c.token_ids], device=self.device)
        hidden = self.target(ids, batch, self.target_kv, self.aux, None)
        ends = torch.tensor(
            [end - 1 for end in _running_sum(chunks)[1:]], dtype=torch.int64, device=self.device
        )
        prompt = self._prompt_logprobs(chunks, hidden)
        final = [i for i, c in enumerate(chunks) if c.samples]
        sampled, logprobs = self._sample_prefill(plan, final, hidden, ends)
        clock.target_done()
        if self.options.keep_aux and self.aux is not None:
            for c, start in zip(chunks, _running_sum(chunks), strict=False):
                rows = self.aux[:, start : start + len(c.token_ids)].clone()
                aux.append(AuxRows(c.slot_id, c.start, rows))
        if self.draft is not None:
            self._prefill_draft(plan, final, batch, ids, ends, sampled)
        clock.draft_done()
        return _Prefilled(sampled, logprobs, prompt)

    def _prefill_batch(self, chunks: tuple[PrefillChunk, ...]) -> AttentionBatch:
        device, sums = self.device, _running_sum(chunks)
        positions = torch.cat([torch.arange(c.start, c.end) for c in chunks]).to(device)
        q_lens = tuple(len(c.token_ids) for c in chunks)
        seq_ids = torch.repeat_interleave(torch.tensor(q_lens)).to(device)
        table = self.state.block_table[torch.tensor([c.slot_id for c in chunks], device=device)]
        slots = kv_slots_of(positions[:, None], table[seq_ids], self.options.block_size)
        return AttentionBatch(
            positions=positions,
            kv_slots=slots[:, 0],
            seq_ids=seq_ids,
            block_tables=table,
            cu_seqlens_q=torch.tensor(sums, dtype=torch.int32, device=device),
            seq_lens=torch.tensor([c.end for c in chunks], dtype=torch.int32, device=device),
            max_q_len=max(q_lens),
            max_seq_len=max(c.end for c in chunks),
            uniform=False,
            q_lens=q_lens,
        )

    def _sample_prefill(
        self, plan: StepPlan, final: list[int], hidden: Tensor, ends: Tensor
    ) -> tuple[Tensor, LogprobRows | None]:
        """The token after each final chunk; its sequence becomes a decode sequence."""
        state = self.state
        if not final:
            return torch.zeros(0, dtype=torch.int64, device=self.device), None
        chunks = [plan.prefill[i] for i in final]
        slots = torch.tensor([c.slot_id for c in chunks], device=self.device)
        length = torch.tensor([c.end for c in chunks], device=self.device)
        features = self._features([c.slot_id for c in chunks])
        logits = self.target.logits(hidden[ends[final]])[:, None]
        none = logits.new_zeros(len(final), 0, dtype=torch.int64)
        adjusted = adjust(logits, state.sampling, slots, none, features)
        logp = filtered(adjusted, state.sampling, slots, features) if features.sampled else None
        sampled = draw(adjusted, logp, state.sampling, slots, length[:, None])[:, 0]
        state.length[slots] = length + 1
        state.last_token[slots] = sampled
        state.sampling.add_tokens(slots, sampled[:, None], features.penalties)
        if plan.num_logprobs < 0:
            return sampled, None
        scored = adjusted if logp is None else logp
        rows = scored[:, 0] if self.options.processed_logprobs else logits[:, 0]
        return sampled, logprobs_of(rows, sampled, plan.num_logprobs)

    def _prompt_logprobs(
        self, chunks: tuple[PrefillChunk, ...], hidden: Tensor
    ) -> list[tuple[LogprobRows, tuple[int, ...]] | None]:
        """For each chunk that asks: log-probabilities of the known token after each of its rows."""
        found: list[tuple[LogprobRows, tuple[int, ...]] | None] = []
        for c, start in zip(chunks, _running_sum(chunks), strict=False):
            if c.prompt_logprobs < 0:
                found.append(None)
                continue
            after = c.token_ids[1:] + (() if c.samples else (c.next_token,))
            logits = self.target.logits(hidden[start : start + len(after)])
            tokens = torch.tensor(after, dtype=torch.int64, device=self.device)
            found.append((logprobs_of(logits, tokens, c.prompt_logprobs), after))
        return found

    def _prefill_draft(
        self,
        plan: StepPlan,
        final: list[int],
        batch: AttentionBatch,
        ids: Tensor,
        ends: Tensor,
        sampled: Tensor,
    ) -> None:
        """Draft KV of the chunks' rows, each with fc(aux) of the position before it.

        The first row takes the carry that its chunk, block or preemption left behind; position 0
        has no draft row. The sampled token's row is filled too and proposes.
        """
        draft, kv, carry = self.draft, self.draft_kv, self.state.carry
        assert draft is not None and kv is not None and carry is not None
        chunks = plan.prefill
        fed = self._combine(ids.shape[0], batch.kv_slots)
        slots = torch.tensor([c.slot_id for c in chunks], device=self.device)
        before = torch.cat([fed[:1], fed[:-1]])
        before[batch.cu_seqlens_q[:-1].long()] = carry[slots]
        has_row = batch.positions > 0
        draft.fill_kv(
            ids,
            before,
            torch.where(has_row, batch.positions, -1),
            torch.where(has_row, batch.kv_slots, -1),
            kv,
        )
        carry[slots] = fed[ends]
        if not final:
            return
        proposing = [chunks[i] for i in final]
        slots = slots[final]
        length = torch.tensor([c.end for c in proposing], device=self.device)
        table = self.state.block_table[slots]
        fed = fed[ends[final]]
        size = self.options.block_size
        fill_accepted(draft, kv, sampled[:, None], fed, length, table, size)
        if num_passes := max(c.num_propose for c in proposing):
            self._propose(
                num_passes,
                slots,
                sampled,
                fed,
                length,
                torch.tensor([c.num_propose for c in proposing], device=self.device),
                max(c.end for c in proposing) + 1,
                self._features([c.slot_id for c in proposing]),
            )

    # Both parts.

    def _combine(self, num_rows: int, kv_slots: Tensor) -> Tensor:
        """fc(aux) of the target's rows [num_rows, H]; the last of each block becomes its carry."""
        assert self.draft is not None and self.aux is not None and self.block_carry is not None
        fed = self.draft.combine(self.aux[:, :num_rows])
        store_carry(fed, kv_slots, self.block_carry, self.options.block_size)
        return fed

    def _propose(
        self,
        num_passes: int,
        slots: Tensor,
        tokens: Tensor,
        hidden: Tensor,
        position: Tensor,
        num_propose: Tensor,
        max_seq_len: int,
        features: Features,
    ) -> None:
        """Draft after the newest tokens and remember the drafts by slot."""
        assert self.draft is not None and self.draft_kv is not None
        sampler = None
        if self.options.probabilistic_drafts and features.sampled:
            sampler = Sampler(self.state.sampling, slots, features, self.options.rejection)
        drafts, probs = propose(
            self.draft,
            self.draft_kv,
            tokens,
            hidden,
            position,
            num_propose,
            num_passes,
            self.state.block_table[slots],
            self.options.block_size,
            min(max_seq_len, self.options.max_model_len),
            self.target.spec.vocab_size,
            sampler,
        )
        self.state.draft_tokens[slots, :num_passes] = drafts
        if probs is not None and self.state.draft_probs is not None:
            self.state.draft_probs[slots, :num_passes] = probs.float()

    def _features(self, slot_ids: list[int]) -> Features:
        params = [self.state.sampling.params[slot] for slot in slot_ids]
        return Features.of([p for p in params if isinstance(p, SamplingParams)])

    def _keep_decode_aux(
        self, plan: StepPlan, positions: Tensor, rows: int, kept: list[AuxRows]
    ) -> None:
        assert self.aux is not None
        for b, (row, start) in enumerate(zip(plan.decode, positions[:, 0].tolist(), strict=False)):
            hidden = self.aux[:, b * rows : b * rows + row.num_drafts + 1].clone()
            kept.append(AuxRows(row.slot_id, start, hidden))


class _Clock:
    """Host time of the parts of a step; on a CPU that is their run time."""

    def __init__(self) -> None:
        self.target = 0.0
        self.draft = 0.0
        self._last = 0.0

    def start(self) -> None:
        self._last = time.perf_counter()

    def target_done(self) -> None:
        now = time.perf_counter()
        self.target += now - self._last
        self._last = now

    def draft_done(self) -> None:
        now = time.perf_counter()
        self.draft += now - self._last
        self._last = now


def _running_sum(chunks: tuple[PrefillChunk, ...]) -> list[int]:
    sums = [0]
    for c in chunks:
        sums.append(sums[-1] + len(c.token_ids))
    return sums


def _to_host(rows: LogprobRows, tokens: list[int]) -> list[TokenLogprobs]:
    """One TokenLogprobs per row; rows and tokens run in parallel."""
    chosen, rank = rows.chosen.tolist(), rows.rank.tolist()
    ids, top = rows.top_ids.tolist(), rows.top.tolist()
    return [
        TokenLogprobs(token, chosen[i], rank[i], tuple(zip(ids[i], top[i], strict=True)))
        for i, token in enumerate(tokens)
    ]
