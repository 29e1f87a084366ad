# mypy: allow-untyped-defs, allow-incomplete-defs
"""The lightning indexer: a score for each block of keys, and the blocks a row attends to."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import (
    CACHES,
    FLOATS,
    begin,
    cdiv,
    dot_dtype,
    jit,
    power_of_2,
    require,
    tl,
)
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import index_topk as reference
from eaglerun.kernels.rows import LayerKV, Rows
from eaglerun.kernels.vocab_argmax import index_of, ordered_key

# As in the reference; finite, because a kernel blends them.
INIT_SCORE, LOCAL_SCORE, NO_SCORE = 1e30, 1e29, -1e30


@jit
def _walk(
    q, k_ptr, out_ptr, table_ptr, position, live, keys, first, last,
    MASKED: tl.constexpr, NO_SCORE: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    DOT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of blocks first .. last. Not MASKED: every row sees all of their keys."""
    n = tl.arange(0, BLOCK_P)
    d = tl.arange(0, BLOCK_D)
    for c in range(first, last):
        t = c * PAGE + n
        held = (n < PAGE) & (t < keys)
        block = tl.load(table_ptr + c, mask=c * PAGE < keys, other=0)
        at = (block.to(tl.int64) * PAGE + n)[:, None] * D + d[None, :]
        there = (d < D)[None, :]
        if MASKED:
            there = there & held[:, None]
        k = tl.load(k_ptr + at, mask=there, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            visible = held[None, :] & (t[None, :] <= position[:, None])
            scores = tl.where(visible, scores, NO_SCORE)
        best = tl.max(scores, axis=1)
        # Zero, or NaN where one score is NaN (or infinite): such a block has none.
        nothing = tl.sum(scores * 0.0, axis=1)
        tl.store(out_ptr + c, tl.where(nothing == 0.0, best, NO_SCORE), mask=live)


@jit(varying=("table_row", "rows_per_seq", "columns"))
def _block_scores_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    positions_ptr,
    tables_ptr,
    seq_lens_ptr,
    cu_seqlens_ptr,
    q_row,
    table_row,
    rows_per_seq,
    columns,
    NO_SCORE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    RAGGED: tl.constexpr,
    FILL: tl.constexpr,
    PAGES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Scores of PAGES blocks of keys for a tile of (row, group) pairs of one sequence.

    FILL: blocks without a key of the sequence get NO_SCORE too, else they are left alone.
    """
    begin(OVERLAP)
    TOKENS: tl.constexpr = BLOCK_M // G
    first = tl.program_id(0) * PAGES
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if RAGGED:
        first_row = tl.load(cu_seqlens_ptr + b).to(tl.int64)
        count = tl.load(cu_seqlens_ptr + b + 1) - first_row
    else:
        first_row = b * rows_per_seq
        count = rows_per_seq
    if tile * TOKENS >= count:
        return
    m = tl.arange(0, BLOCK_M)
    token = tile * TOKENS + m // G
    live = (m < TOKENS * G) & (token < count)
    row = first_row + token
    position = tl.load(positions_ptr + row, mask=live, other=-1)
    seq_len = tl.load(seq_lens_ptr + b).to(tl.int64)
    keys = tl.minimum(tl.max(position, axis=0).to(tl.int64) + 1, seq_len)
    if FILL:
        last = tl.minimum(first + PAGES, columns)
    else:
        last = tl.minimum(first + PAGES, (keys + PAGE - 1) // PAGE).to(tl.int32)
    d = tl.arange(0, BLOCK_D)
    q_at = row[:, None] * q_row + (m % G)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    out_ptr = scores_ptr + (row * G + m % G) * columns
    table_ptr = tables_ptr + b * table_row
    masked = first
    if RAGGED and PAGE == BLOCK_P:
        # Blocks that every row sees whole need no mask.
        seen = tl.minimum(tl.min(tl.where(live, position, keys), axis=0).to(tl.int64) + 1, keys)
        masked = tl.maximum(first, tl.minimum(seen // PAGE, last)).to(tl.int32)
        _walk(
            q, k_ptr, out_ptr, table_ptr, position, live, keys, first, masked,
            False, NO_SCORE, D, PAGE, DOT, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    _walk(
        q, k_ptr, out_ptr, table_ptr, position, live, keys, masked, last,
        True, NO_SCORE, D, PAGE, DOT, BLOCK_P, BLOCK_D,
    )  # fmt: skip


@jit
def _keys(
    scores_ptr, start, causal, init_blocks, local_blocks,
    INIT_SCORE: tl.constexpr, LOCAL_SCORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = start + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + block, mask=block < causal, other=0.0)
    score = tl.where(block < init_blocks, INIT_SCORE, score)
    score = tl.where(block >= causal - local_blocks, LOCAL_SCORE, score)
    return tl.where(block < causal, ordered_key(score, block), -0x7FFFFFFFFFFFFFFF)


@jit(varying=("columns",))
def _topk_blocks_kernel(
    scores_ptr,
    positions_ptr,
    ids_ptr,
    columns,
    init_blocks,
    local_blocks,
    INIT_SCORE: tl.constexpr,
    LOCAL_SCORE: tl.constexpr,
    G: tl.constexpr,
    PAGE: tl.constexpr,
    TOPK: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """TOPK passes over one row's scores, each for the largest key below the one before.

    Nothing has to be kept sorted. ONE: the scores fit in a program's registers; else each pass
    reads them again, from the nearest cache.
    """
    begin(OVERLAP)
    at = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + at // G).to(tl.int64)
    causal = tl.where(position >= 0, position // PAGE + 1, 0).to(tl.int32)
    slot = tl.arange(0, BLOCK_K)
    none: tl.constexpr = 0x7FFFFFFF
    ids = tl.full([BLOCK_K], none, tl.int32)
    below = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    lowest = tl.full([], -0x7FFFFFFFFFFFFFFF, tl.int64)
    scores_ptr += at * columns
    if ONE:
        keys = _keys(
            scores_ptr, 0, causal, init_blocks, local_blocks, INIT_SCORE, LOCAL_SCORE, BLOCK
        )
    for i in range(0, tl.minimum(causal, TOPK)):
        if ONE:
            best = tl.max(tl.where(keys < below, keys, lowest), axis=0)
        else:
            best = lowest
            for start in range(0, causal, BLOCK):
                keys = _keys(
                    scores_ptr, start, causal, init_blocks, local_blocks, INIT_SCORE, LOCAL_SCORE,
                    BLOCK,
                )  # fmt: skip
                best = tl.maximum(best, tl.max(tl.where(keys < below, keys, lowest), axis=0))
        ids = tl.where(slot == i, index_of(best).to(tl.int32), ids)
        below = best
    # Ascending ids: the place of each is the number of smaller ones.
    smaller = (ids[None, :] < ids[:, None]) | (
        (ids[None, :] == ids[:, None]) & (slot[None, :] < slot[:, None])
    )
    place = tl.sum(smaller.to(tl.int32), axis=1)
    out = tl.where(ids == none, -1, ids)
    tl.store(ids_ptr + at * TOPK + place, out, mask=place < TOPK)


@paired(reference.block_scores)
def block_scores(index_q: Tensor, kv: LayerKV, rows: Rows) -> Tensor:
    """The best index score in every block of keys, for uniform rows.

    S[n, g, c] = max over t in block c, t <= positions[n], t < seq_lens[b] of
                 index_q[n, g] . index_k[t]; -1e30 where the block holds no such key, or a NaN.

    Shapes  index_q [N, G, Di] contiguous; kv.index_k [num_blocks, block_size, Di] contiguous;
            returns [N, G, ceil(max_seq_len / block_size)]. Di <= 256, G <= 64.
    Dtypes  index_q bf16, fp16 or fp32; the cache the same, bf16 or fp8 (e4m3fn, scale 1), cast
            to index_q.dtype as it is read; products and sums in fp32, returned so.
    Error   1e-5 of |q| |k|; a product beyond fp32 counts as a NaN. A row's bits do not depend on
            other sequences, and in a batch-invariant engine (launch.invariant) not on the rows of
            its own.
    Raises  ValueError on ragged rows, when N is no multiple of B, and on another shape, stride or
            dtype.
    Source  MiniMaxM3VLIndexer (transformers 5.23, models/minimax_m3_vl).
    """
    require(rows.cu_seqlens is None, "block_scores", rows=rows)
    return _scores("block_scores", index_q, kv, rows, fill=True)


@paired(reference.topk_blocks)
def topk_blocks(
    scores: Tensor,
    positions: Tensor,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """The blocks a row attends to: forced ones first, then by score, lower block id on a tie.

    Of the nb = positions[n] // block_size + 1 causal blocks, c >= nb - local_blocks are forced
    with score 1e29 and the other c < init_blocks with 1e30; the topk best are taken.

    Shapes  scores [N, G, C] fp32 contiguous, without NaN in causal blocks, the others are not
            read; positions [N]; returns [N, G, topk] int32, ascending block ids packed to the
            left, -1 in the slots that are left.
    Error   none: equal to the reference.
    Raises  ValueError on another shape, stride or dtype.
    Source  as block_scores, with the forced blocks of vLLM 0.33.0 (models/minimax_m3/common/ops).
    """
    rows, groups, columns = scores.shape
    require(
        scores.dtype == torch.float32
        and scores.is_contiguous()
        and positions.shape == (rows,)
        and positions.is_contiguous(),
        "topk_blocks",
        scores=scores,
        positions=positions,
    )
    ids = torch.empty(rows, groups, topk, dtype=torch.int32, device=scores.device)
    if ids.numel():
        size = "short" if columns <= 128 else "middle" if columns <= 1024 else "long"
        launch = settings(f"topk_{size}", scores)
        block = launch.pop("BLOCK")
        _topk_blocks_kernel[(rows * groups,)](
            scores,
            positions,
            ids,
            columns,
            init_blocks,
            local_blocks,
            INIT_SCORE=INIT_SCORE,
            LOCAL_SCORE=LOCAL_SCORE,
            G=groups,
            PAGE=block_size,
            TOPK=topk,
            BLOCK_K=power_of_2(topk),
            ONE=columns <= block,
            BLOCK=min(block, power_of_2(columns, 16)),
            **launch,
        )
    return ids


@paired(reference.index_topk)
def index_topk(
    index_q: Tensor,
    kv: LayerKV,
    rows: Rows,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """topk_blocks of block_scores: index q and cache in, block ids out.

    Shapes  inputs as block_scores, rows uniform or ragged; returns [N, G, topk] int32 as
            topk_blocks; all -1 for rows of padding (position -1) and of no sequence.
    Dtypes, Raises  as block_scores.
    Error   equal to the reference but where two scores are closer than block_scores' error, and
            where it counts a product as a NaN. A ragged row's bits do not depend on the rows
            beside it in a batch-invariant engine (launch.invariant).
    """
    scores = _scores("index_topk", index_q, kv, rows, fill=False)
    positions, size = rows.positions, kv.index_keys("index_topk").shape[1]
    forced = (topk, init_blocks, local_blocks)
    if rows.cu_seqlens is None:
        return topk_blocks.kernel(scores, positions, size, *forced)
    used = sum(rows.q_lens)
    ids = topk_blocks.kernel(scores[:used], positions[:used], size, *forced)
    if used == index_q.shape[0]:
        return ids
    return torch.nn.functional.pad(ids, (0, 0, 0, 0, 0, index_q.shape[0] - used), value=-1)


def _scores(name: str, index_q: Tensor, kv: LayerKV, rows: Rows, *, fill: bool) -> Tensor:
    """block_scores of rows of either form; without ``fill`` the blocks past a tile's last key are
    left unwritten."""
    index_k, positions, tables = kv.index_keys(name), rows.positions, rows.block_tables
    count, groups, dim = index_q.shape
    page = index_k.shape[1]
    ragged = rows.cu_seqlens is not None
    require(
        index_q.is_contiguous()
        and index_k.is_contiguous()
        and index_k.shape[2] == dim
        and index_q.dtype in FLOATS
        and index_k.dtype in (index_q.dtype, *CACHES)
        and dim <= 256
        and groups <= 64
        and page <= 256
        and positions.shape == (count,)
        and positions.is_contiguous()
        and tables.dtype == torch.int32
        and tables.stride(1) == 1
        and rows.seq_lens.shape == tables.shape[:1]
        and rows.seq_lens.is_contiguous()
        and not rows.misfit(),
        name,
        index_q=index_q,
        index_k=index_k,
        rows=rows,
    )
    columns = cdiv(rows.max_seq_len, page)
    scores = torch.empty(count, groups, columns, dtype=torch.float32, device=index_q.device)
    per_seq = rows.longest
    if not per_seq or not scores.numel():
        return scores
    block_p, block_d = power_of_2(page, 16), power_of_2(dim, 16)
    regime = "prefill" if ragged else "decode"
    launch = settings(f"index_scores_{regime}", index_q, tile=block_p)
    pairs = min(power_of_2(per_seq * groups), launch.pop("MAX_M"))
    block_m = max(pairs, launch.pop("MIN_M"), power_of_2(groups))
    if block_p * block_d > 1 << 15:
        launch["num_stages"] = 1  # Two tiles of such keys would not fit.
    tiles = cdiv(per_seq, block_m // groups)
    _block_scores_kernel[(cdiv(columns, launch["PAGES"]), tiles, tables.shape[0])](
        index_q,
        index_k,
        scores,
        positions,
        tables,
        rows.seq_lens,
        rows.seq_lens if rows.cu_seqlens is None else rows.cu_seqlens,
        index_q.stride(0),
        tables.stride(0),
        per_seq,
        columns,
        NO_SCORE=NO_SCORE,
        G=groups,
        D=dim,
        PAGE=page,
        RAGGED=ragged,
        FILL=fill,
        DOT=dot_dtype(index_q.dtype),
        BLOCK_M=block_m,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        **launch,
    )
    return scores
