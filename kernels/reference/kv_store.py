"""From the rows of the qkv projection to rotated queries and written caches.

A cache is [num_blocks, block_size, G, D] (keys, values) or [num_blocks, block_size, Di] (index
keys), contiguous; kv_slot = block * block_size + offset; a slot of -1 writes nothing. Caches are of
qkv's dtype or narrower; fp8 (e4m3fn) holds values at scale 1, saturated at 448.
"""

import torch
from torch import Tensor

from eaglerun.kernels.reference import as_bytes, cast, narrowed, remember_last, wide
from eaglerun.kernels.reference.linear import linear
from eaglerun.kernels.reference.rmsnorm import gemma_rmsnorm
from eaglerun.kernels.reference.rope import rope


def kv_store(
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    table: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """Per-head Gemma norm and partial RoPE of q and k, and the write of k and v.

    q = rope(gemma_rmsnorm(q, q_norm)), k = rope(gemma_rmsnorm(k, k_norm)), v as it is: norm
    first, rope second, unrounded in between.

    Shapes  qkv [N, (H + 2 G) * D], columns q, k, v, rows of any stride; positions, kv_slots [N];
            q_norm, k_norm [D]; table [max_positions, rotary_dim]; returns q [N, H, D].
    Dtypes  norm and rope in fp32 (fp64 for fp64), one cast: of q to qkv.dtype, of k and v to their
            cache's.
    Writes  k_cache, v_cache at kv_slots >= 0, nowhere else.
    Raises  ValueError when the columns are not a whole number of heads above 2 G.
    Source  MiniMaxM3VLAttention (transformers 5.23, models/minimax_m3_vl).
    """
    rows, heads = _head_rows("kv_store", qkv, k_cache)
    groups = k_cache.shape[2]
    qk = _norm_rope(rows[:, : heads + groups], heads, q_norm, k_norm, positions, table, eps)
    _write(kv_slots, (k_cache, qk[:, heads:]), (v_cache, rows[:, heads + groups :]))
    return cast(qk[:, :heads], qkv.dtype)


def kv_index_store(
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    index_q_norm: Tensor,
    index_k_norm: Tensor,
    table: Tensor,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    index_k_cache: Tensor,
) -> tuple[Tensor, Tensor]:
    """kv_store of a layer with an indexer: the row goes on with index q and index k.

    Both take their own norm and the same rotation; one index key serves all groups.

    Shapes  qkv [N, (H + 2 G) * D + (G + 1) * Di], columns q, k, v, index q, index k;
            index_q_norm, index_k_norm [Di]; index_k_cache [num_blocks, block_size, Di];
            returns q [N, H, D] and index q [N, G, Di].
    Dtypes  as kv_store.
    Writes  k_cache, v_cache, index_k_cache at kv_slots >= 0, nowhere else.
    Raises  as kv_store.
    """
    groups, index_dim = k_cache.shape[2], index_k_cache.shape[2]
    split = qkv.shape[1] - (groups + 1) * index_dim
    rows, heads = _head_rows("kv_index_store", qkv[:, :split], k_cache)
    qk = _norm_rope(rows[:, : heads + groups], heads, q_norm, k_norm, positions, table, eps)
    index = qkv[:, split:].view(len(qkv), groups + 1, index_dim)
    index = _norm_rope(index, groups, index_q_norm, index_k_norm, positions, table, eps)
    _write(
        kv_slots,
        (k_cache, qk[:, heads:]),
        (v_cache, rows[:, heads + groups :]),
        (index_k_cache, index[:, groups]),
    )
    return cast(qk[:, :heads], qkv.dtype), cast(index[:, :groups], qkv.dtype)


def draft_kv_store(
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> Tensor:
    """RoPE of the draft's q and k without a norm, and the write of k and v.

    The draft row stored at position p >= 1 pairs the token of p with the target's hidden state
    of p - 1 and rotates by p - 1: rope index = clamp(positions - 1, 0, max_positions - 1).

    Shapes  qkv [N, (H + 2 G) * D], columns q, k, v; H may be 0 (k and v alone are filled);
            positions, kv_slots [N]; table [max_positions, rotary_dim]; returns q [N, H, D].
    Dtypes  as kv_store.
    Writes  k_cache, v_cache at kv_slots >= 0, nowhere else.
    Raises  as kv_store.
    """
    rows, heads = _head_rows("draft_kv_store", qkv, k_cache)
    groups = k_cache.shape[2]
    qk = rope(wide(rows[:, : heads + groups]), positions - 1, table)
    _write(kv_slots, (k_cache, qk[:, heads:]), (v_cache, rows[:, heads + groups :]))
    return cast(qk[:, :heads], qkv.dtype)


def draft_kv_fill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    kv_slots: Tensor,
    table: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """draft_kv_store of the rows x weight^T (+ bias), k and v alone.

    Shapes  x [N, C], weight [2 G D, C], rows k, then v; bias [2 G D] or None; all else as
            draft_kv_store.
    Writes  k_cache, v_cache at kv_slots >= 0, nowhere else.
    Raises  as linear and draft_kv_store.
    """
    draft_kv_store(linear(x, weight, bias), positions, kv_slots, table, k_cache, v_cache)


def _head_rows(name: str, qkv: Tensor, k_cache: Tensor) -> tuple[Tensor, int]:
    """qkv as [N, H + 2 G, D], and H."""
    groups, dim = k_cache.shape[2:]
    heads, rest = divmod(qkv.shape[1], dim)
    if rest or heads < 2 * groups:
        raise ValueError(f"{name}: qkv {tuple(qkv.shape)}, {groups} groups of {dim}")
    return qkv.view(len(qkv), heads, dim), heads - 2 * groups


def _norm_rope(
    rows: Tensor,
    heads: int,
    q_norm: Tensor,
    k_norm: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
) -> Tensor:
    """Queries (the first ``heads``) and keys in one pass: they differ only in the weight. In
    fp32 or wider: each is cast once, where it goes."""
    dim = rows.shape[2]
    weight = torch.cat((q_norm.expand(heads, dim), k_norm.expand(rows.shape[1] - heads, dim)))
    return rope(gemma_rmsnorm(wide(rows), weight, eps), positions, table)


def _write(kv_slots: Tensor, *writes: tuple[Tensor, Tensor]) -> None:
    """cache[slot of row n] = rows[n] for every (cache, rows), where the row has a slot; rounded
    to the cache's dtype."""
    slots, used = _used(kv_slots)
    for cache, rows in writes:
        rows = rows if used is None else rows.index_select(0, used)
        rows = as_bytes(narrowed(rows, cache.dtype))
        as_bytes(cache).view(-1, *cache.shape[2:]).index_copy_(0, slots, rows)


@remember_last
def _used(kv_slots: Tensor) -> tuple[Tensor, Tensor | None]:
    """The slots that are written, and their rows; None where all are."""
    rows = (kv_slots >= 0).nonzero()[:, 0]
    return (kv_slots, None) if len(rows) == len(kv_slots) else (kv_slots[rows], rows)
