"""Rotated queries and written caches, from the rows of the qkv projection."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import as_bytes, cast, narrowed, remember_last, wide
from eaglerun.kernels.reference.linear import linear
from eaglerun.kernels.reference.rmsnorm import gemma_rmsnorm
from eaglerun.kernels.reference.rope import rope
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows


def kv_store(
    qkv: Tensor, rows: Rows, norms: HeadNorms, table: Tensor, kv: LayerKV
) -> tuple[Tensor, Tensor | None]:
    """See eaglerun.kernels.kv_store.kv_store."""
    groups = kv.k.shape[2]
    index_dim = 0 if kv.index_k is None else kv.index_k.shape[2]
    split = qkv.shape[1] - (groups + 1) * index_dim if index_dim else qkv.shape[1]
    heads, num_heads = _head_rows("kv_store", qkv[:, :split], kv)
    turn = (rows.positions, table, norms.eps)
    qk = _norm_rope(heads[:, : num_heads + groups], num_heads, norms.q, norms.k, *turn)
    writes = [(kv.k, qk[:, num_heads:]), (kv.v, heads[:, num_heads + groups :])]
    index_q = None
    if kv.index_k is not None:
        if norms.index_q is None or norms.index_k is None:
            raise ValueError("kv_store: a layer with index keys needs their norms")
        index = qkv[:, split:].view(len(qkv), groups + 1, index_dim)
        index = _norm_rope(index, groups, norms.index_q, norms.index_k, *turn)
        writes.append((kv.index_k, index[:, groups]))
        index_q = cast(index[:, :groups], qkv.dtype)
    _write(rows.kv_slots, *writes)
    return cast(qk[:, :num_heads], qkv.dtype), index_q


def draft_kv_store(qkv: Tensor, rows: Rows, table: Tensor, kv: LayerKV) -> Tensor:
    """See eaglerun.kernels.kv_store.draft_kv_store."""
    return _draft_store(qkv, rows.positions, rows.kv_slots, table, kv)


def draft_kv_fill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    kv_slots: Tensor,
    table: Tensor,
    kv: LayerKV,
) -> None:
    """See eaglerun.kernels.kv_store.draft_kv_fill."""
    _draft_store(linear(x, weight, bias), positions, kv_slots, table, kv)


def _draft_store(
    qkv: Tensor, positions: Tensor, kv_slots: Tensor, table: Tensor, kv: LayerKV
) -> Tensor:
    rows, heads = _head_rows("draft_kv_store", qkv, kv)
    groups = kv.k.shape[2]
    qk = rope(wide(rows[:, : heads + groups]), positions - 1, table)
    _write(kv_slots, (kv.k, qk[:, heads:]), (kv.v, rows[:, heads + groups :]))
    return cast(qk[:, :heads], qkv.dtype)


def _head_rows(name: str, qkv: Tensor, kv: LayerKV) -> tuple[Tensor, int]:
    """qkv as [N, H + 2 G, D], and H."""
    groups, dim = kv.k.shape[2:]
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
