# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over the selected blocks of the paged cache.

One program holds the query heads of one row and group, for each has a selection of its own. Of
uniform rows, slots [s * PER_SPLIT, (s + 1) * PER_SPLIT) of the selection go to split s.
"""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.attention_dense import (
    LOG2_E,
    attend_tile,
    check,
    finish,
    merge_kernel,
    parts,
    ragged_output,
)
from eaglerun.kernels.language import begin, cdiv, dot_dtype, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import attention_sparse as reference


@jit
def _attention_sparse_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    ids_ptr,
    positions_ptr,
    tables_ptr,
    seq_lens_ptr,
    cu_seqlens_ptr,
    q_row,
    q_head,
    table_row,
    rows_per_seq,
    topk,
    scale,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    RAGGED: tl.constexpr,
    SPLITS: tl.constexpr,
    PER_SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    group = tl.program_id(1) % G
    split = tl.program_id(1) // G
    b = tl.program_id(2).to(tl.int64)
    token = tl.program_id(0)
    if RAGGED:
        first_row = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        if token >= tl.load(cu_seqlens_ptr + b + 1) - first_row:
            return
    else:
        first_row = b * rows_per_seq
    row = first_row + token
    position = tl.load(positions_ptr + row).to(tl.int64)
    keys = tl.minimum(position + 1, tl.load(seq_lens_ptr + b).to(tl.int64))
    m = tl.arange(0, BLOCK_M)
    live = m < RATIO
    head = group * RATIO + m
    d = tl.arange(0, BLOCK_D)
    q_at = row * q_row + head[:, None] * q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)
    chosen = ids_ptr + (row * G + group) * topk + split * PER_SPLIT
    slots = tl.minimum(topk - split * PER_SPLIT, PER_SPLIT)
    for i in range(0, (slots * PAGE + BLOCK_N - 1) // BLOCK_N):
        if PAGE % BLOCK_N == 0:
            c = tl.load(chosen + i * BLOCK_N // PAGE)
            offset = i * BLOCK_N % PAGE + n
            t = tl.maximum(c, 0) * PAGE + offset
            held = t < tl.where(c >= 0, keys, 0)
            block = tl.load(tables_ptr + b * table_row + c, mask=(c >= 0) & (keys > 0), other=0)
        else:
            at = i * BLOCK_N + n
            c = tl.load(chosen + at // PAGE, mask=at < slots * PAGE, other=-1)
            offset = at % PAGE
            t = c * PAGE + offset
            held = (c >= 0) & (t < keys)
            block = tl.load(tables_ptr + b * table_row + c, mask=held, other=0)
        at = ((block.to(tl.int64) * PAGE + offset) * G + group)[:, None] * D + d[None, :]
        there = held[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=there, other=0.0).to(DOT)
        v = tl.load(v_ptr + at, mask=there, other=0.0).to(DOT)
        acc, top, total = attend_tile(acc, top, total, q, k, v, held[None, :], scale, True, DOT)
    finish(
        acc, top, total, out_ptr, part_ptr, lse_ptr, row * (G * RATIO) + head, live, d, split,
        D, SPLITS,
    )  # fmt: skip


@paired(reference.attention_sparse)
def attention_sparse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
) -> Tensor:
    """Attention of uniform rows, each group to its own selection of blocks.

    Row n of sequence b = n // (N / B), group g, sees the keys
        t <= positions[n], t < seq_lens[b], t // block_size in block_ids[n, g];
    the rest as attention_dense, which it equals when every causal block is selected. Unselected
    keys are absent from the denominator and are not read.

    Shapes  as attention_dense; block_ids [N, G, topk] int32 contiguous, block numbers inside the
            sequence in any order, none twice, -1 unused; returns [N, H, D].
    Dtypes  as attention_dense.
    Error   as attention_dense. A row's bits depend on its selection (its order too) and its own
            keys alone.
    Raises  as attention_dense.
    Source  MiniMaxM3VLIndexer.build_block_mask (transformers 5.23, models/minimax_m3_vl).
    """
    batch = block_tables.shape[0]
    require(q.shape[0] % max(batch, 1) == 0, "attention_sparse", q=q, block_tables=block_tables)
    return _launch(
        "attention_sparse",
        q,
        k_cache,
        v_cache,
        block_ids,
        positions,
        block_tables,
        seq_lens,
        None,
        (),
        scale,
    )


@paired(reference.attention_sparse_ragged)
def attention_sparse_ragged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    q_lens: tuple[int, ...],
    max_seq_len: int,
    scale: float,
) -> Tensor:
    """attention_sparse with q_lens[b] rows for sequence b: prefill chunks.

    Shapes  as attention_sparse; cu_seqlens_q [B + 1] int32 the running sum of q_lens; rows past
            the last are zero.
    Dtypes, Error, Raises  as attention_sparse.
    """
    require(
        len(q_lens) + 1 == cu_seqlens_q.shape[0]
        and cu_seqlens_q.is_contiguous()
        and len(q_lens) == block_tables.shape[0],
        "attention_sparse_ragged",
        cu_seqlens_q=cu_seqlens_q,
        q_lens=q_lens,
    )
    return _launch(
        "attention_sparse_ragged",
        q,
        k_cache,
        v_cache,
        block_ids,
        positions,
        block_tables,
        seq_lens,
        cu_seqlens_q,
        q_lens,
        scale,
    )


def _launch(
    name: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor | None,
    q_lens: tuple[int, ...],
    scale: float,
) -> Tensor:
    check(name, q, k_cache, v_cache, positions, block_tables, seq_lens)
    groups, topk = k_cache.shape[2], block_ids.shape[-1]
    require(
        block_ids.shape == (q.shape[0], groups, topk)
        and block_ids.dtype == torch.int32
        and block_ids.is_contiguous(),
        name,
        q=q,
        block_ids=block_ids,
    )
    ragged = cu_seqlens_q is not None
    out = ragged_output(q, q_lens if ragged else (q.shape[0],))
    rows, heads, dim = q.shape
    batch = block_tables.shape[0]
    per_seq = max(q_lens, default=0) if ragged else rows // max(batch, 1)
    if not per_seq or not q.numel():
        return out
    launch = settings("attention_sparse_prefill" if ragged else "attention_sparse_decode", q)
    per_split = topk if ragged else min(launch.pop("PER_SPLIT"), topk)
    splits = cdiv(topk, per_split)
    part, lse = parts(q, splits)
    _attention_sparse_kernel[(per_seq, groups * splits, batch)](
        q,
        k_cache,
        v_cache,
        out,
        part,
        lse,
        block_ids,
        positions,
        block_tables,
        seq_lens,
        seq_lens if cu_seqlens_q is None else cu_seqlens_q,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        per_seq,
        topk,
        scale * LOG2_E,
        G=groups,
        RATIO=heads // groups,
        D=dim,
        PAGE=k_cache.shape[1],
        RAGGED=ragged,
        SPLITS=splits,
        PER_SPLIT=per_split,
        DOT=dot_dtype(q.dtype),
        BLOCK_M=power_of_2(heads // groups, 16),
        BLOCK_D=power_of_2(dim, 16),
        **launch,
    )
    if splits > 1:
        merge_kernel[(rows * heads,)](
            part,
            lse,
            out,
            positions,
            seq_lens,
            per_seq,
            H=heads,
            D=dim,
            SPLITS=splits,
            CHUNK=0,
            BLOCK_S=power_of_2(splits),
            BLOCK_D=power_of_2(dim),
            **settings("attention_merge", q),
        )
    return out
