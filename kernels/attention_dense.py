# mypy: allow-untyped-defs, allow-incomplete-defs
"""Full attention over the paged cache: uniform rows (decode, verify) and ragged ones (prefill).

A program holds up to BLOCK_M (row, query head) pairs of one KV group, so that the group's keys
are read once for them all, and walks keys in tiles with a running softmax. Of uniform rows the
keys are split: chunk c of CHUNK keys belongs to program c % SPLITS, and _merge_kernel joins the
parts. Chunks and their order are functions of the key's position alone, so that what lies past a
row's own keys (a longer neighbour, a larger max_seq_len) changes none of its bits.
"""

import math

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import (
    CACHES,
    FLOATS,
    begin,
    cdiv,
    descriptor,
    dot_dtype,
    jit,
    power_of_2,
    require,
    tl,
)
from eaglerun.kernels.launch import Settings, attention_regime, settings
from eaglerun.kernels.reference import attention_dense as reference
from eaglerun.kernels.rows import LayerKV, Rows

LOG2_E = math.log2(math.e)


@jit
def attend_tile(
    acc, top, total, q, k, v, visible, scale, MASKED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """One tile of keys into the running softmax (base 2) of a tile of rows.

    A tile that a row does not see changes none of the row's bits, and one that all rows see gives
    the same with MASKED and without: what a compiler might round once or twice is said as fma.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, axis=1) * scale)
    # Rows that have seen nothing yet: -inf - -inf would be NaN.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), -base[:, None]))
    decay = tl.exp2(top - base)
    total = tl.fma(total, decay, tl.sum(p, axis=1))
    acc = tl.dot(p.to(DOT), v, acc * decay[:, None], input_precision="ieee")
    return acc, new, total


@jit
def finish(
    acc, top, total, out_ptr, part_ptr, lse_ptr, rows, live, d, split,
    D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Store the attention of (row, head) pairs ``rows``, or of this split of their keys."""
    seen = total > 0.0
    out = acc / tl.where(seen, total, 1.0)[:, None]
    mask = live[:, None] & (d < D)[None, :]
    if SPLITS == 1:
        tl.store(out_ptr + rows[:, None] * D + d[None, :], out, mask=mask)
    else:
        part = rows * SPLITS + split
        tl.store(part_ptr + part[:, None] * D + d[None, :], out, mask=mask)
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        tl.store(lse_ptr + part, lse, mask=live)


@jit
def _walk(
    acc, top, total, q, k_ptr, v_ptr, table_ptr, position, keys, group, split,
    first, last, scale, first_key, window,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
    WINDOWED: tl.constexpr, DESCRIBED: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tiles first .. last of this split's keys. Not MASKED: every row sees all of their keys.
    DESCRIBED: k_ptr and v_ptr describe the caches as [slots, G * D] to the unit that copies tiles,
    so that the warps compute no addresses."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    PER_CHUNK: tl.constexpr = CHUNK // BLOCK_N
    for i in range(first, last):
        if SPLITS == 1:
            start = i * BLOCK_N
        else:
            start = (split + i // PER_CHUNK * SPLITS) * CHUNK + i % PER_CHUNK * BLOCK_N
        t = start + n
        held = (t < keys) & (t >= first_key)
        if PAGE % BLOCK_N == 0:
            block = tl.load(table_ptr + start // PAGE, mask=start < keys, other=0)
            slot = block.to(tl.int64) * PAGE + start % PAGE + n
        else:
            block = tl.load(table_ptr + t // PAGE, mask=held, other=0)
            slot = block.to(tl.int64) * PAGE + t % PAGE
        if DESCRIBED:
            row = block * PAGE + start % PAGE
            k = k_ptr.load([row, group * D]).to(DOT)
            v = v_ptr.load([row, group * D]).to(DOT)
        else:
            at = (slot * G + group)[:, None] * D + d[None, :]
            there = (d < D)[None, :]
            if MASKED:
                there = there & held[:, None]
            k = tl.load(k_ptr + at, mask=there, other=0.0).to(DOT)
            v = tl.load(v_ptr + at, mask=there, other=0.0).to(DOT)
        visible = held[None, :] & (t[None, :] <= position[:, None])
        if WINDOWED:
            visible &= t[None, :] > position[:, None] - window
        acc, top, total = attend_tile(acc, top, total, q, k, v, visible, scale, MASKED, DOT)
    return acc, top, total


@jit(varying=("table_row", "rows_per_seq"))
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    open_k_ptr,
    open_v_ptr,
    out_ptr,
    part_ptr,
    lse_ptr,
    positions_ptr,
    tables_ptr,
    seq_lens_ptr,
    cu_seqlens_ptr,
    q_row,
    q_head,
    table_row,
    rows_per_seq,
    scale,
    first_key,
    window,
    G: tl.constexpr,
    RATIO: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    RAGGED: tl.constexpr,
    WINDOWED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A tile of (row, head) pairs of one KV group and sequence over its keys, or over a split of
    them. open_k_ptr and open_v_ptr: the caches for tiles without a mask, DESCRIBED as in _walk."""
    begin(OVERLAP)
    TOKENS: tl.constexpr = BLOCK_M // RATIO
    tile = tl.program_id(0)
    group = tl.program_id(1) % G
    split = tl.program_id(1) // G
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
    token = tile * TOKENS + m // RATIO
    live = (m < TOKENS * RATIO) & (token < count)
    row = first_row + token
    position = tl.load(positions_ptr + row, mask=live, other=-1)
    seq_len = tl.load(seq_lens_ptr + b).to(tl.int64)
    keys = tl.minimum(tl.max(position, axis=0).to(tl.int64) + 1, seq_len)
    if SPLITS > 1:
        if split * CHUNK >= keys:
            return
    head = group * RATIO + m % RATIO
    d = tl.arange(0, BLOCK_D)
    q_at = row[:, None] * q_row + head[:, None] * q_head + d[None, :]
    q = tl.load(q_ptr + q_at, mask=live[:, None] & (d < D)[None, :], other=0.0).to(DOT)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SPLITS == 1:
        tiles = (keys + BLOCK_N - 1) // BLOCK_N
    else:
        chunks = (keys + CHUNK - 1) // CHUNK
        tiles = (chunks - split + SPLITS - 1) // SPLITS * (CHUNK // BLOCK_N)
    table_ptr = tables_ptr + b * table_row
    open_tiles = 0
    if RAGGED and not WINDOWED:
        if PAGE % BLOCK_N == 0:
            # Tiles that every row sees whole need no mask.
            seen = tl.minimum(tl.min(tl.where(live, position, keys), axis=0).to(tl.int64) + 1, keys)
            open_tiles = tl.where(first_key < 1, seen // BLOCK_N, 0).to(tl.int32)
            acc, top, total = _walk(
                acc, top, total, q, open_k_ptr, open_v_ptr, table_ptr, position, keys, group,
                split, 0, open_tiles, scale, first_key, window,
                G, D, PAGE, False, False, DESCRIBED, SPLITS, CHUNK, DOT, BLOCK_N, BLOCK_D,
            )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, q, k_ptr, v_ptr, table_ptr, position, keys, group, split,
        open_tiles, tiles.to(tl.int32), scale, first_key, window,
        G, D, PAGE, True, WINDOWED, False, SPLITS, CHUNK, DOT, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    finish(
        acc, top, total, out_ptr, part_ptr, lse_ptr, row * (G * RATIO) + head, live, d, split,
        D, SPLITS,
    )  # fmt: skip


@jit(varying=("rows_per_seq",))
def merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    positions_ptr,
    seq_lens_ptr,
    rows_per_seq,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Join the splits of one (row, head): weights 2^(lse - max). CHUNK 0: every split was
    written; else those whose first chunk holds a key of the row."""
    begin(OVERLAP)
    at = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    if CHUNK:
        row = at // H
        seq_len = tl.load(seq_lens_ptr + row // rows_per_seq).to(tl.int64)
        keys = tl.minimum(tl.load(positions_ptr + row).to(tl.int64) + 1, seq_len)
        written = (s < SPLITS) & (s * CHUNK < keys)
    else:
        written = s < SPLITS
    lse = tl.load(lse_ptr + at * SPLITS + s, mask=written, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    d = tl.arange(0, BLOCK_D)
    part_at = (at * SPLITS + s)[:, None] * D + d[None, :]
    part = tl.load(part_ptr + part_at, mask=written[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(weight, axis=0)
    out = tl.sum(part * weight[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + at * D + d, out, mask=d < D)


@paired(reference.attention_dense)
def attention_dense(
    q: Tensor,
    kv: LayerKV,
    rows: Rows,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of every row to the keys of its sequence.

    Row n of sequence b sees the keys
        t in [max(first_key, positions[n] - window + 1), positions[n]], t < seq_lens[b];
    o[n, h] = sum_t softmax_t(q[n, h] . k[t, g] * scale) v[t, g] with g = h // (H / G).
    A row that sees no key (padding: position -1) and one of no sequence are zero. Cells at
    t >= seq_lens[b] and t < first_key are never read.

    Shapes  q [N, H, D], last dim contiguous; kv.k, kv.v [num_blocks, block_size, G, D] contiguous;
            rows uniform or ragged; returns [N, H, D]. D <= 256, H / G <= 128, scale > 0. N may
            be 0.
    Dtypes  q bf16, fp16 or fp32; the caches alike, of q.dtype, bf16 or fp8 (e4m3fn, scale 1),
            cast to q.dtype as they are read (exactly, of fp8); scores, softmax and sums in fp32,
            the softmax weights rounded to q.dtype before they meet v, one cast to q.dtype.
    Error   3e-3 absolute in bf16 where |v| <= 1 (1e-5 in fp32). A uniform row's bits depend on
            the rows of a sequence and on its own keys, not on the number of sequences, their
            lengths or max_seq_len; in a batch-invariant engine (launch.invariant) not on the rows
            of a sequence either. A ragged row's bits depend on its own keys alone.
    Raises  ValueError when N is no multiple of B or H none of G, and on another shape, stride
            or dtype.
    Source  Vaswani et al. 2017, arXiv:1706.03762, eq. 1; pages as Kwon et al. 2023,
            arXiv:2309.06180, section 4.3; the merge as Dao et al., flash-decoding (2023).
    """
    check("attention_dense", q, kv, rows, scale)
    out = row_output(q, rows)
    per_seq = rows.longest
    if not per_seq or not q.numel():
        return out
    heads, dim = q.shape[1:]
    page, groups = kv.k.shape[1:3]
    ratio, batch = heads // groups, rows.block_tables.shape[0]
    ragged = rows.cu_seqlens is not None
    if ragged:
        launch = settings("attention_prefill", q, tile=dim)
        chunk, limit, splits = launch["BLOCK_N"], 1, 1
        block_m = max(launch.pop("BLOCK_M"), power_of_2(ratio))
    else:
        pairs = power_of_2(per_seq * ratio, 16)
        launch = settings(f"attention_{attention_regime(pairs)}", q, tile=dim)
        chunk, limit = launch.pop("CHUNK"), launch.pop("SPLITS")
        splits = _splits(rows.max_seq_len, chunk, limit)
        block_m = max(min(pairs, launch.pop("MAX_M")), launch.pop("MIN_M"), power_of_2(ratio))
    part, lse = (out, out) if ragged else parts(q, splits)
    open_tiles = ragged and page % launch["BLOCK_N"] == 0 and window is None and first_key < 1
    open_caches = described(q, kv, launch, open_tiles)
    _attention_kernel[(cdiv(per_seq, block_m // ratio), groups * splits, batch)](
        q,
        kv.k,
        kv.v,
        *open_caches,
        out,
        part,
        lse,
        rows.positions,
        rows.block_tables,
        rows.seq_lens,
        rows.seq_lens if rows.cu_seqlens is None else rows.cu_seqlens,
        q.stride(0),
        q.stride(1),
        rows.block_tables.stride(0),
        0 if ragged else per_seq,
        scale * LOG2_E,
        first_key,
        0 if window is None else window,
        G=groups,
        RATIO=ratio,
        D=dim,
        PAGE=page,
        RAGGED=ragged,
        WINDOWED=window is not None,
        SPLITS=splits,
        CHUNK=chunk,
        DOT=dot_dtype(q.dtype),
        BLOCK_M=block_m,
        BLOCK_D=power_of_2(dim, 16),
        **launch,
    )
    if splits > 1:
        # The limit, not the number in use: a sum over another width adds in another order.
        merge(part, lse, out, rows, chunk, power_of_2(limit))
    return out


def _splits(longest: int, chunk: int, limit: int) -> int:
    """How many programs share a row's keys: at least one for each of its chunks, up to ``limit``.

    Each number is a program of its own, so there are few: powers of two, and five fourths of them
    for keys just above (a draft is told of a key more than the blocks that its target selects).
    Fours, so that the merge loads its sums by the same vectors whatever max_seq_len is.
    """
    if longest <= chunk:
        return 1
    needed = cdiv(longest, chunk)
    splits = power_of_2(needed, 4)
    above = splits // 2 * 5 // 4
    return min(limit, above if needed <= above and above % 4 == 0 else splits)


# Shared with attention_sparse.


def check(name: str, q: Tensor, kv: LayerKV, rows: Rows, scale: float) -> None:
    k, v, positions, tables = kv.k, kv.v, rows.positions, rows.block_tables
    groups, dim = k.shape[2:]
    require(
        q.ndim == 3
        and q.shape[2] == dim
        and q.shape[1] % groups == 0
        and q.shape[1] <= 128 * groups
        and dim <= 256
        and q.stride(2) == 1
        and q.dtype in FLOATS
        and k.dtype == v.dtype
        and k.dtype in (q.dtype, *CACHES)
        and k.shape == v.shape
        and k.is_contiguous()
        and v.is_contiguous()
        and positions.shape == q.shape[:1]
        and positions.is_contiguous()
        and tables.dtype == torch.int32
        and tables.stride(1) == 1
        and rows.seq_lens.shape == tables.shape[:1]
        and rows.seq_lens.is_contiguous()
        and not rows.misfit()
        and scale > 0,
        name,
        q=q,
        kv=kv,
        rows=rows,
        scale=scale,
    )


def described(q: Tensor, kv: LayerKV, launch: Settings, open_tiles: bool) -> list[object]:
    """The caches for tiles without a mask, of which there are any with ``open_tiles``: as they
    are, or where ``launch`` says DESCRIBED and their tiles can be copied, each as a descriptor
    [slots, G * D]. DESCRIBED then says which."""
    groups, dim = kv.k.shape[2:]
    caches = [kv.k, kv.v]
    launch["DESCRIBED"] = (
        bool(launch.get("DESCRIBED", 0))
        and open_tiles
        and kv.k.dtype == q.dtype
        and dim == power_of_2(dim, 16)
        and all(cache.data_ptr() % 16 == 0 for cache in caches)
    )
    if not launch["DESCRIBED"]:
        return [*caches]
    return [descriptor(c.view(-1, groups * dim), [launch["BLOCK_N"], dim]) for c in caches]


def parts(q: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where the splits of each (row, head) go, and the log2 of their sums."""
    if splits == 1:
        return q, q
    rows, heads, dim = q.shape
    part = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=q.device)
    return part, part.new_empty(rows, heads, splits)


def merge(part: Tensor, lse: Tensor, out: Tensor, rows: Rows, chunk: int, width: int) -> None:
    """Join the ``parts`` of uniform rows into ``out``, as sums of ``width``; ``chunk`` as
    merge_kernel's."""
    count, heads, splits, dim = part.shape
    merge_kernel[(count * heads,)](
        part,
        lse,
        out,
        rows.positions,
        rows.seq_lens,
        rows.longest,
        H=heads,
        D=dim,
        SPLITS=splits,
        CHUNK=chunk,
        BLOCK_S=width,
        BLOCK_D=power_of_2(dim),
        **settings("attention_merge", out),
    )


def row_output(q: Tensor, rows: Rows) -> Tensor:
    """Allocate the output of the attention of q; the rows of no sequence are zero already."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows.cu_seqlens is not None:
        out[sum(rows.q_lens) :].zero_()
    return out
