"""The decode part of a step, in moves that can each be captured as a graph:

    target   forward over num_drafts + 1 rows a sequence, with aux capture
    accept   drafts judged, lengths and newest tokens moved on, on the device
    fill     the draft's KV filled with the tokens that became certain
    propose  num_propose draft passes

The first three are of a K_in (num_drafts), the last of a K_out (num_propose): what it reads lies at
addresses that depend on the batch size alone. So the graphs of all K are a sum and no product.
Without a draft there are two moves.

Where a step may not capture, it runs as the smallest larger one that is captured: with more
sequences and rows of padding, or a higher bound of keys. Where there is none it runs uncaptured,
and either way its own moves are captured once there is nothing to do.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
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
# The sampling of most requests: greedy, with a temperature, and with top_k or top_p too.
GREEDY = Features.of([])
SAMPLED = replace(GREEDY, sampled=True)
RANKED = replace(SAMPLED, ranked=True)


class Shape(NamedTuple):
    """The size of a decode step: so many sequences, rows of each (num_drafts + 1), and an upper
    bound of the keys that a row sees."""

    batch: int
    rows: int
    bound: int

    def holds(self, other: "Shape") -> bool:
        return self.batch >= other.batch and self.rows >= other.rows and self.bound >= other.bound

    @property
    def cost(self) -> tuple[int, int]:
        return self.batch * self.rows, self.bound


class Wanted(NamedTuple):
    """A decode step whose moves are to be captured.

    features     of its sequences' sampling
    num_propose  drafts that it makes of each sequence at most
    """

    shape: Shape
    features: Features
    num_propose: int


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
        """``progress``: whether a line is drawn while a step captures a graph."""
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
            parts.device,
            options.capture,
            self.buffers.blank,
            options.graph_bytes,
            progress if options.capture_in_steps else False,
            options.capture_in_steps,
        )
        # The shapes with a captured target, and what steps missed, in the order in which they came.
        self._captured: list[Shape] = []
        self._missed: dict[Wanted, None] = {}

    def run(self, plan: StepPlan, aux: list[AuxRows], clock: Clock) -> Decoded:
        """``aux`` takes the captured hidden states, where they are kept."""
        parts, rows, buffers = self._parts, plan.decode, self.buffers
        bound = self._key_bound(max(row.max_len + row.num_drafts for row in rows))
        own = Shape(self._batch_size(len(rows)), plan.num_drafts + 1, bound)
        features = parts.state.sampling.features([row.slot_id for row in rows])
        shape = self._runs_as(own)
        self._note(Wanted(own, features, plan.num_propose))
        buffers.fill(rows, shape.batch)
        clock.start()
        forward, final = self._judge(shape, features)
        clock.target_done()
        if parts.options.keep_aux and parts.aux is not None:
            self._keep_aux(plan, forward.positions, parts.aux, aux)
        self._draft(shape, features, plan.num_propose, forward)
        clock.draft_done()
        logprobs = None
        if plan.num_logprobs >= 0:
            chosen = final if parts.options.processed_logprobs else forward.logits
            flat = chosen[: len(rows), : own.rows].flatten(0, 1)
            tokens = buffers.emitted.tokens[: len(rows), : own.rows].flatten()
            logprobs = logprobs_of(flat, tokens, plan.num_logprobs).leaving()
        return Decoded(*buffers.results(), logprobs)

    def capture(self, wanted: Wanted) -> None:
        """Capture the moves of a step that are not captured yet. No step may be in flight."""
        shape, features, count = wanted
        self._missed.pop(wanted, None)
        if not self.graphs.enabled or not _is_captured(shape):
            return
        self.buffers.fill((), shape.batch)
        try:
            with self.graphs.capturing():
                forward, _ = self._judge(shape, features)
                self._draft(shape, features, count, forward)
        except torch.OutOfMemoryError:
            self.graphs.close()
        if ("target", *shape) in self.graphs and shape not in self._captured:
            self._captured.append(shape)

    def missed(self) -> Wanted | None:
        """The next step to capture() while there is nothing to do."""
        if self.graphs.full:
            self._missed.clear()
        return next(iter(self._missed), None)

    def usual_steps(self, every_draft_length: bool) -> Iterable[Wanted]:
        """The steps to capture before the first, those of most requests first: each batch size,
        greedy or sampled, with all drafts or also with fewer."""
        options, drafter = self._parts.options, self._parts.drafter
        most = options.num_draft_tokens
        lengths = range(most, -1 if every_draft_length else most - 1, -1)
        sizes = sorted(options.decode_batch_sizes, reverse=True)
        bounds = sorted({self._key_bound(1), options.max_model_len})
        # Each size in turn, so that none is left without if the memory for graphs is full.
        for num_drafts, features, batch, bound in itertools.product(
            lengths, (GREEDY, SAMPLED, RANKED), sizes, bounds
        ):
            shape = Shape(batch, num_drafts + 1, bound)
            # Drafts that are not drawn are made alike whatever the sampling.
            alike = drafter is not None and drafter.sampling(features) is None
            counts = (most,) if alike and features is not GREEDY else lengths
            for num_propose in (0,) if drafter is None else counts:
                yield Wanted(shape, features, num_propose)

    def _runs_as(self, own: Shape) -> Shape:
        """The shape that a step of shape ``own`` takes."""
        graphs = self.graphs
        if not graphs.enabled or graphs.in_steps or ("target", *own) in graphs:
            return own
        larger = (shape for shape in self._captured if shape.holds(own))
        return min(larger, key=lambda shape: shape.cost, default=own)

    def _note(self, step: Wanted) -> None:
        """Remember a step if a move of it is not captured: for when there is nothing to do."""
        graphs = self.graphs
        if not graphs.enabled or graphs.in_steps or graphs.full or not _is_captured(step.shape):
            return
        if not all(key in graphs for key in self._keys(step)):
            self._missed.setdefault(step)

    def _keys(self, step: Wanted) -> list[tuple[object, ...]]:
        """Those of all its moves."""
        shape, features, count = step
        keys: list[tuple[object, ...]] = [("target", *shape), ("accept", *shape, features)]
        if (drafter := self._parts.drafter) is not None:
            keys.append(("fill", *shape, count > 0))
            if count:
                keys.append(_propose_key(shape, count, drafter.sampling(features)))
        return keys

    def _judge(self, shape: Shape, features: Features) -> tuple[_Forward, Tensor]:
        """Target and accept; what they leave for others, and what the tokens were chosen from."""
        capture = _is_captured(shape)
        forward = self.graphs.run(("target", *shape), lambda: self._target(*shape), capture)
        final = self.graphs.run(
            ("accept", *shape, features), lambda: self._accept(forward, features), capture
        )
        return forward, final

    def _draft(self, shape: Shape, features: Features, count: int, forward: _Forward) -> None:
        """Fill and propose, where there is a draft."""
        drafter, graphs = self._parts.drafter, self.graphs
        if drafter is None:
            return
        capture = _is_captured(shape)
        proposes = count > 0
        if not graphs.captures and ("fill", *shape, proposes) not in graphs:
            # The graph of those who draft fills those who do not as well.
            proposes = proposes or ("fill", *shape, True) in graphs
        newest = graphs.run(
            ("fill", *shape, proposes), lambda: self._fill(drafter, forward, proposes), capture
        )
        if not count:
            return
        sampled = drafter.sampling(features)
        if not graphs.captures and _propose_key(shape, count, sampled) not in graphs:
            most = range(count, self._parts.options.num_draft_tokens + 1)
            found = (n for n in most if _propose_key(shape, n, sampled) in graphs)
            count = next(found, count)
        graphs.run(
            _propose_key(shape, count, sampled),
            lambda: self._propose(drafter, newest, shape.bound, count, features),
            capture,
        )

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

    def _propose(
        self, drafter: Drafter, newest: Newest, bound: int, count: int, features: Features
    ) -> None:
        """Draft after the newest token of each sequence, and remember the drafts by slot."""
        parts, buffers = self._parts, self.buffers
        asked = Asked(newest, buffers.num_propose, buffers.block_table, bound + 1)
        rows = parts.state.sampling.rows(buffers.slots, features)
        drafts = drafter.propose(asked, count, rows)
        drafts = parts.judge.drafted(drafts, buffers.slots, newest.positions)
        parts.state.draft_tokens[buffers.slots, :count] = buffers.drafts[:, :count] = drafts

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


def _is_captured(shape: Shape) -> bool:
    return shape.batch * shape.rows <= MAX_CAPTURED_ROWS


def _propose_key(shape: Shape, count: int, sampled: Features | None) -> tuple[object, ...]:
    return ("propose", shape.batch, shape.bound, count, sampled)
