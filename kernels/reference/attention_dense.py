"""Full attention over the paged cache: uniform rows (decode, verify) and ragged ones (prefill)."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from eaglerun.kernels.reference import cache_rows, cast, remember_last, wide
from eaglerun.kernels.rows import LayerKV, Rows


def attention_dense(
    q: Tensor,
    kv: LayerKV,
    rows: Rows,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """See eaglerun.kernels.attention_dense.attention_dense."""
    if rows.cu_seqlens is not None:
        out = torch.zeros_like(q)
        for part, tile in ragged_tiles(rows):
            out[part] = attention_dense(q[part], kv, tile, scale, first_key, window)
        return out
    groups = kv.k.shape[2]
    check_rows("attention_dense", q, groups, rows)
    keys = visible_keys(*keys_of(rows), kv.block_size, first_key)
    hidden = keys.hidden
    if window is not None:
        t = torch.arange(hidden.shape[-1], device=q.device)
        hidden = hidden | (t <= rows.positions.view(len(rows.seq_lens), -1, 1) - window)
    return attend(q, kv, group_cells(keys.slots, groups), *penalty(hidden, q.dtype), scale)


# What the paged references share. None of it is a kernel's twin.

_TILE_ROWS = 256


def check_rows(name: str, q: Tensor, groups: int, rows: Rows) -> None:
    """Raises  ValueError unless each sequence has as many rows and each group as many heads."""
    if q.shape[0] % max(rows.block_tables.shape[0], 1) or q.shape[1] % groups:
        raise ValueError(
            f"{name}: q {tuple(q.shape)}, {groups} groups, "
            f"block_tables {tuple(rows.block_tables.shape)}"
        )


def keys_of(rows: Rows) -> tuple[Tensor, Tensor, Tensor, int]:
    """What says which keys uniform rows see: the first arguments of visible_keys, which tells
    tensors apart and not rows."""
    return rows.positions, rows.block_tables, rows.seq_lens, rows.max_seq_len


class Keys(NamedTuple):
    """Where the keys of B sequences lie, and which of them the Q rows of each may not see.

    L is a whole number of blocks. hidden [B, Q, L]; slots [B, L] is the kv_slot of key t, and
    for the t that hold no key of the sequence that of its first key. So what is gathered through
    ``slots`` is finite wherever a row sees anything, and zero weights stay zeros (0 * NaN is NaN).
    """

    hidden: Tensor
    slots: Tensor


@remember_last
def visible_keys(
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    block_size: int,
    first_key: int = 0,
) -> Keys:
    """A row sees the keys first_key <= t <= position, t < seq_len, of t < L: max_seq_len rounded
    up to whole blocks."""
    num_blocks = -(-max_seq_len // block_size)
    t = torch.arange(num_blocks * block_size, device=positions.device)
    blocks = block_tables[:, :num_blocks].clamp(min=0).long()
    slots = (blocks[:, :, None] * block_size + t[:block_size]).flatten(1)
    empty = t >= seq_lens[:, None]
    if first_key:
        empty |= t < first_key
    if num_blocks:
        slots = torch.where(empty, slots[:, min(first_key, len(t) - 1), None], slots)
    return Keys((t > positions.view(len(seq_lens), -1, 1)) | empty[:, None], slots)


@remember_last
def group_cells(slots: Tensor, groups: int) -> Tensor:
    """Slots [B, L] as rows of a cache seen as [num_blocks * block_size * G, D]: [B, G, L]."""
    return slots[:, None] * groups + torch.arange(groups, device=slots.device)[:, None]


@remember_last
def penalty(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """What is added to scores: 0 for a key that is seen, minus infinity for one that is hidden.

    hidden [B, Q, L]; returns it as [B, 1, Q, 1, L], and blind_rows of it.
    """
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    bias = wide(bias).masked_fill_(hidden, -torch.inf)[:, None, :, None]
    return bias, blind_rows(bias)


def blind_rows(bias: Tensor) -> Tensor | None:
    """Rows that see no key: [.., 1] bool for bias [.., L]; None where each row sees one."""
    if not bias.numel():
        return None
    blind = bias.amax(-1, keepdim=True) < 0
    return blind if bool(blind.any()) else None


def attend(
    q: Tensor, kv: LayerKV, cells: Tensor, bias: Tensor, blind: Tensor | None, scale: float
) -> Tensor:
    """Softmax attention of q [N, H, D] to the keys in cells [B, G, L], of group_cells.

    bias [B, 1 | G, Q, 1, L] is added to the scores; blind [.., 1], its blind_rows, are zero.
    """
    batch, groups, length = cells.shape
    heads, dim = q.shape[1:]
    rows, ratio = q.shape[0] // max(batch, 1), heads // groups
    if not q.numel() or not length:
        return torch.zeros_like(q)
    # Cells of one group are gathered side by side: k, v [B * G, L, D], ready for bmm.
    flat = cells.flatten()
    grouped = (wide(q) * scale).view(batch, rows, groups, ratio, dim).transpose(1, 2)
    k = cache_rows(kv.k.view(-1, dim), flat, grouped.dtype).view(-1, length, dim)
    v = cache_rows(kv.v.view(-1, dim), flat, grouped.dtype).view(-1, length, dim)
    scores = torch.bmm(grouped.reshape(-1, rows * ratio, dim), k.transpose(1, 2))
    scores = scores.view(batch, groups, rows, ratio, length).add_(bias)
    # The softmax of a row without keys is NaN.
    out = torch.bmm(scores.softmax(-1).view(-1, rows * ratio, length), v)
    out = out.view(batch, groups, rows, ratio, dim)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return cast(out.transpose(1, 2).reshape(q.shape), q.dtype)


def ragged_tiles(rows: Rows) -> list[tuple[slice, Rows]]:
    """At most _TILE_ROWS rows of one sequence each, as uniform rows, and where they stand. Their
    bound of keys is what they can see."""
    tiles = []
    ends = accumulate(rows.q_lens)
    for b, (q_len, end) in enumerate(zip(rows.q_lens, ends, strict=True)):
        own = slice(b, b + 1)
        for start in range(end - q_len, end, _TILE_ROWS):
            part = slice(start, min(start + _TILE_ROWS, end))
            positions = rows.positions[part]
            keys = min(int(rows.seq_lens[b]), int(positions.max()) + 1)
            tile = Rows(
                positions, rows.kv_slots[part], rows.block_tables[own], rows.seq_lens[own], keys
            )
            tiles.append((part, tile))
    return tiles
