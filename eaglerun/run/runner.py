"""One rank: launch(StepPlan) -> PendingStep, whose result() is the StepResult.

The plan's admissions and blocks enter DeviceState, then the decode part runs in three moves:

    target     forward over num_drafts + 1 rows a sequence, with aux capture
    accept     drafts judged, lengths and newest tokens moved on, on the device
    draft      its KV filled with the tokens that became certain, then num_propose passes

The decode part runs first; each prefill part follows in launches of its own, so that a decode
row's bits do not depend on it. Nothing here waits for the device: the result does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.kernels.accept import move_on, window
from eaglerun.kernels.carry import store_carry
from eaglerun.kernels.draft_inputs import kv_slots_of, newest_inputs, verify_inputs
from eaglerun.kernels.launch import invariant, overlapping
from eaglerun.kernels.rows import Newest, Rows
from eaglerun.messages import MAX_STOP_IDS, SamplingParams
from eaglerun.models.attention import DraftKV, KVRegion, TargetKV
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import PrefillChunk, StepPlan
from eaglerun.run.buffers import DeviceState, StepBuffers, host_tensor, to_host
from eaglerun.run.graphs import Graphs
from eaglerun.run.pending import (
    AuxRows,
    Clock,
    Decoded,
    PendingStep,
    Prefilled,
    PromptLogprobs,
)
from eaglerun.sampling import (
    Features,
    LogprobRows,
    SlotRows,
    adjust,
    draw,
    filtered,
    logprobs_of,
)
from eaglerun.speculative.eagle3 import Sampler, fill_accepted, propose
from eaglerun.speculative.verify import Drafts, verify

# Above so many verify rows launches are cheap beside the work, and graphs only cost memory.
MAX_CAPTURED_ROWS = 512


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a rank must know besides its models.

    kv_dtype        of K and V of both models;  index_dtype  of the indexer's keys
    max_rows        rows of the largest forward
    synthetic       conditional acceptance rates by position; empty: judge by the target
    keep_aux        hand the captured hidden states out with each result
    graph_bytes     captured moves may hold so much; None: as much as they like
    """

    num_slots: int
    num_blocks: int
    block_size: int
    kv_dtype: torch.dtype
    index_dtype: torch.dtype
    max_model_len: int
    max_rows: int
    num_draft_tokens: int
    eos_token_ids: tuple[int, ...]
    rejection: bool
    probabilistic_drafts: bool
    synthetic: tuple[float, ...]
    processed_logprobs: bool
    decode_batch_sizes: tuple[int, ...]
    capture: bool
    graph_bytes: int | None
    overlap_kernels: bool
    batch_invariant: bool
    scripted_drafts: bool
    scripted_tokens: bool
    keep_aux: bool


@dataclass(frozen=True, slots=True)
class _Forward:
    """What the target move leaves for the moves after it: B sequences of Q rows."""

    logits: Tensor  # [B, Q, V]
    drafts: Tensor  # [B, Q - 1]
    kv_slots: Tensor  # [B * Q]
    positions: Tensor  # [B, Q]
    length: Tensor  # [B], before the step
    table: Tensor  # [B, M]


class Runner:
    """Holds the models, their KV memory and the DeviceState of one rank."""

    def __init__(
        self,
        target: MiniMaxM3,
        draft: Eagle3Llama | None,
        options: RunnerOptions,
        progress: bool | None = False,
    ) -> None:
        """``progress``: whether a line is drawn while a graph is captured."""
        self.target = target
        self.draft = draft
        self.options = options
        weight = target.embed_tokens.weight
        self.device, dtype = weight.device, weight.dtype
        size = (options.num_blocks, options.block_size, self.device, options.kv_dtype)
        self.target_kv = TargetKV.allocate(target.spec, *size, options.index_dtype)
        self.draft_kv: DraftKV | None = None
        self.block_carry: Tensor | None = None
        self.aux: Tensor | None = None
        hidden = target.spec.hidden_size
        if draft is not None or options.keep_aux:
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
            script_len=options.max_model_len + options.num_draft_tokens
            if options.scripted_drafts or options.scripted_tokens
            else 0,
            vocab_size=target.spec.vocab_size,
            max_stop_ids=MAX_STOP_IDS + len(options.eos_token_ids),
            device=self.device,
            dtype=dtype,
        )
        self.synthetic: Tensor | None = None
        if options.synthetic:
            rates = torch.tensor(options.synthetic, dtype=torch.float64)
            self.synthetic = rates.to(self.device)
        self.buffers = StepBuffers(
            max(options.num_slots, *options.decode_batch_sizes, 1),
            options.num_draft_tokens,
            self.state.padding_slot,
            self.device,
        )
        # The step being launched, for whoever watches the forwards.
        self.plan: StepPlan | None = None
        self.graphs = Graphs(
            self.device, options.capture, self.buffers.blank, options.graph_bytes, progress
        )

    def kv_regions(self) -> tuple[KVRegion, ...]:
        """Every memory that holds something for each block: what a transfer of blocks must move."""
        regions = self.target_kv.regions()
        if self.draft_kv is not None and self.block_carry is not None:
            regions += self.draft_kv.regions()
            regions += (KVRegion("draft.carry", self.block_carry, "dim"),)
        return regions

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step. Plans must come in the order they were made."""
        with overlapping(self.options.overlap_kernels):
            return self._launch(plan)

    def _launch(self, plan: StepPlan) -> PendingStep:
        self.plan = plan
        for admission in plan.admissions:
            self.state.admit(admission, self.options.eos_token_ids, self.block_carry)
        for update in plan.blocks:
            self.state.set_blocks(update)
        aux: list[AuxRows] = []
        clock = Clock(self.device)
        decoded = self._decode(plan, aux, clock) if plan.decode else None
        prefilled = self._prefill(plan, aux, clock) if plan.prefill else None
        clock.end()
        return PendingStep(plan, decoded, prefilled, aux, clock)

    # Decode part.

    def _decode(self, plan: StepPlan, aux: list[AuxRows], clock: Clock) -> Decoded:
        """Three moves, each a graph of its own where graphs are on."""
        rows, buffers = plan.decode, self.buffers
        B, Q = self._batch_size(len(rows)), plan.num_drafts + 1
        buffers.fill(rows, B)
        bound = self._key_bound(max(row.max_len + row.num_drafts for row in rows))
        features = self._features([row.slot_id for row in rows])
        shape = (B, Q, bound)
        capture = B * Q <= MAX_CAPTURED_ROWS
        clock.start()
        forward = self.graphs.run(
            ("target", *shape), lambda: self._target_move(B, Q, bound), capture
        )
        scored = self.graphs.run(
            ("accept", *shape, features), lambda: self._accept_move(forward, features), capture
        )
        clock.target_done()
        if self.options.keep_aux and self.aux is not None:
            self._keep_decode_aux(plan, forward.positions, Q, aux)
        if self.draft is not None:
            sampled = features if self.options.probabilistic_drafts else None
            self.graphs.run(
                ("draft", *shape, plan.num_propose, sampled),
                lambda: self._draft_move(forward, plan.num_propose, bound, features),
                capture,
            )
        clock.draft_done()
        logprobs = None
        if plan.num_logprobs >= 0:
            chosen = scored if self.options.processed_logprobs else forward.logits
            flat = chosen[: len(rows)].flatten(0, 1)
            tokens = buffers.emitted[: len(rows), :Q].flatten()
            logprobs = logprobs_of(flat, tokens, plan.num_logprobs)
        return Decoded(*buffers.results(), logprobs)

    def _target_move(self, B: int, Q: int, max_seq_len: int) -> _Forward:
        """Rows [last token, drafts] of each sequence through the target, aux captured."""
        state, buffers = self.state, self.buffers
        slots = buffers.slots
        ids, positions, kv_slots, seq_lens, length, table = verify_inputs(
            slots,
            buffers.num_drafts,
            state.length,
            state.last_token,
            state.draft_tokens,
            state.block_table,
            self.options.block_size,
            Q,
        )
        rows = Rows(positions.view(-1), kv_slots.view(-1), table, seq_lens, max_seq_len)
        # The target alone, here and in prefill: a draft's bits decide no token.
        with invariant(self.options.batch_invariant):
            hidden = self.target(ids.view(-1), rows, self.target_kv, self.aux, buffers.num_experts)
            logits = self.target.logits(hidden).view(B, Q, -1)
        # Rows of padding have no keys, and so no numbers.
        sizes = magnitudes(hidden).masked_fill_(positions.view(-1) < 0, 0.0)
        buffers.broken.copy_(not_finite(sizes.view(B, Q).amax(dim=1)))
        drafts = state.draft_tokens[slots, : Q - 1]
        return _Forward(logits, drafts, kv_slots.view(-1), positions, length, table)

    def _accept_move(self, forward: _Forward, features: Features) -> Tensor:
        """Judge the drafts and move the sequences on; the logits as scored [B, Q, V]."""
        state, buffers, options = self.state, self.buffers, self.options
        Q, slots = forward.logits.shape[1], buffers.slots
        probs = None if state.draft_probs is None else state.draft_probs[slots, : Q - 1]
        verified = verify(
            forward.logits,
            Drafts(forward.drafts, buffers.num_drafts, probs),
            forward.length,
            state.sampling.rows(slots, features),
            options.rejection,
            self.synthetic,
            self._scripted(slots, forward.length, Q) if options.scripted_tokens else None,
        )
        move_on(
            verified.emitted,
            verified.accepted,
            slots,
            state.length,
            state.last_token,
            state.sampling.num_generated,
            buffers.emitted,
            buffers.accepted,
        )
        if features.penalties:
            state.sampling.count_tokens(slots, verified.emitted)
        return verified.scored

    def _draft_move(
        self, forward: _Forward, num_passes: int, max_seq_len: int, features: Features
    ) -> None:
        """Fill the draft's KV with what was emitted, then draft from the newest token of each."""
        assert self.draft is not None and self.draft_kv is not None
        state, buffers = self.state, self.buffers
        B, Q = forward.positions.shape
        fed = self._combine(B * Q, forward.kv_slots)
        fill_accepted(
            self.draft,
            self.draft_kv.layer,
            buffers.emitted[:, :Q],
            fed,
            forward.length,
            forward.table,
        )
        if num_passes:
            newest = newest_inputs(
                buffers.slots,
                buffers.accepted,
                buffers.num_propose,
                state.length,
                state.last_token,
                fed,
            )
            rows = state.sampling.rows(buffers.slots, features)
            buffers.drafts[:, :num_passes] = self._propose(
                newest, buffers.num_propose, num_passes, forward.table, max_seq_len + 1, rows
            )

    def _batch_size(self, num_rows: int) -> int:
        """The smallest decode batch size that holds the rows; their own number if none does."""
        return min((n for n in self.options.decode_batch_sizes if n >= num_rows), default=num_rows)

    def _key_bound(self, max_seq_len: int) -> int:
        """Upper bound of the keys a row sees.

        Exact where it shapes tensors; one of two values where it would multiply graphs: every
        block is selected, or not.
        """
        limit = self.options.max_model_len
        if self.graphs.enabled:
            spec = self.target.spec
            all_selected = spec.sparse_topk_blocks * spec.sparse_block_size
            return min(all_selected if max_seq_len <= all_selected else limit, limit)
        return min(max_seq_len, limit)

    # Prefill part.

    def _prefill(self, plan: StepPlan, aux: list[AuxRows], clock: Clock) -> Prefilled:
        chunks = plan.prefill
        clock.start()
        rows = self._prefill_rows(chunks)
        ids = host_tensor([t for c in chunks for t in c.token_ids], self.device)
        ends = host_tensor([end - 1 for end in _running_sum(chunks)[1:]], self.device)
        final = [i for i, c in enumerate(chunks) if c.samples]
        with invariant(self.options.batch_invariant):
            hidden = self.target(ids, rows, self.target_kv, self.aux, None)
            prompt = self._prompt_logprobs(chunks, hidden)
            sampled, logprobs = self._sample_prefill(plan, final, hidden, ends)
        assert rows.cu_seqlens is not None  # ragged
        owners = torch.bucketize(
            torch.arange(len(ids), device=self.device), rows.cu_seqlens[1:], right=True
        )
        broken = torch.zeros(len(chunks), dtype=torch.int64, device=self.device)
        broken.index_add_(0, owners, not_finite(magnitudes(hidden)).long())
        clock.target_done()
        if self.options.keep_aux and self.aux is not None:
            for c, start in zip(chunks, _running_sum(chunks), strict=False):
                kept = self.aux[:, start : start + len(c.token_ids)].clone()
                aux.append(AuxRows(c.slot_id, c.start, kept))
        drafts = None
        if self.draft is not None:
            drafts = self._prefill_draft(plan, final, rows, ids, ends, sampled)
        clock.draft_done()
        told = None if drafts is None else to_host(drafts)
        return Prefilled(to_host(sampled), to_host(broken), logprobs, prompt, told)

    def _prefill_rows(self, chunks: tuple[PrefillChunk, ...]) -> Rows:
        device, sums = self.device, _running_sum(chunks)
        positions = host_tensor([p for c in chunks for p in range(c.start, c.end)], device)
        q_lens = tuple(len(c.token_ids) for c in chunks)
        seq_ids = host_tensor([i for i, n in enumerate(q_lens) for _ in range(n)], device)
        table = self.state.block_table[host_tensor([c.slot_id for c in chunks], device)]
        slots = kv_slots_of(positions[:, None], table[seq_ids], self.options.block_size)
        return Rows(
            positions=positions,
            kv_slots=slots[:, 0],
            block_tables=table,
            seq_lens=host_tensor([c.end for c in chunks], device).int(),
            max_seq_len=max(c.end for c in chunks),
            cu_seqlens=host_tensor(sums, device).int(),
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
        slots = host_tensor([c.slot_id for c in chunks], self.device)
        length = host_tensor([c.end for c in chunks], self.device)
        features = self._features([c.slot_id for c in chunks])
        last = ends[host_tensor(final, self.device)]
        logits = self.target.logits(hidden[last])[:, None]
        none = logits.new_zeros(len(final), 0, dtype=torch.int64)
        rows = state.sampling.rows(slots, features)
        adjusted = adjust(logits, rows, none)
        logp = filtered(adjusted, rows) if features.sampled else None
        sampled = draw(adjusted, logp, rows, length[:, None])[:, 0]
        if self.options.scripted_tokens:
            sampled = self._scripted(slots, length, 1)[:, 0]
        state.length[slots] = length + 1
        state.last_token[slots] = sampled
        state.sampling.add_tokens(slots, sampled[:, None], features.penalties)
        if plan.num_logprobs < 0:
            return sampled, None
        scored = adjusted if logp is None else logp
        chosen = scored[:, 0] if self.options.processed_logprobs else logits[:, 0]
        return sampled, logprobs_of(chosen, sampled, plan.num_logprobs)

    def _prompt_logprobs(
        self, chunks: tuple[PrefillChunk, ...], hidden: Tensor
    ) -> list[PromptLogprobs | None]:
        """For each chunk that asks: log-probabilities of the known token after each of its rows."""
        found: list[PromptLogprobs | None] = []
        for c, start in zip(chunks, _running_sum(chunks), strict=False):
            if c.prompt_logprobs < 0:
                found.append(None)
                continue
            after = c.token_ids[1:] + (() if c.samples else (c.next_token,))
            tokens = host_tensor(after, self.device)
            # A slice at a time: the logits of a whole chunk can be gigabytes.
            parts = [
                logprobs_of(
                    self.target.logits(hidden[start + i : start + min(i + 256, len(after))]),
                    tokens[i : i + 256],
                    c.prompt_logprobs,
                )
                for i in range(0, len(after), 256)
            ]
            found.append((parts, after))
        return found

    def _prefill_draft(
        self,
        plan: StepPlan,
        final: list[int],
        rows: Rows,
        ids: Tensor,
        ends: Tensor,
        sampled: Tensor,
    ) -> Tensor | None:
        """Draft KV of the chunks' rows, each with fc(aux) of the position before it; the drafts
        after each final chunk [final, passes], or None where none is made.

        The first row takes the carry that its chunk, block or preemption left behind; position 0
        has no draft row. The sampled token's row is filled too and proposes.
        """
        draft, carry, sums = self.draft, self.state.carry, rows.cu_seqlens
        assert draft is not None and self.draft_kv is not None
        assert carry is not None and sums is not None
        kv = self.draft_kv.layer
        chunks = plan.prefill
        fed = self._combine(ids.shape[0], rows.kv_slots)
        slots = host_tensor([c.slot_id for c in chunks], self.device)
        before = torch.cat([fed[:1], fed[:-1]])
        before[sums[:-1].long()] = carry[slots]
        has_row = rows.positions > 0
        draft.fill_kv(
            ids,
            before,
            torch.where(has_row, rows.positions, -1),
            torch.where(has_row, rows.kv_slots, -1),
            kv,
        )
        carry[slots] = fed[ends]
        if not final:
            return None
        proposing = [chunks[i] for i in final]
        which = host_tensor(final, self.device)
        slots = slots[which]
        length = host_tensor([c.end for c in proposing], self.device)
        table = self.state.block_table[slots]
        fed = fed[ends[which]]
        fill_accepted(draft, kv, sampled[:, None], fed, length, table)
        if num_passes := max(c.num_propose for c in proposing):
            num_propose = host_tensor([c.num_propose for c in proposing], self.device)
            features = self._features([c.slot_id for c in proposing])
            return self._propose(
                Newest(sampled, length, fed),
                num_propose,
                num_passes,
                table,
                max(c.end for c in proposing) + 1,
                self.state.sampling.rows(slots, features),
            )
        return None

    # Both parts.

    def _combine(self, num_rows: int, kv_slots: Tensor) -> Tensor:
        """fc(aux) of the target's rows [num_rows, H]; the last of each block becomes its carry."""
        assert self.draft is not None and self.aux is not None and self.block_carry is not None
        fed = self.draft.combine(self.aux[:, :num_rows])
        store_carry(fed, kv_slots, self.block_carry, self.options.block_size)
        return fed

    def _propose(
        self,
        newest: Newest,
        num_propose: Tensor,
        num_passes: int,
        table: Tensor,
        max_seq_len: int,
        rows: SlotRows,
    ) -> Tensor:
        """Draft after the newest tokens and remember the drafts by slot: [B, num_passes]."""
        assert self.draft is not None and self.draft_kv is not None
        slots, sampler = rows.slots, None
        if self.options.probabilistic_drafts and rows.features.sampled:
            sampler = Sampler(rows, self.options.rejection)
        drafts, probs = propose(
            self.draft,
            self.draft_kv.layer,
            newest,
            num_propose,
            num_passes,
            table,
            min(max_seq_len, self.options.max_model_len),
            sampler,
        )
        if self.options.scripted_drafts or self.options.scripted_tokens:
            drafts = self._scripted(slots, newest.positions + 1, num_passes)
        self.state.draft_tokens[slots, :num_passes] = drafts
        if probs is not None and self.state.draft_probs is not None:
            self.state.draft_probs[slots, :num_passes] = probs.float()
        return drafts

    def _scripted(self, slots: Tensor, start: Tensor, count: int) -> Tensor:
        """``count`` tokens of the script from position ``start`` [B] on: [B, count]."""
        assert self.state.script is not None
        return window(self.state.script, slots, start, count)

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


def magnitudes(hidden: Tensor) -> Tensor:
    """The largest magnitude [N] in each row of hidden states [N, H]; NaN or Inf where the row has
    one. One of either anywhere before, in any layer, shows in the last layer's rows."""
    largest: Tensor = torch.linalg.vector_norm(hidden, float("inf"), dim=-1)
    return largest


def not_finite(values: Tensor) -> Tensor:
    """True for each value that is NaN or Inf, for x - x is 0 for any other. It takes two launches
    on a GPU, where isfinite() takes four."""
    return (values - values) != 0


def _running_sum(chunks: tuple[PrefillChunk, ...]) -> list[int]:
    sums = [0]
    for c in chunks:
        sums.append(sums[-1] + len(c.token_ids))
    return sums
