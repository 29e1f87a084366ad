"""Full attention over the paged cache: uniform rows (decode, verify) and ragged ones (prefill)."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from eaglerun.kernels.reference import cache_rows, cast, remember_last, wide


def attention_dense(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of the same number of rows Q = N / B for every sequence.

    Row n belongs to sequence b = n // Q and sees the keys
        t in [max(first_key, positions[n] - window + 1), positions[n]], t < seq_lens[b];
    o[n, h] = sum_t softmax_t(q[n, h] . k[t, g] * scale) v[t, g] with g = h // (H / G).
    A row that sees no key (padding: position -1) is zero. Cells at t >= seq_lens[b] and
    t < first_key are never used, whatever they hold; nor are the rows of padding.

    Shapes  q [N, H, D], last dim contiguous; caches [num_blocks, block_size, G, D] contiguous;
            positions [N]; block_tables [B, max_blocks], entries past a sequence arbitrary;
            seq_lens [B], at most max_seq_len <= max_blocks * block_size; returns [N, H, D].
    Dtypes  scores, softmax and sums in fp32 (fp64 for fp64), one cast to q.dtype; caches of any
            float dtype, fp8 (e4m3fn) by its values: scale 1.
    Raises  ValueError when N is no multiple of B or H none of G.
    Source  Vaswani et al. 2017, arXiv:1706.03762, eq. 1; pages as Kwon et al. 2023,
            arXiv:2309.06180, section 4.3.
    """
    check_rows("attention_dense", q, k_cache, block_tables)
    keys = visible_keys(positions, block_tables, seq_lens, max_seq_len, k_cache.shape[1], first_key)
    hidden = keys.hidden
    if window is not None:
        t = torch.arange(hidden.shape[-1], device=q.device)
        hidden = hidden | (t <= positions.view(len(seq_lens), -1, 1) - window)
    cells = group_cells(keys.slots, k_cache.shape[2])
    return attend(q, k_cache, v_cache, cells, *penalty(hidden, q.dtype), scale)


def attention_dense_ragged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    q_lens: tuple[int, ...],
    max_seq_len: int,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """attention_dense with q_lens[b] rows for sequence b: prefill chunks.

    Rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] belong to sequence b; rows past the last are zero.

    Shapes  as attention_dense; cu_seqlens_q [B + 1], the running sum of q_lens, for the kernel
            as q_lens is for the host.
    Dtypes, Raises  as attention_dense.
    """
    out = torch.zeros_like(q)
    for rows, b, keys in ragged_tiles(q_lens, seq_lens, positions):
        out[rows] = attention_dense(
            q[rows],
            k_cache,
            v_cache,
            positions[rows],
            block_tables[b],
            seq_lens[b],
            keys,
            scale,
            first_key,
            window,
        )
    return out


# What the paged references share. None of it is a kernel's twin.

_TILE_ROWS = 256


def check_rows(name: str, q: Tensor, k_cache: Tensor, block_tables: Tensor) -> None:
    if q.shape[0] % max(block_tables.shape[0], 1) or q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"{name}: q {tuple(q.shape)}, cache {tuple(k_cache.shape)}, "
            f"block_tables {tuple(block_tables.shape)}"
        )


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
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cells: Tensor,
    bias: Tensor,
    blind: Tensor | None,
    scale: float,
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
    k = cache_rows(k_cache.view(-1, dim), flat, grouped.dtype).view(-1, length, dim)
    v = cache_rows(v_cache.view(-1, dim), flat, grouped.dtype).view(-1, length, dim)
    scores = torch.bmm(grouped.reshape(-1, rows * ratio, dim), k.transpose(1, 2))
    scores = scores.view(batch, groups, rows, ratio, length).add_(bias)
    # The softmax of a row without keys is NaN.
    out = torch.bmm(scores.softmax(-1).view(-1, rows * ratio, length), v)
    out = out.view(batch, groups, rows, ratio, dim)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return cast(out.transpose(1, 2).reshape(q.shape), q.dtype)


def ragged_tiles(
    q_lens: tuple[int, ...], seq_lens: Tensor, positions: Tensor
) -> list[tuple[slice, slice, int]]:
    """Rows of at most _TILE_ROWS, their sequence, and how many keys they can see at most."""
    tiles = []
    for b, (q_len, end) in enumerate(zip(q_lens, accumulate(q_lens), strict=True)):
        for start in range(end - q_len, end, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, end))
            keys = min(int(seq_lens[b]), int(positions[rows].max()) + 1)
            tiles.append((rows, slice(b, b + 1), keys))
    return tiles
