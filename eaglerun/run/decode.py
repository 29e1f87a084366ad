"""The decode part of a step, in moves that can each be captured as a graph:

    target   forward over num_drafts + 1 rows a sequence, with aux capture
    accept   drafts judged, lengths and newest tokens moved on, on the device
    fill     the draft's KV filled with the tokens that became certain
    propose  num_propose draft passes

The first three are of a K_in (num_drafts), the last of a K_out (num_propose): what it reads lies at
addresses that depend on the batch size alone. So the graphs of all K are a sum and no product.
Without a draft there are two moves.
"""

from dataclasses import dataclass

from torch import Tensor

from eaglerun.kernels.accept import move_on
from eaglerun.kernels.draft_inputs import verify_inputs
from eaglerun.kernels.launch import invariant
from eaglerun.kernels.rows import Newest, Rows
from eaglerun.plan.step import StepPlan
from eaglerun.run.buffers import StepBuffers
from eaglerun.run.graphs import Graphs
from eaglerun.run.parts import Parts
from eaglerun.run.pending import AuxRows, Clock, Decoded
from eaglerun.sampling import Features, logprobs_of
from eaglerun.speculative.drafter import Asked, Drafter, Filled
from eaglerun.speculative.verify import Drafts
from eaglerun.staging import to_host

# Above so many verify rows launches are cheap beside the work, and graphs only cost memory.
MAX_CAPTURED_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Forward:
    """What the target move leaves for the moves after it: B sequences of Q rows."""

    logits: Tensor  # [B, Q, V]
    drafts: Tensor  # [B, Q - 1]
    kv_slots: Tensor  # [B * Q]
    positions: Tensor  # [B, Q]
    length: Tensor  # [B], before the step


class Decode:
    """Runs the decode rows of plans."""

    def __init__(self, parts: Parts, progress: bool | None = False) -> None:
        """``progress``: whether a line is drawn while a graph is captured."""
        options, state = parts.options, parts.state
        self._parts = parts
        self.buffers = StepBuffers(
            options.max_batch,
            options.num_draft_tokens,
            state.block_table.shape[1],
            state.padding_slot,
            parts.device,
        )
        self.graphs = Graphs(
            parts.device, options.capture, self.buffers.blank, options.graph_bytes, progress
        )

    def run(self, plan: StepPlan, aux: list[AuxRows], clock: Clock) -> Decoded:
        """``aux`` takes the captured hidden states, where they are kept."""
        parts, rows, buffers, graphs = self._parts, plan.decode, self.buffers, self.graphs
        B, Q = self._batch_size(len(rows)), plan.num_drafts + 1
        buffers.fill(rows, B)
        bound = self._key_bound(max(row.max_len + row.num_drafts for row in rows))
        features = parts.state.sampling.features([row.slot_id for row in rows])
        capture = B * Q <= MAX_CAPTURED_ROWS
        shape = (B, Q, bound)
        clock.start()
        forward = graphs.run(("target", *shape), lambda: self._target(B, Q, bound), capture)
        final = graphs.run(
            ("accept", *shape, features), lambda: self._accept(forward, features), capture
        )
        clock.target_done()
        if parts.options.keep_aux and parts.aux is not None:
            self._keep_aux(plan, forward.positions, parts.aux, aux)
        if (drafter := parts.drafter) is not None:
            proposes = plan.num_propose > 0
            newest = graphs.run(
                ("fill", *shape, proposes), lambda: self._fill(drafter, forward, proposes), capture
            )
            if proposes:
                self._run_propose(drafter, plan, newest, bound, features, capture)
        clock.draft_done()
        logprobs = None
        if plan.num_logprobs >= 0:
            chosen = final if parts.options.processed_logprobs else forward.logits
            flat = chosen[: len(rows)].flatten(0, 1)
            tokens = buffers.emitted.tokens[: len(rows), :Q].flatten()
            logprobs = logprobs_of(flat, tokens, plan.num_logprobs).leaving()
        return Decoded(*buffers.results(), logprobs)

    def _target(self, B: int, Q: int, max_seq_len: int) -> _Forward:
        """Rows [last token, drafts] of each sequence through the target, aux captured."""
        parts, state, buffers = self._parts, self._parts.state, self.buffers
        table = buffers.block_table
        ids, positions, kv_slots, seq_lens, length = verify_inputs(
            buffers.slots,
            buffers.num_drafts,
            state.by_slot,
            table,
            parts.options.block_size,
            Q,
        )
        rows = Rows(positions.view(-1), kv_slots.view(-1), table, seq_lens, max_seq_len)
        # The target alone, here and in prefill: a draft's bits decide no token.
        with invariant(parts.options.batch_invariant):
            hidden = parts.target(
                ids.view(-1), rows, parts.target_kv, parts.aux, buffers.num_experts
            )
            logits = parts.head.logits(hidden).view(B, Q, -1)
        drafts = state.draft_tokens[buffers.slots, : Q - 1]
        return _Forward(logits, drafts, kv_slots.view(-1), positions, length)

    def _accept(self, forward: _Forward, features: Features) -> Tensor:
        """Judge the drafts and move the sequences on; what was chosen from [B, Q, V]."""
        parts, state, buffers = self._parts, self._parts.state, self.buffers
        slots, drafter = buffers.slots, parts.drafter
        probs = None if drafter is None else drafter.probs(slots, forward.drafts.shape[1])
        drafts = Drafts(forward.drafts, buffers.num_drafts, probs)
        rows = state.sampling.rows(slots, features)
        emitted, final = parts.judge.judge(forward.logits, drafts, forward.length, rows)
        move_on(slots, emitted, state.by_slot, state.sampling.num_generated, buffers.emitted)
        if features.penalties:
            state.sampling.count_tokens(slots, emitted.tokens)
        return final

    def _fill(self, drafter: Drafter, forward: _Forward, proposes: bool) -> Newest:
        """The draft's KV of what was emitted, and where the drafting begins."""
        buffers, Q = self.buffers, forward.positions.shape[1]
        filled = Filled(
            emitted=buffers.emitted.tokens[:, :Q],
            accepted=buffers.emitted.accepted,
            start=forward.length,
            kv_slots=forward.kv_slots,
            slots=buffers.slots,
            num_propose=buffers.num_propose,
            block_table=buffers.block_table,
        )
        return drafter.fill(filled, proposes)

    def _run_propose(
        self,
        drafter: Drafter,
        plan: StepPlan,
        newest: Newest,
        bound: int,
        features: Features,
        capture: bool,
    ) -> None:
        """Draft after the newest token of each sequence, and remember the drafts by slot."""
        parts, buffers, count = self._parts, self.buffers, plan.num_propose

        def propose() -> None:
            asked = Asked(newest, buffers.num_propose, buffers.block_table, bound + 1)
            rows = parts.state.sampling.rows(buffers.slots, features)
            drafts = drafter.propose(asked, count, rows)
            drafts = parts.judge.drafted(drafts, buffers.slots, newest.positions)
            parts.state.draft_tokens[buffers.slots, :count] = buffers.drafts[:, :count] = drafts

        sampled = drafter.sampling(features)
        self.graphs.run(("propose", len(buffers.slots), bound, count, sampled), propose, capture)

    def _batch_size(self, num_rows: int) -> int:
        """The smallest decode batch size that holds the rows; their own number if none does."""
        sizes = self._parts.options.decode_batch_sizes
        return min((n for n in sizes if n >= num_rows), default=num_rows)

    def _key_bound(self, max_seq_len: int) -> int:
        """Upper bound of the keys a row sees.

        Without graphs: ``max_seq_len``. With graphs one of two bounds, so that a batch size needs
        two graphs and not one for each length: the keys that are all selected, or max_model_len.
        """
        limit = self._parts.options.max_model_len
        if self.graphs.enabled:
            spec = self._parts.target.spec
            all_selected = spec.sparse_topk_blocks * spec.sparse_block_size
            return min(all_selected if max_seq_len <= all_selected else limit, limit)
        return min(max_seq_len, limit)

    def _keep_aux(
        self, plan: StepPlan, positions: Tensor, aux: Tensor, kept: list[AuxRows]
    ) -> None:
        Q, starts = positions.shape[1], to_host(positions[:, 0])
        for b, row in enumerate(plan.decode):
            hidden = aux[:, b * Q : b * Q + row.num_drafts + 1].clone()
            kept.append(AuxRows(row.slot_id, -1, hidden, arriving=starts[b]))
