"""Why two greedy runs of one prompt part: what each selected is recorded, and computed again.

Runs that sum the same numbers in another order part where a choice is a near tie: the choice of the
token itself, or that of an expert or a block of keys on the way to it, at this position or before.
Selections records the experts and blocks that every row of a run chose. Replay computes the common
prefix in one forward, with the selections of one run and then with the other's. A run's token has
to be within MAX_STEPS of the best logit of its own replay. Where both are so in one replay, that is
the explanation. Else it is the selections, if those in which the runs first differ are at most
MAX_STEPS short of being the replay's own. First: nothing that went into it was selected
differently; what comes later has other inputs. Of thousands of rows a few go further than that:
they are undone, for the other run's, and the rest must still lead to the token.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.index_topk import INIT_SCORE, LOCAL_SCORE, block_scores
from eaglerun.kernels.rows import LayerKV, Routing, Rows
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import BlockSelector, DecoderLayer, MiniMaxM3
from eaglerun.models.moe import Gate, MoE
from eaglerun.run.runner import Runner
from eaglerun.staging import host_tensor

MAX_STEPS = 2.0
# Replays in which selections beyond MAX_STEPS are undone: later ones come first by that.
MAX_REPLAYS = 8
# Rows of one forward.
MAX_ROWS = 8192
# Bits behind the leading one that a result keeps. float32 has 23, float64 52: sums over thousands
# of products and the layers between lose about a third of them.
STEP_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 15, torch.float64: 34}

KINDS = ("tokens", "experts", "blocks", "unexplained")


def step_of(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance to the next number, for results computed in ``dtype``: of bf16 exactly its
    own, of wider types a coarser one (STEP_BITS). Shapes  any, returned alike in values' dtype."""
    mantissa = torch.frexp(values).mantissa
    # The quotient is a power of two, exactly; a device's power function need not be.
    power = torch.where(mantissa == 0, 1.0, values / mantissa)
    return power * 2.0 ** -(1 + STEP_BITS[dtype])


class Selections:
    """What the rows of a runner's sequences select, from now on, kept on the device.

    Sequences are told apart by their seeds, 0 .. num_sequences - 1; a position computed twice
    keeps the later selection. What was never computed is -1.

    experts  by layer, [num_sequences, longest + 1, topk] int16; the last position is padding's
    blocks   by layer, [num_sequences, longest + 1, G, topk] int16; -1 where all blocks are visible
    """

    def __init__(self, runner: Runner, num_sequences: int, longest: int) -> None:
        self._longest = longest
        # Of the forward that runs: which sequence and position each row is.
        self._at: tuple[Tensor, Tensor] | None = None
        self.experts: dict[int, Tensor] = {}
        self.blocks: dict[int, Tensor] = {}
        spec = runner.target.spec
        size = (num_sequences, longest + 1)
        note = partial(self._note_rows, runner)
        self._hooks = [runner.target.register_forward_pre_hook(note)]
        for i, gate, selector in choosers(runner.target):
            if gate is not None:
                kept = _unknown(*size, gate.topk, device=runner.device)
                self.experts[i] = kept
                keep_experts = partial(self._keep_experts, kept)
                self._hooks.append(gate.register_forward_hook(keep_experts))
            if selector is not None:
                shape = (*size, spec.num_key_value_heads, selector.topk)
                kept = _unknown(*shape, device=runner.device)
                self.blocks[i] = kept
                keep_blocks = partial(self._keep_blocks, kept)
                self._hooks.append(selector.register_forward_hook(keep_blocks))

    def stop(self) -> None:
        """Record no more, and let go of the runner."""
        for hook in self._hooks:
            hook.remove()

    def of(self, sequence: int, length: int) -> "Path":
        """Of the first ``length`` positions of a sequence."""
        return Path(
            {i: t[sequence, :length].long() for i, t in self.experts.items()},
            {i: t[sequence, :length].long() for i, t in self.blocks.items()},
        )

    def _note_rows(self, runner: Runner, _: MiniMaxM3, args: tuple[Tensor, Rows]) -> None:
        rows = args[1]
        if rows.cu_seqlens is None:
            slots = runner.decode.buffers.slots[:, None].expand(-1, rows.longest).flatten()
        else:
            assert runner.plan is not None
            owners = [c.slot_id for c in runner.plan.prefill for _ in c.token_ids]
            slots = host_tensor(owners, runner.device)
        positions = rows.positions.clamp(max=self._longest)
        positions = positions.masked_fill(positions < 0, self._longest)
        self._at = (runner.state.sampling.seed[slots], positions)

    def _keep_experts(self, kept: Tensor, gate: Gate, _: object, output: Routing) -> None:
        assert self._at is not None
        kept[self._at] = output.ids.short()

    def _keep_blocks(
        self, kept: Tensor, _: BlockSelector, args: object, output: Tensor | None
    ) -> None:
        assert self._at is not None
        if output is None:
            # Not a number of the host's, which a graph that is being captured could not copy.
            kept.index_put_(self._at, kept.new_full((), -1))
        else:
            kept[self._at] = output.short()


@dataclass(frozen=True, slots=True)
class Path:
    """The selections of one sequence: experts by layer [L, topk], blocks by layer [L, G, topk]
    int64, -1 where unknown."""

    experts: dict[int, Tensor]
    blocks: dict[int, Tensor]

    def undone(self, where: "BySelection", other: "Path") -> "Path":
        """This path, with the other's selections ``where`` it says."""

        def mixed(
            own: dict[int, Tensor], others: dict[int, Tensor], at: dict[int, Tensor]
        ) -> dict[int, Tensor]:
            return {i: torch.where(at[i][..., None], others[i], own[i]) for i in own}

        return Path(
            mixed(self.experts, other.experts, where.experts),
            mixed(self.blocks, other.blocks, where.blocks),
        )


@dataclass(frozen=True, slots=True)
class BySelection:
    """Something of each selection of a path: experts by layer [L], blocks by layer [L, G]."""

    experts: dict[int, Tensor]
    blocks: dict[int, Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        yield from (*self.experts.values(), *self.blocks.values())

    def count(self) -> int:
        return sum(int(t.count_nonzero()) for t in self)

    def map(self, function: Callable[[Tensor], Tensor]) -> "BySelection":
        return BySelection(
            {i: function(t) for i, t in self.experts.items()},
            {i: function(t) for i, t in self.blocks.items()},
        )


def choosers(target: MiniMaxM3) -> Iterator[tuple[int, Gate | None, BlockSelector | None]]:
    """The modules of each layer that select something."""
    for i, layer in enumerate(target.layers):
        assert isinstance(layer, DecoderLayer)
        gate = layer.mlp.gate if isinstance(layer.mlp, MoE) else None
        selector = layer.self_attn.selector if layer.self_attn.computes_index else None
        yield i, gate, selector


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the replays found; [0] is of the plain run, [1] of the one with the draft.

    kind       tokens: both tokens are near the best logit in one replay; experts, blocks: each in
               its own alone, and the runs differ in experts, or in blocks alone; unexplained
    margin     of the best logit over the second, in steps
    below      how far each run's token is below the best logit of its replay, in steps
    short      how far the worst of the first differing selections of each run is from being
               selected in its replay, in steps of its row's largest score
    undone     how many selections of each run, further than MAX_STEPS, were undone; experts and
               blocks explain by the rest
    experts, blocks  all selections (a row's in a layer; for blocks a group's) that differ
    """

    kind: str
    margin: tuple[float, float] = (0.0, 0.0)
    below: tuple[float, float] = (0.0, 0.0)
    short: tuple[float, float] = (0.0, 0.0)
    undone: tuple[int, int] = (0, 0)
    experts: int = 0
    blocks: int = 0


class Replay:
    """Prefixes of up to ``longest`` tokens on KV memory of its own.

    cache_dtypes  of K and V, and of the index keys, as in the runs
    """

    def __init__(
        self, target: MiniMaxM3, longest: int, cache_dtypes: tuple[torch.dtype, torch.dtype]
    ) -> None:
        self._target = target
        weight = target.embed_tokens.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._size = target.spec.sparse_block_size
        self._blocks = -(-longest // self._size)
        kv_dtype, index_dtype = cache_dtypes
        self._kv = TargetKV.allocate(
            target.spec, self._blocks, self._size, self._device, kv_dtype, index_dtype
        )

    @torch.inference_mode()
    def explain(
        self, prefix: Sequence[int], tokens: tuple[int, int], paths: tuple[Path, Path]
    ) -> Explanation:
        """Why the plain run went on with tokens[0] after ``prefix`` and the other with tokens[1].

        Raises  ValueError on an empty prefix, or one longer than the memory.
        """
        if not 0 < len(prefix) <= self._blocks * self._size:
            raise ValueError(f"prefix of {len(prefix)}: 1 to {self._blocks * self._size} tokens")
        differing = _differing(*paths)
        first = _first(differing, len(self._target.layers), len(prefix))
        margin, below, short, far = [], [], [], []
        near = False
        for own, path in enumerate(paths):
            logits, steps_short = self._logits(prefix, path, first)
            best = logits.topk(2).values
            step = step_of(best[0], self._dtype)
            steps = ((best[0] - logits[list(tokens)]) / step).tolist()
            margin.append(float((best[0] - best[1]) / step))
            below.append(steps[own])
            short.append(max(float(s.max()) for s in (*steps_short, torch.zeros(1))))
            far.append(steps_short.map(lambda s: s > MAX_STEPS))
            near |= all(s <= MAX_STEPS for s in steps)
        undone = [0, 0]
        kind = "unexplained"
        if all(value <= MAX_STEPS for value in below):
            if near:
                kind = "tokens"
            else:
                kind = "experts" if BySelection(differing.experts, {}).count() else "blocks"
                for own in range(2):
                    if short[own] > MAX_STEPS:
                        undone[own], leads = self._without(
                            prefix, tokens[own], paths[own], paths[1 - own], far[own]
                        )
                        kind = kind if leads else "unexplained"
        return Explanation(
            kind,
            _two(margin),
            _two(below),
            _two(short),
            (undone[0], undone[1]),
            BySelection(differing.experts, {}).count(),
            BySelection({}, differing.blocks).count(),
        )

    def _without(
        self, prefix: Sequence[int], token: int, path: Path, other: Path, far: BySelection
    ) -> tuple[int, bool]:
        """How many selections of ``path`` were undone, beginning with those ``far``, until none
        where it first differs from the other is further than MAX_STEPS; and whether what is left
        of it still leads to ``token``."""
        undone = 0
        for _ in range(MAX_REPLAYS):
            undone += far.count()
            path = path.undone(far, other)
            first = _first(_differing(path, other), len(self._target.layers), len(prefix))
            logits, steps_short = self._logits(prefix, path, first)
            far = steps_short.map(lambda s: s > MAX_STEPS)
            if not far.count():
                best = logits.max()
                return undone, bool(best - logits[token] <= MAX_STEPS * step_of(best, self._dtype))
        return undone, False

    def _logits(
        self, prefix: Sequence[int], path: Path, differing: BySelection
    ) -> tuple[Tensor, BySelection]:
        """The logits [V] after ``prefix`` with the selections of ``path``, and how far each of
        those in ``differing`` is from being selected, in steps; 0 elsewhere."""
        table = torch.arange(self._blocks, dtype=torch.int32, device=self._device)[None]
        wider = torch.promote_types(self._dtype, torch.float32)
        short = differing.map(lambda mask: torch.zeros(mask.shape, dtype=wider, device=mask.device))
        for start in range(0, len(prefix), MAX_ROWS):
            end = min(start + MAX_ROWS, len(prefix))
            count = end - start
            positions = torch.arange(start, end, device=self._device)
            rows = Rows(
                positions=positions,
                # Block b of the sequence is block b of the memory.
                kv_slots=positions,
                block_tables=table,
                seq_lens=torch.tensor([end], dtype=torch.int32, device=self._device),
                max_seq_len=end,
                cu_seqlens=torch.tensor([0, count], dtype=torch.int32, device=self._device),
                q_lens=(count,),
            )
            ids = torch.tensor(prefix[start:end], device=self._device)
            with self._following(path, differing, slice(start, end), short):
                hidden = self._target(ids, rows, self._kv)
        logits = self._target.logits(hidden[-1:])[0]
        return logits.to(wider), short

    @contextmanager
    def _following(
        self, path: Path, differing: BySelection, rows: slice, short: BySelection
    ) -> Iterator[None]:
        """While entered, a forward of ``rows`` selects what the path did; ``short`` gets their
        steps."""
        hooks = []
        for i, gate, selector in choosers(self._target):
            if gate is not None:
                own = (path.experts[i][rows], differing.experts[i][rows], short.experts[i][rows])
                follow_experts = partial(self._follow_experts, *own)
                hooks.append(gate.register_forward_hook(follow_experts))
            if selector is not None:
                own = (path.blocks[i][rows], differing.blocks[i][rows], short.blocks[i][rows])
                follow_blocks = partial(self._follow_blocks, *own)
                hooks.append(selector.register_forward_hook(follow_blocks))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _follow_experts(
        self,
        wanted: Tensor,
        differs: Tensor,
        short: Tensor,
        gate: Gate,
        args: tuple[Tensor, Tensor, Tensor | None],
        output: Routing,
    ) -> Routing:
        scores = F.linear(args[0].to(gate.weight.dtype), gate.weight).sigmoid()
        choice = scores
        if gate.e_score_correction_bias is not None:
            choice = scores + gate.e_score_correction_bias
        known = (wanted >= 0).all(-1, keepdim=True)
        wanted = torch.where(known, wanted, output.ids.long())
        chosen = torch.zeros_like(choice, dtype=torch.bool).scatter(1, wanted, True)
        short.copy_(self._short(choice, choice.abs().amax(-1), chosen, differs))
        followed = scores.gather(1, wanted)
        followed = followed * (gate.scale / followed.sum(-1, keepdim=True))
        return Routing(wanted.to(output.ids.dtype), followed.to(output.weights.dtype))

    def _follow_blocks(
        self,
        wanted: Tensor,
        differs: Tensor,
        short: Tensor,
        selector: BlockSelector,
        args: tuple[Tensor, LayerKV, Rows],
        output: Tensor | None,
    ) -> Tensor | None:
        if output is None:
            return None
        index_q, kv, rows = args
        # Rows of one sequence are uniform as well.
        scores = block_scores(index_q, kv, rows._replace(cu_seqlens=None, q_lens=()))
        columns = scores.shape[2]
        block = torch.arange(columns, device=scores.device)
        causal = (rows.positions // self._size + 1)[:, None, None]
        largest = scores.masked_fill(block >= causal, 0.0).abs().amax(-1)
        scores = scores.masked_fill(block < selector.init_blocks, INIT_SCORE)
        scores = scores.masked_fill(block >= causal - selector.local_blocks, LOCAL_SCORE)
        scores = scores.masked_fill(block >= causal, -math.inf)
        known = (wanted >= 0).any(-1, keepdim=True)
        wanted = torch.where(known, wanted, output.long())
        # One more column takes the -1 of slots that are left.
        chosen = torch.zeros(*scores.shape[:2], columns + 1, dtype=torch.bool, device=block.device)
        chosen = chosen.scatter(2, wanted.remainder(columns + 1), True)[:, :, :columns]
        short.copy_(self._short(scores, largest, chosen, differs))
        return wanted.to(output.dtype)

    def _short(self, scores: Tensor, largest: Tensor, chosen: Tensor, differs: Tensor) -> Tensor:
        """How far a differing row's best score left out exceeds its worst chosen one, in steps
        of ``largest``. Shapes  scores, chosen [..., C]; largest, differs, returned [...]."""
        last = scores.masked_fill(~chosen, math.inf).amin(-1)
        first = scores.masked_fill(chosen, -math.inf).amax(-1)
        steps = (first - last) / step_of(largest, self._dtype)
        return torch.where((first <= last) | ~differs, 0.0, steps)


def _unknown(*shape: int, device: torch.device) -> Tensor:
    return torch.full(shape, -1, dtype=torch.int16, device=device)


def _differing(plain: Path, draft: Path) -> BySelection:
    """The selections that both runs know and that differ, whatever their order."""

    def differ(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.sort(-1).values, b.sort(-1).values
        return (a != b).any(-1) & (a[..., -1] >= 0) & (b[..., -1] >= 0)

    return BySelection(
        {i: differ(a, draft.experts[i]) for i, a in plain.experts.items()},
        {i: differ(a, draft.blocks[i]) for i, a in plain.blocks.items()},
    )


def _first(differing: BySelection, num_layers: int, length: int) -> BySelection:
    """Of the differing selections those with none before them: none of an earlier layer, or of the
    same layer's attention, at this position or an earlier one."""
    found = BySelection({}, {})
    earliest = length
    for i in range(num_layers):
        for masks, kept in ((differing.blocks, found.blocks), (differing.experts, found.experts)):
            if i in masks:
                mask = masks[i]
                kept[i] = mask.clone()
                kept[i][earliest:] = False
                rows = mask.view(length, -1).any(-1).nonzero()[:, 0]
                earliest = min(earliest, *rows[:1].tolist(), length)
    return found


def _two(values: list[float]) -> tuple[float, float]:
    first, second = values
    return first, second
