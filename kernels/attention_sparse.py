# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention over the selected blocks of the paged cache.

One program holds the query heads of one row and group, for each has a selection of its own. Of
uniform rows, slots [s * PER_SPLIT, (s + 1) * PER_SPLIT) of the selection go to split s, as many
as hold CHUNK keys.

Rows of a prefill chunk that stand side by side may also share a program (the launch table's
SHARE): it walks the union of their blocks, in ascending order, and each row sees its own. Blocks
are then a multiple of a tile of keys.
"""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.attention_dense import (
    LOG2_E,
    attend_tile,
    check,
    described,
    finish,
    merge,
    parts,
    row_output,
)
from eaglerun.kernels.language import begin, cdiv, dot_dtype, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import attention_sparse as reference
from eaglerun.kernels.rows import LayerKV, Rows


@jit
def _walk(
    acc, top, total, q, k_ptr, v_ptr, chosen_ptr, table_ptr, slots, keys, group, first, last, scale,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles first .. last of the blocks chosen. Not MASKED: their keys are all there.
    DESCRIBED: as in attention_dense."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for i in range(first, last):
        if PAGE % BLOCK_N == 0:
            c = tl.load(chosen_ptr + i * BLOCK_N // PAGE)
            start = i * BLOCK_N % PAGE
            offset = start + n
            t = tl.maximum(c, 0) * PAGE + offset
            held = t < tl.where(c >= 0, keys, 0)
            block = tl.load(table_ptr + c, mask=(c >= 0) & (keys > 0), other=0)
        else:
            at = i * BLOCK_N + n
            c = tl.load(chosen_ptr + at // PAGE, mask=at < slots * PAGE, other=-1)
            offset = at % PAGE
            t = c * PAGE + offset
            held = (c >= 0) & (t < keys)
            block = tl.load(table_ptr + c, mask=held, other=0)
        if DESCRIBED:
            row = block * PAGE + start
            k = k_ptr.load([row, group * D]).to(DOT)
            v = v_ptr.load([row, group * D]).to(DOT)
        else:
            at = ((block.to(tl.int64) * PAGE + offset) * G + group)[:, None] * D + d[None, :]
            there = (d < D)[None, :]
            if MASKED:
                there = there & held[:, None]
            k = tl.load(k_ptr + at, mask=there, other=0.0).to(DOT)
            v = tl.load(v_ptr + at, mask=there, other=0.0).to(DOT)
        acc, top, total = attend_tile(acc, top, total, q, k, v, held[None, :], scale, MASKED, DOT)
    return acc, top, total


@jit(varying=("table_row", "rows_per_seq"))
def _attention_sparse_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    open_k_ptr,
    open_v_ptr,
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
    DESCRIBED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One row's heads of one group over its selection, or over a split of it. open_k_ptr and
    open_v_ptr: the caches for tiles without a mask, DESCRIBED as in attention_dense."""
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
    chosen_ptr = ids_ptr + (row * G + group) * topk + split * PER_SPLIT
    table_ptr = tables_ptr + b * table_row
    slots = tl.minimum(topk - split * PER_SPLIT, PER_SPLIT)
    tiles = (slots * PAGE + BLOCK_N - 1) // BLOCK_N
    open_tiles = 0
    if RAGGED and PAGE % BLOCK_N == 0:
        # Blocks that the row sees whole need no mask: all but the last, of a selection in order.
        s = tl.arange(0, BLOCK_S)
        c = tl.load(chosen_ptr + s, mask=s < slots, other=-1)
        whole = (c >= 0) & ((c + 1) * PAGE <= keys)
        open_tiles = tl.min(tl.where(whole, slots, s), axis=0) * (PAGE // BLOCK_N)
        acc, top, total = _walk(
            acc, top, total, q, open_k_ptr, open_v_ptr, chosen_ptr, table_ptr, slots, keys, group,
            0, open_tiles, scale, G, D, PAGE, False, DESCRIBED, DOT, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, k_ptr, v_ptr, chosen_ptr, table_ptr, slots, keys, group,
        open_tiles, tiles, scale, G, D, PAGE, True, False, DOT, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    finish(
        acc, top, total, out_ptr, part_ptr, lse_ptr, row * (G * RATIO) + head, live, d, split,
        D, SPLITS,
    )  # fmt: skip


@jit(varying=("tiles",))
def _union_kernel(
    ids_ptr,
    cu_seqlens_ptr,
    union_ptr,
    takers_ptr,
    count_ptr,
    topk,
    tiles,
    G: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The blocks that a tile of rows selects together, ascending, and which rows take each.

    Bit j of takers is the tile's row j. S = TOKENS * BLOCK_K places a (tile, group).
    """
    begin(OVERLAP)
    S: tl.constexpr = TOKENS * BLOCK_K
    tile = tl.program_id(0)
    group = tl.program_id(1)
    b = tl.program_id(2)
    first_row = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    rows = tl.load(cu_seqlens_ptr + b + 1) - first_row
    if tile * TOKENS >= rows:
        return
    s = tl.arange(0, S)
    token = tile * TOKENS + s // BLOCK_K
    at = ((first_row + token) * G + group) * topk + s % BLOCK_K
    ids = tl.load(ids_ptr + at, mask=(token < rows) & (s % BLOCK_K < topk), other=-1)
    again = tl.load(ids_ptr + at, mask=(token < rows) & (s % BLOCK_K < topk), other=-1)
    same = ids[:, None] == again[None, :]
    # Whether place s is the first of its block: along either side of the matrix.
    first = tl.max((same & (s[None, :] < s[:, None])).to(tl.int32), axis=1) == 0
    first_too = tl.max((same & (s[:, None] < s[None, :])).to(tl.int32), axis=0) == 0
    smaller = (again[None, :] < ids[:, None]) & (first_too & (again >= 0))[None, :]
    place = tl.sum(smaller.to(tl.int32), axis=1)
    takers = tl.sum(tl.where(same, (1 << (s // BLOCK_K))[None, :], 0), axis=1)
    kept = first & (ids >= 0)
    where = (b * tiles + tile) * G + group
    tl.store(union_ptr + where.to(tl.int64) * S + place, ids, mask=kept)
    tl.store(takers_ptr + where.to(tl.int64) * S + place, takers, mask=kept)
    tl.store(count_ptr + where, tl.sum(kept.to(tl.int32), axis=0))


@jit(varying=("table_row", "tiles"))
def _attention_union_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    union_ptr,
    takers_ptr,
    count_ptr,
    positions_ptr,
    tables_ptr,
    seq_lens_ptr,
    cu_seqlens_ptr,
    q_row,
    q_head,
    table_row,
    tiles,
    scale,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    TOKENS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PLACES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """TOKENS rows of one group over the union of their blocks.

    A tile of keys is of one block, and one that a row did not select changes none of the row's
    bits (attend_tile).
    """
    begin(OVERLAP)
    tile = tl.program_id(0)
    group = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first_row = tl.load(cu_seqlens_ptr + b).to(tl.int64)
    rows = tl.load(cu_seqlens_ptr + b + 1) - first_row
    if tile * TOKENS >= rows:
        return
    m = tl.arange(0, BLOCK_M)
    mine = m // RATIO
    live = (m < TOKENS * RATIO) & (tile * TOKENS + mine < rows)
    row = first_row + tile * TOKENS + mine
    position = tl.load(positions_ptr + row, mask=live, other=-1)
    seq_len = tl.load(seq_lens_ptr + b).to(tl.int64)
    keys = tl.minimum(tl.max(position, axis=0).to(tl.int64) + 1, seq_len)
    head = group * RATIO + m % RATIO
    d = tl.arange(0, BLOCK_D)
    q_at = row[:, None] * q_row + head[:, None] * q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)
    where = (b * tiles + tile) * G + group
    union_ptr += where * PLACES
    takers_ptr += where * PLACES
    count = tl.load(count_ptr + where)
    for i in range(0, count * (PAGE // BLOCK_N)):
        c = tl.load(union_ptr + i * BLOCK_N // PAGE)
        takers = tl.load(takers_ptr + i * BLOCK_N // PAGE)
        offset = i * BLOCK_N % PAGE + n
        t = c * PAGE + offset
        held = t < keys
        block = tl.load(tables_ptr + b * table_row + c, mask=c * PAGE < keys, other=0)
        taken = ((takers >> mine) & 1)[:, None] > 0
        at = ((block.to(tl.int64) * PAGE + offset) * G + group)[:, None] * D + d[None, :]
        there = held[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + at, mask=there, other=0.0).to(DOT)
        v = tl.load(v_ptr + at, mask=there, other=0.0).to(DOT)
        visible = taken & held[None, :] & (t[None, :] <= position[:, None])
        acc, top, total = attend_tile(acc, top, total, q, k, v, visible, scale, True, DOT)
    finish(acc, top, total, out_ptr, out_ptr, out_ptr, row * (G * RATIO) + head, live, d, 0, D, 1)


@paired(reference.attention_sparse)
def attention_sparse(q: Tensor, kv: LayerKV, block_ids: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention of every row, each group to its own selection of blocks.

    Row n of sequence b, group g, sees the keys
        t <= positions[n], t < seq_lens[b], t // block_size in block_ids[n, g];
    the rest as attention_dense, which it equals when every causal block is selected. Unselected
    keys are absent from the denominator and are not read.

    Shapes  as attention_dense; block_ids [N, G, topk] int32 contiguous, block numbers inside the
            sequence in any order, none twice, -1 unused; returns [N, H, D].
    Dtypes  as attention_dense.
    Error   as attention_dense. A row's bits depend on its selection (its order too, but where
            ragged rows share a program) and its own keys alone; in a batch-invariant engine
            (launch.invariant) they are attention_dense's where the selection is every causal
            block, ascending.
    Raises  as attention_dense.
    Source  MiniMaxM3VLIndexer.build_block_mask (transformers 5.23, models/minimax_m3_vl).
    """
    check("attention_sparse", q, kv, rows, scale)
    page, groups, topk = kv.k.shape[1], kv.k.shape[2], block_ids.shape[-1]
    require(
        block_ids.shape == (q.shape[0], groups, topk)
        and block_ids.dtype == torch.int32
        and block_ids.is_contiguous(),
        "attention_sparse",
        q=q,
        block_ids=block_ids,
    )
    out = row_output(q, rows)
    per_seq = rows.longest
    if not per_seq or not q.numel():
        return out
    heads, dim = q.shape[1:]
    ragged = rows.cu_seqlens is not None
    launch = settings("attention_sparse_prefill" if ragged else "attention_sparse_decode", q)
    share = launch.pop("SHARE", 0)
    # A tile of keys from several blocks would hang a row's sums on its neighbours' blocks.
    whole = page % settings("attention_sparse_union", q)["BLOCK_N"] == 0
    if ragged and share and whole:
        _shared(q, kv, block_ids, rows, scale, out)
        return out
    merged, least = launch.pop("MERGED", 1), launch.pop("MIN_M", 16)
    per_split = topk if ragged else max(launch.pop("CHUNK") // page, 1)
    splits = cdiv(topk, per_split)
    if splits > 1:
        splits = 4 * cdiv(splits, 4)  # as attention_dense's
    part, lse = parts(q, splits)
    open_caches = described(q, kv, launch, ragged and page % launch["BLOCK_N"] == 0)
    _attention_sparse_kernel[(per_seq, groups * splits, rows.block_tables.shape[0])](
        q,
        kv.k,
        kv.v,
        *open_caches,
        out,
        part,
        lse,
        block_ids,
        rows.positions,
        rows.block_tables,
        rows.seq_lens,
        rows.seq_lens if rows.cu_seqlens is None else rows.cu_seqlens,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        per_seq,
        topk,
        scale * LOG2_E,
        G=groups,
        RATIO=heads // groups,
        D=dim,
        PAGE=page,
        RAGGED=ragged,
        SPLITS=splits,
        PER_SPLIT=per_split,
        DOT=dot_dtype(q.dtype),
        BLOCK_M=power_of_2(heads // groups, least),
        BLOCK_S=power_of_2(topk),
        BLOCK_D=power_of_2(dim, 16),
        **launch,
    )
    if splits > 1:
        # At least as wide a sum as attention_dense's, where the two are to agree.
        merge(part, lse, out, rows, 0, power_of_2(splits, merged))
    return out


def _shared(
    q: Tensor, kv: LayerKV, block_ids: Tensor, rows: Rows, scale: float, out: Tensor
) -> None:
    """The ragged rows of ``out`` by tiles that share what they read."""
    heads, dim = q.shape[1:]
    page, groups = kv.k.shape[1:3]
    topk, batch = block_ids.shape[-1], rows.block_tables.shape[0]
    launch = settings("attention_sparse_union", q)
    # A power of two: rows are bits of a number, and places of a list.
    tokens = min(power_of_2(launch["BLOCK_M"] // (heads // groups) + 1) // 2, 16)
    # _union_kernel compares each place with each.
    tokens = max(1, min(tokens, 1024 // power_of_2(topk)))
    tiles, places = cdiv(rows.longest, tokens), tokens * power_of_2(topk)
    union = torch.empty(batch * tiles * groups, places, dtype=torch.int32, device=q.device)
    takers = torch.empty_like(union)
    count = torch.empty(batch * tiles * groups, dtype=torch.int32, device=q.device)
    grid = (tiles, groups, batch)
    _union_kernel[grid](
        block_ids,
        rows.cu_seqlens,
        union,
        takers,
        count,
        topk,
        tiles,
        G=groups,
        TOKENS=tokens,
        BLOCK_K=power_of_2(topk),
        **settings("union", q),
    )
    _attention_union_kernel[grid](
        q,
        kv.k,
        kv.v,
        out,
        union,
        takers,
        count,
        rows.positions,
        rows.block_tables,
        rows.seq_lens,
        rows.cu_seqlens,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        tiles,
        scale * LOG2_E,
        G=groups,
        RATIO=heads // groups,
        TOKENS=tokens,
        D=dim,
        PAGE=page,
        PLACES=places,
        DOT=dot_dtype(q.dtype),
        BLOCK_D=power_of_2(dim, 16),
        **launch,
    )
