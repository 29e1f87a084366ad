"""The cost of the two models: parameters and bytes by component, KV bytes by token and block; of
one rank, where several divide them.

Derived from the specs and the tables of weights, so that it is known before anything is loaded or
allocated; and from what a device then turns out to hold, how many KV blocks are left for it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.formats import DTYPE_BYTES
from eaglerun.checkpoint.table import WeightTable
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import UNDIVIDED, Share, draft_weights, target_weights
from eaglerun.errors import CapacityError


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a model. ``num_bytes`` is what its weights take in memory."""

    name: str
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class KVBudget:
    """Bytes of paged memory. main, index and draft are per token, carry is per block.

    main   K and V of every target layer
    index  one index key of every sparse layer that computes its own selection
    draft  K and V of the draft's layer;  carry  the hidden row that the draft resumes from
    """

    block_size: int
    main_bytes: int
    index_bytes: int
    draft_bytes: int
    carry_bytes: int

    @property
    def token_bytes(self) -> int:
        return self.main_bytes + self.index_bytes + self.draft_bytes

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.token_bytes + self.carry_bytes

    def num_blocks(self, num_bytes: int) -> int:
        """How many whole blocks fit into ``num_bytes``."""
        return max(0, num_bytes) // self.block_bytes

    def num_tokens(self, num_bytes: int) -> int:
        """How many tokens fit into ``num_bytes``, in whole blocks."""
        return self.num_blocks(num_bytes) * self.block_size


def components(
    table: WeightTable, dtype: str, rank: int = 0, size: int = 1
) -> tuple[Component, ...]:
    """The components that rank ``rank`` of ``size`` holds of a model, in the order of its table."""
    counts = dict.fromkeys(table.components, 0)
    sizes = dict.fromkeys(table.components, 0)
    for weight in table.weights.values():
        for part in weight.parts:
            if part.component is not None:
                count = math.prod(run.stop - run.start for run in part.share(rank, size))
                counts[part.component] += count
                sizes[part.component] += weight.format.num_bytes(count, dtype)
    return tuple(Component(name, count, sizes[name]) for name, count in counts.items())


def target_components(
    spec: TargetSpec, dtype: str | None = None, share: Share = UNDIVIDED
) -> tuple[Component, ...]:
    """The target's parts with their weights in ``dtype`` (None: as stored)."""
    table = target_weights(spec, share.whole_experts)
    return components(table, dtype or spec.dtype, share.rank, share.size)


def draft_components(
    spec: DraftSpec, dtype: str | None = None, share: Share = UNDIVIDED
) -> tuple[Component, ...]:
    """The draft's parts with their weights in ``dtype`` (None: as stored).

    An embedding or head that turns out to be the target's, which only loading can tell, takes
    nothing in the end; it is counted here.
    """
    table = draft_weights(spec, share.whole_embedding)
    return components(table, dtype or spec.dtype, share.rank, share.size)


def kv_budget(
    target: TargetSpec,
    draft: DraftSpec | None,
    block_size: int | None = None,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    index_dtype: str | None = None,
    size: int = 1,
) -> KVBudget:
    """Paged memory of the pair of models in ``dtype`` (None: the target's stored one), on each of
    ``size`` ranks: of its KV heads, all of the index keys, all of the carry.

    ``block_size`` None is the target's sparse block; ``kv_dtype`` and ``index_dtype`` None are the
    models'. The carry is always in the models' dtype.
    """
    itemsize = DTYPE_BYTES[dtype or target.dtype]
    kv_size = DTYPE_BYTES[kv_dtype] if kv_dtype else itemsize
    index_size = DTYPE_BYTES[index_dtype] if index_dtype else itemsize
    layers = _cached(target_weights(target), size)
    index = sum(
        width.get("index_k", 0)
        for width, shared in zip(layers, target.index_shared, strict=True)
        if not shared
    )
    draft_layers = _cached(draft_weights(draft), size) if draft else []
    return KVBudget(
        block_size=block_size or target.sparse_block_size,
        main_bytes=sum(width["k"] + width["v"] for width in layers) * kv_size,
        index_bytes=index * index_size,
        draft_bytes=sum(width["k"] + width["v"] for width in draft_layers) * kv_size,
        carry_bytes=draft.hidden_size * itemsize if draft else 0,
    )


def _cached(table: WeightTable, size: int) -> list[dict[str, int]]:
    """The elements that each layer stores for a token: as many as its projection has rows "k", "v"
    and "index_k", on each of ``size`` ranks."""
    return [
        {part.name: weight.rows(part.name, size=size) for part in weight.parts}
        for name, weight in table.weights.items()
        if name.endswith("qkv_proj.weight")
    ]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """What a device holds besides KV blocks, in bytes. None: not measured yet, taken as nothing.

    total        the device's memory, of which the share ``utilization`` may be in use
    other        other processes, the driver's context, the code of kernels
    weights      both models
    state        what each slot remembers, and the buffers that steps hand on
    activations  at most in use at once by a step: the widest prefill, the fullest decode batch
    graphs       what captured decode steps keep
    """

    total: int
    utilization: float
    other: int
    weights: int
    state: int | None = None
    activations: int | None = None
    graphs: int | None = None

    @property
    def limit(self) -> int:
        return int(self.total * self.utilization)

    @property
    def left(self) -> int:
        """For KV blocks; negative where even the rest does not fit."""
        known = (self.other, self.weights, self.state, self.activations, self.graphs)
        return self.limit - sum(n or 0 for n in known)

    def rows(self) -> list[tuple[str, int]]:
        """The measured parts, by name."""
        parts = (
            ("other processes, driver", self.other),
            ("weights", self.weights),
            ("state of the slots", self.state),
            ("activations", self.activations),
            ("graphs", self.graphs),
        )
        return [(name, n) for name, n in parts if n is not None]


def size_kv(
    use: MemoryUse,
    kv: KVBudget,
    max_model_len: int | None,
    narrower: KVBudget | None = None,
) -> int:
    """How many KV blocks the device has room for.

    max_model_len  the longest sequence, which must fit alone; None: whatever fits will do
    narrower       the same cache in fp8, to advise it where that is smaller

    Raises  CapacityError with the whole budget and what to change.
    """
    blocks = kv.num_blocks(use.left)
    length = max_model_len or 1
    needed = -(-length // kv.block_size)
    if blocks >= needed:
        return blocks
    kv_bytes = needed * kv.block_bytes
    what = f"max_model_len = {max_model_len}" if max_model_len else "one KV block"
    advice = []
    if max_model_len and blocks:
        advice.append(f"max_model_len: {blocks * kv.block_size} fits")
    # Rounded up, so that what is advised is enough.
    share = math.ceil((use.limit - use.left + kv_bytes) / use.total * 1000) / 1000
    if share <= 1:
        advice.append(f"gpu_memory_utilization: {share:.3f} fits")
    if narrower is not None and narrower.block_bytes < kv.block_bytes:
        least = gib(needed * narrower.block_bytes)
        advice.append(f"kv_cache_dtype, index_cache_dtype = fp8: it then takes {least}")
    wanted = ("one block" if max_model_len is None else f"one sequence of {length:,}", kv_bytes)
    raise CapacityError(refusal(f"{what} does not fit the GPU:", use, advice, wanted))


def refusal(
    headline: str, use: MemoryUse, advice: Sequence[str], wanted: tuple[str, int] | None = None
) -> str:
    """Why a start is refused: the budget, what was ``wanted`` of what is left, what to change."""
    lines = [headline, *format_use(use)]
    if wanted is not None:
        lines.append(f"  {wanted[0]:<26}{gib(wanted[1]):>16}")
    advice = [*advice]
    if use.state is None or use.activations is None:
        advice.append("a GPU with more memory, or fewer processes on it")
    else:
        advice.append("max_num_batched_tokens, max_num_seqs: a step then needs less")
    return "\n".join([*lines, "Change one or more of:", *(f"  {line}" for line in advice)])


def format_use(use: MemoryUse) -> list[str]:
    """The budget of a device, a line a part."""
    share = f"{use.utilization:g} of {gib(use.total)}"
    rows = [(share, use.limit), *((f"- {name}", n) for name, n in use.rows())]
    return [f"  {name:<26}{gib(n):>16}" for name, n in (*rows, ("left for KV", use.left))]


def graph_outputs(sizes: Sequence[int], rows: int, max_rows: int, row_bytes: int) -> int:
    """Bytes that captured decode steps keep as their outputs: logits, which no graph gives back.

    A graph of each batch size whose rows do not exceed ``max_rows``, for ``rows`` rows a sequence
    of ``row_bytes`` logits.
    """
    return sum(n * rows * row_bytes for n in sizes if n * rows <= max_rows)


def format_budget(
    target: TargetSpec,
    draft: DraftSpec | None,
    kv: KVBudget,
    dtype: str | None = None,
    kv_bytes: int | None = None,
    size: int = 1,
) -> str:
    """The budget as a table; with ``kv_bytes`` also how many tokens that much memory holds.

    size  of several ranks the one that holds most
    """
    share, lines = UNDIVIDED, []
    if size > 1:
        share, told = _largest(target, draft, dtype, size)
        lines = [told, ""]
    held = target_components(target, dtype, share)
    lines += _table(f"target, {dtype or target.dtype}", held)
    if draft is not None:
        held = draft_components(draft, dtype, share)
        lines += ["", *_table(f"draft, {dtype or draft.dtype}", held)]
    lines += ["", "KV memory              bytes a token      bytes a block"]
    for name, count in (
        ("main", kv.main_bytes),
        ("index", kv.index_bytes),
        ("draft", kv.draft_bytes),
    ):
        lines.append(f"  {name:<18}{count:>16,}{count * kv.block_size:>19,}")
    lines.append(f"  {'carry':<18}{'':>16}{kv.carry_bytes:>19,}")
    lines.append(f"  {'total':<18}{kv.token_bytes:>16,}{kv.block_bytes:>19,}")
    if kv_bytes is not None:
        lines.append(
            f"  {gib(kv_bytes)} hold {kv.num_blocks(kv_bytes):,} blocks of {kv.block_size} "
            f"= {kv.num_tokens(kv_bytes):,} tokens"
        )
    return "\n".join(lines)


def _largest(
    target: TargetSpec, draft: DraftSpec | None, dtype: str | None, size: int
) -> tuple[Share, str]:
    """The rank that holds most, and how the others compare."""
    tables = [(target_weights(target), dtype or target.dtype)]
    if draft is not None:
        own = draft_weights(draft, UNDIVIDED.whole_embedding)
        tables.append((own, dtype or draft.dtype))
    held = [
        sum(c.num_bytes for table, kind in tables for c in components(table, kind, rank, size))
        for rank in range(size)
    ]
    most, least = held.index(max(held)), held.index(min(held))
    if held[most] == held[least]:
        return Share(most, size), f"one rank of {size}; each holds as much"
    less = f"rank {least} the least: {held[most] - held[least]:,} bytes less of weights"
    return Share(most, size), f"rank {most} of {size}, which holds the most; {less}"


def gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.3f} GiB"


def _table(title: str, components: tuple[Component, ...]) -> list[str]:
    total = Component(
        "total",
        sum(c.num_parameters for c in components),
        sum(c.num_bytes for c in components),
    )
    rows = [
        f"  {c.name:<18}{c.num_parameters:>19,}{gib(c.num_bytes):>16}"
        for c in (*components, total)
        if c.num_parameters
    ]
    return [f"{title:<20}{'parameters':>19}{'memory':>16}", *rows]
