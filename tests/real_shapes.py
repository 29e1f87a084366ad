"""Calls of every kernel at MiniMax-M3's shapes, on any device: on "meta" there is only the shape.

M3: hidden 6144, 64 query heads and 4 groups of 128, 4 index heads of 128, 128 experts of 3072,
vocabulary 200064, blocks of 128 keys, the top 16; the draft: hidden 6144, 3 taps, MLP 18432.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from eaglerun.kernels import Op
from eaglerun.kernels.accept import accept, move_on, window
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.carry import store_carry
from eaglerun.kernels.draft_fuse import embed_dual_rmsnorm, group_rmsnorm
from eaglerun.kernels.draft_inputs import (
    accepted_inputs,
    draft_inputs,
    kv_slots_of,
    newest_inputs,
    verify_inputs,
)
from eaglerun.kernels.index_topk import index_topk
from eaglerun.kernels.kv_store import draft_kv_fill, draft_kv_store, kv_store
from eaglerun.kernels.linear import linear
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.noise import gumbel, gumbel_argmax, uniform
from eaglerun.kernels.rmsnorm import add_gemma_rmsnorm
from eaglerun.kernels.rows import (
    Best,
    BySlot,
    Emitted,
    Experts,
    HeadNorms,
    LayerKV,
    Newest,
    Routing,
    Rows,
)
from eaglerun.kernels.swiglu_oai import swiglu, swiglu_oai
from eaglerun.kernels.vocab_argmax import vocab_argmax

Call = tuple[Op[..., Any], tuple[Any, ...]]

HIDDEN, HEADS, GROUPS, DIM, INDEX_DIM, BLOCK, TOPK = 6144, 64, 4, 128, 128, 128, 16
EXPERTS, WIDTH, VOCAB, DRAFT_WIDTH = 128, 3072, 200064, 18432


def calls(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Iterator[Call]:
    """Every kernel, and each way the launch table has of running it."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return new(*shape, dtype=dtype)

    yield from _rowwise(new, ints)
    for cache in (dtype, torch.float8_e4m3fn):
        yield from _stores(new, ints, cache)
        for rows, batch, blocks in ((1, 1, 16), (32, 4, 8192)):
            yield from _attention(new, ints, rows, batch, blocks, cache)
        yield from _prefill(new, ints, cache)
    # Four rows a sequence.
    k, q = new(64, BLOCK, GROUPS, DIM), new(16, HEADS, DIM)
    yield attention_dense, (q, LayerKV(k, k), _rows(ints, 16, 4, 16), 0.1)
    for rows in (1, 4, 256, 2048, 8192):
        x, positions = new(rows, HIDDEN), ints(rows)
        gate, bias = new(EXPERTS, HIDDEN, dtype=torch.float32), new(EXPERTS, dtype=torch.float32)
        yield moe_route, (x, gate, bias, positions, 4, 2.0, ints(1))
        w13, w2 = new(EXPERTS, 2 * WIDTH, HIDDEN), new(EXPERTS, HIDDEN, WIDTH)
        ids, weights = ints(rows, 4, dtype=torch.int32), new(rows, 4, dtype=torch.float32)
        shared = (new(2 * WIDTH, HIDDEN), new(HIDDEN, WIDTH))
        layer = Experts(w13, w2, *shared)
        yield moe_gemm, (x, Routing(ids, weights), layer, 1.702, 7.0, 1.0)


def widest(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Iterator[Call]:
    """What limits a tile's registers: heads of 256, blocks of 256 keys."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return new(*shape, dtype=dtype)

    k, q, rows = new(64, BLOCK, GROUPS, 256), new(32, HEADS, 256), _rows(ints, 32, 4, 64)
    yield attention_dense, (q, LayerKV(k, k), rows, 0.1)
    chunk = rows._replace(cu_seqlens=ints(5, dtype=torch.int32), q_lens=(8,) * 4)
    yield attention_dense, (q, LayerKV(k, k), chunk, 0.1)
    index_q, index_k = new(32, 16, 256), new(64, 256, 256)
    yield index_topk, (index_q, LayerKV(k, k, index_k), chunk, TOPK, 0, 1)


def _rows(ints: Any, rows: int, batch: int, blocks: int) -> Rows:
    """As many of each sequence, of up to ``blocks`` blocks."""
    tables, lens = (ints(*s, dtype=torch.int32) for s in ((batch, blocks), (batch,)))
    return Rows(ints(rows), ints(rows), tables, lens, blocks * BLOCK)


def _rowwise(new: Any, ints: Any) -> Iterator[Call]:
    x, weight = new(4, HIDDEN), new(HIDDEN)
    yield add_gemma_rmsnorm, (x, x, weight, 1e-6)
    yield group_rmsnorm, (new(3, 8, HIDDEN)[:, :4].transpose(0, 1), new(3, HIDDEN), 1e-6)
    yield embed_dual_rmsnorm, (ints(4), new(VOCAB, HIDDEN), x, weight, weight, 1e-6)
    yield swiglu_oai, (new(4, 2 * WIDTH), 1.702, 7.0, 1.0)
    yield swiglu, (new(4, 2 * DRAFT_WIDTH),)
    yield linear, (x, new(9856, HIDDEN))
    for columns in (HIDDEN, 9856, VOCAB):
        yield linear, (new(64, HIDDEN), new(columns, HIDDEN))
    yield store_carry, (x, ints(4), new(32, HIDDEN), BLOCK)
    best = Best(ints(4, 4, 2))
    yield accept, (best.ids, best.values, new(4, 3, dtype=torch.bool), ints(4))
    table = ints(4, 64, dtype=torch.int32)
    by_slot = BySlot(ints(9), ints(9), ints(9, 7), ints(9, 64, dtype=torch.int32))
    emitted, kept = Emitted(ints(4, 4), ints(4), ints(4)), ints(8, 10)
    kept = Emitted(kept[:, 2:], kept[:, 0], kept[:, 1])
    yield move_on, (ints(4), emitted, by_slot, ints(9), kept)
    yield window, (ints(9, 4096), ints(4), ints(4), 4)
    yield kv_slots_of, (ints(4, 4), table, BLOCK)
    yield verify_inputs, (ints(4), ints(4), by_slot, table, BLOCK, 4)
    yield draft_inputs, (ints(4), 1, ints(4, 3)[:, 2], table, BLOCK)
    yield accepted_inputs, (ints(4, 9)[:, 1:5], ints(4), table, BLOCK)
    newest = Newest(ints(4), ints(4), new(4, HIDDEN))
    yield newest_inputs, (ints(4), ints(4, 9)[:, 0], ints(4), by_slot, new(16, HIDDEN), newest)
    yield vocab_argmax, (new(4, VOCAB),)
    yield vocab_argmax, (new(4, VOCAB, dtype=torch.float32),)
    yield uniform, (ints(4), ints(4), 1)
    yield gumbel, (ints(4), ints(4), 0, VOCAB)
    yield gumbel_argmax, (new(4, VOCAB, dtype=torch.float32), ints(4), ints(4), 0)


def _stores(new: Any, ints: Any, cache: torch.dtype) -> Iterator[Call]:
    k, index_k = new(8, BLOCK, GROUPS, DIM, dtype=cache), new(8, BLOCK, INDEX_DIM, dtype=cache)
    norm = new(DIM)
    main = (HEADS + 2 * GROUPS) * DIM
    qkv = new(4, main + (GROUPS + 1) * INDEX_DIM)
    rows, rope = _rows(ints, 4, 4, 64), new(4096, 64, dtype=torch.float32)
    kv = LayerKV(k, k)
    yield kv_store, (qkv[:, :main], rows, HeadNorms(norm, norm, 1e-6), rope, kv)
    norms = HeadNorms(norm, norm, 1e-6, norm, norm)
    yield kv_store, (qkv, rows, norms, rope, LayerKV(k, k, index_k))
    rope = new(4096, DIM, dtype=torch.float32)
    yield draft_kv_store, (qkv[:, :main], rows, rope, kv)
    joined, columns = new(4, 2 * HIDDEN), 2 * GROUPS * DIM
    yield draft_kv_fill, (joined, new(columns, 2 * HIDDEN), None, ints(4), ints(4), rope, kv)
    if cache == qkv.dtype:
        k = new(8, BLOCK, HEADS, DIM)
        yield draft_kv_store, (new(4, 3 * HEADS * DIM), rows, rope, LayerKV(k, k))


def _attention(
    new: Any, ints: Any, rows: int, batch: int, blocks: int, cache: torch.dtype
) -> Iterator[Call]:
    q, index_q = new(rows, HEADS, DIM), new(rows, GROUPS, INDEX_DIM)
    k, index_k = new(64, BLOCK, GROUPS, DIM, dtype=cache), new(64, BLOCK, INDEX_DIM, dtype=cache)
    kv, where = LayerKV(k, k, index_k), _rows(ints, rows, batch, blocks)
    yield attention_dense, (q, kv, where, 0.1)
    if rows == batch and cache == q.dtype:
        # The draft with as many keys as heads; it has no key at position 0.
        heads = new(64, BLOCK, HEADS, DIM)
        yield attention_dense, (q, LayerKV(heads, heads), where, 0.1, 1)
    yield index_topk, (index_q, kv, where, TOPK, 0, 1)
    ids = ints(rows, GROUPS, TOPK, dtype=torch.int32)
    yield attention_sparse, (q, kv, ids, where, 0.1)


def _prefill(new: Any, ints: Any, cache: torch.dtype) -> Iterator[Call]:
    q_lens, rows = (1024, 1000), 2048
    q, index_q = new(rows, HEADS, DIM), new(rows, GROUPS, INDEX_DIM)
    k, index_k = new(64, BLOCK, GROUPS, DIM, dtype=cache), new(64, BLOCK, INDEX_DIM, dtype=cache)
    sums = ints(3, dtype=torch.int32)
    where = _rows(ints, rows, 2, 64)._replace(cu_seqlens=sums, q_lens=q_lens)
    kv = LayerKV(k, k, index_k)
    yield attention_dense, (q, kv, where, 0.1)
    if cache == q.dtype:
        heads = new(64, BLOCK, HEADS, DIM)
        yield attention_dense, (q, LayerKV(heads, heads), where, 0.1, 1)
    yield index_topk, (index_q, kv, where, TOPK, 0, 1)
    ids = ints(rows, GROUPS, TOPK, dtype=torch.int32)
    yield attention_sparse, (q, kv, ids, where, 0.1)
