# mypy: allow-untyped-defs, allow-incomplete-defs
"""From the rows of the qkv projection to rotated queries and written caches; of the draft's K and V
alone, from what is projected.
"""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import CACHES, FLOATS, begin, cdiv, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.linear import linear, product_parts
from eaglerun.kernels.reference import kv_store as reference
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows


@jit
def _narrowed(x, y_ptr):
    """x (fp32) as y_ptr's elements: the nearest, the even one of two; fp8 saturates at 448.

    To fp8 it is rounded here, so that the cast is exact: devices (and the interpreter) round each
    in its own way. Normals keep 3 bits of their fraction, below 2^-6 a step is 2^-9.
    """
    if y_ptr.dtype.element_ty == tl.float8e4nv:
        sign = x.to(tl.int32, bitcast=True) >> 31 << 31
        size = tl.minimum(tl.abs(x), 448.0, propagate_nan=tl.PropagateNan.ALL)
        bits = size.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20 << 20
        # fp32 has steps of 2^-9 above 2^14.
        small = ((size + 16384.0) - 16384.0).to(tl.int32, bitcast=True)
        bits = tl.where(size < 0.015625, small, normal)
        bits = tl.where(size != size, 0x7FF00000, bits)
        x = (bits | sign).to(tl.float32, bitcast=True)
    return x.to(y_ptr.dtype.element_ty)


@jit
def _summed(x_ptr, at, mask, part, PARTS: tl.constexpr):
    """x at ``at``, the sum of PARTS that lie ``part`` apart; fp32."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        x += tl.load(x_ptr + i * part + at, mask=mask, other=0.0)
    return x


@jit
def _norm_rope_store(
    x_ptr,
    y_ptr,
    weight_ptr,
    table_ptr,
    heads,
    live,
    eps,
    part,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """y[h] = rope(norm(x[h])) for heads side by side, of one row.

    A head is read in three pieces: the two halves that turn with each other, and the rest.
    """
    j = tl.arange(0, BLOCK_HALF)
    turned = live[:, None] & (j < HALF)[None, :]
    at = heads[:, None] * D + j[None, :]
    a = _summed(x_ptr, at, turned, part, PARTS)
    b = _summed(x_ptr, at + HALF, turned, part, PARTS)
    if BLOCK_REST:
        r = tl.arange(0, BLOCK_REST)
        passed = live[:, None] & (r < D - 2 * HALF)[None, :]
        rest_at = heads[:, None] * D + 2 * HALF + r[None, :]
        c = _summed(x_ptr, rest_at, passed, part, PARTS)
    if NORM:
        squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
        if BLOCK_REST:
            squares += tl.sum(c * c, axis=1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        wa = tl.load(weight_ptr + j, mask=j < HALF, other=0.0).to(tl.float32)
        wb = tl.load(weight_ptr + HALF + j, mask=j < HALF, other=0.0).to(tl.float32)
        a = a * scale * (1.0 + wa)[None, :]
        b = b * scale * (1.0 + wb)[None, :]
        if BLOCK_REST:
            wc = tl.load(weight_ptr + 2 * HALF + r, mask=r < D - 2 * HALF, other=0.0)
            c = c * scale * (1.0 + wc.to(tl.float32))[None, :]
    cos = tl.load(table_ptr + j, mask=j < HALF, other=1.0)[None, :]
    sin = tl.load(table_ptr + HALF + j, mask=j < HALF, other=0.0)[None, :]
    tl.store(y_ptr + at, _narrowed(a * cos - b * sin, y_ptr), mask=turned)
    tl.store(y_ptr + at + HALF, _narrowed(b * cos + a * sin, y_ptr), mask=turned)
    if BLOCK_REST:
        tl.store(y_ptr + rest_at, _narrowed(c, y_ptr), mask=passed)


@jit(varying=("max_positions",))
def _kv_store_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    q_norm_ptr,
    k_norm_ptr,
    index_q_norm_ptr,
    index_k_norm_ptr,
    table_ptr,
    q_ptr,
    index_q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    index_cache_ptr,
    qkv_row,
    part,
    max_positions,
    eps,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    INDEX_D: tl.constexpr,
    HALF: tl.constexpr,
    SHIFT: tl.constexpr,
    NORM: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    INDEX_REST: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    position = tl.load(positions_ptr + row).to(tl.int64) - SHIFT
    position = tl.minimum(tl.maximum(position, 0), max_positions - 1)
    cos_sin = table_ptr + position * (2 * HALF)
    x = qkv_ptr + row * qkv_row
    if tile < (H + BLOCK_H - 1) // BLOCK_H:
        heads = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        _norm_rope_store(
            x, q_ptr + row * H * D, q_norm_ptr, cos_sin, heads, heads < H, eps,
            part, PARTS, D, HALF, NORM, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        groups = tl.arange(0, BLOCK_G)
        written = groups < tl.where(slot >= 0, G, 0)
        _norm_rope_store(
            x + H * D, k_cache_ptr + slot * (G * D), k_norm_ptr, cos_sin, groups, written, eps,
            part, PARTS, D, HALF, NORM, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip
        d = tl.arange(0, BLOCK_D)
        at = groups[:, None] * D + d[None, :]
        live = written[:, None] & (d < D)[None, :]
        v = _summed(x + (H + G) * D, at, live, part, PARTS)
        tl.store(v_cache_ptr + slot * (G * D) + at, _narrowed(v, v_cache_ptr), mask=live)
        if INDEX:
            x += (H + 2 * G) * D
            _norm_rope_store(
                x, index_q_ptr + row * (G * INDEX_D), index_q_norm_ptr, cos_sin,
                groups, groups < G, eps, part, PARTS, INDEX_D, HALF, NORM, BLOCK_HALF, INDEX_REST,
            )  # fmt: skip
            one = tl.arange(0, 1)
            _norm_rope_store(
                x + G * INDEX_D, index_cache_ptr + slot * INDEX_D, index_k_norm_ptr, cos_sin,
                one, one < tl.where(slot >= 0, 1, 0), eps,
                part, PARTS, INDEX_D, HALF, NORM, BLOCK_HALF, INDEX_REST,
            )  # fmt: skip


@paired(reference.kv_store)
def kv_store(
    qkv: Tensor, rows: Rows, norms: HeadNorms, table: Tensor, kv: LayerKV
) -> tuple[Tensor, Tensor | None]:
    """Per-head Gemma norm and partial RoPE of q and k, and the write of k and v.

    q = rope(gemma_rmsnorm(q, norms.q)), k = rope(gemma_rmsnorm(k, norms.k)), v as it is: norm
    first, rope second, unrounded in between. In a layer with index keys (kv.index_k) the row goes
    on with index q and index k, which take their own norms and the same rotation; one index key
    serves all groups.

    Shapes  qkv [N, (H + 2 G) * D], columns q, k, v, and of a layer with index keys (G + 1) * Di
            more, index q, index k; rows of any stride; norms of the layer's form; table
            [max_positions, rotary_dim]; kv contiguous; returns q [N, H, D] and index q
            [N, G, Di], contiguous, None of a layer without. N may be 0.
    Dtypes  bf16, fp16 or fp32, norm weights the same or fp32, table fp32; fp32 inside, one cast:
            of q to qkv.dtype, of k and v to their caches', which is qkv.dtype, bf16 or fp8
            (e4m3fn, scale 1, saturated at 448).
    Writes  kv at rows.kv_slots >= 0, nowhere else.
    Error   2 ulp of qkv.dtype at the head's largest value; of fp8 one step where the value lies
            that close to the middle of two; v bit for bit. A row's bits do not depend on the
            others.
    Raises  ValueError on another shape, stride or dtype.
    Source  MiniMaxM3VLAttention (transformers 5.23, models/minimax_m3_vl).
    """
    q, index_q = _store("kv_store", qkv, rows.positions, rows.kv_slots, norms, table, kv)
    return q, None if kv.index_k is None else index_q


@paired(reference.draft_kv_store)
def draft_kv_store(qkv: Tensor, rows: Rows, table: Tensor, kv: LayerKV) -> Tensor:
    """RoPE of the draft's q and k without a norm, and the write of k and v.

    The draft row stored at position p >= 1 pairs the token of p with the target's hidden state
    of p - 1 and rotates by p - 1: rope index = clamp(positions - 1, 0, max_positions - 1).

    Shapes  qkv [N, (H + 2 G) * D], columns q, k, v; H may be 0 (k and v alone are filled); all
            else as kv_store.
    Dtypes, Writes, Error, Raises  as kv_store.
    """
    return _store("draft_kv_store", qkv, rows.positions, rows.kv_slots, None, table, kv)[0]


@paired(reference.draft_kv_fill)
def draft_kv_fill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    kv_slots: Tensor,
    table: Tensor,
    kv: LayerKV,
) -> None:
    """draft_kv_store of the rows x weight^T (+ bias), k and v alone.

    The rows attend to nothing, so they are places alone: positions and kv_slots as of Rows. Few
    columns have long sums here: several programs share one (linear.product_parts), and the write
    adds them.

    Shapes  x [N, C], weight [2 G D, C], rows k, then v; bias [2 G D] or None; last dims
            contiguous; positions, kv_slots [N]; all else as draft_kv_store.
    Dtypes  x, weight, bias alike: bf16, fp16 or fp32; sums in fp32; caches of x.dtype, bf16 or fp8.
    Writes  kv at kv_slots >= 0, nowhere else.
    Error   2 ulp of x.dtype at the row's largest value, of fp8 one step: a product of up to 64 rows
            is rounded once, to the cache's dtype, one of more rows to x.dtype first. A row's bits
            hang on that; up to 64 rows not on their number. They decide no token: a draft's.
    Raises  ValueError on another shape, stride or dtype.
    """
    columns = 2 * kv.k.shape[2] * kv.k.shape[3]
    require(
        weight.shape[0] == columns and kv.k.dtype in (x.dtype, *CACHES),
        "draft_kv_fill",
        weight=weight,
        kv=kv,
        x=x,
    )
    parts = product_parts("draft_kv_fill", x, weight, bias)
    where = (positions, kv_slots, None, table, kv)
    if parts is None:
        _store("draft_kv_fill", linear.kernel(x, weight, bias), *where)
    else:
        _store("draft_kv_fill", parts[0], *where, parts=parts)


def _store(
    name: str,
    qkv: Tensor,
    positions: Tensor,
    kv_slots: Tensor,
    norms: HeadNorms | None,
    table: Tensor,
    kv: LayerKV,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """parts [P, N, columns]: what to add up instead of taking qkv, the first of them."""
    k_cache, v_cache, index_k_cache = kv
    groups, dim = k_cache.shape[2:]
    index_dim = 0 if index_k_cache is None else index_k_cache.shape[2]
    index_columns = (groups + 1) * index_dim if index_dim else 0
    heads, rest = divmod(qkv.shape[1] - index_columns, dim)
    heads -= 2 * groups
    rotary = table.shape[1]
    require(
        not rest
        and heads >= 0
        and qkv.ndim == 2
        and qkv.stride(1) == 1
        and qkv.dtype in FLOATS
        and rotary % 2 == 0
        and rotary <= min(dim, index_dim or dim)
        and table.dtype == torch.float32
        and k_cache.shape == v_cache.shape
        and k_cache.dtype == v_cache.dtype
        and all(c is None or c.is_contiguous() and c.dtype in (qkv.dtype, *CACHES) for c in kv)
        and all(t.is_contiguous() for t in (positions, kv_slots, table))
        and (norms is None or _are_norms(norms, dim, index_dim, qkv.dtype)),
        name,
        qkv=qkv,
        positions=positions,
        table=table,
        norms=norms,
        kv=kv,
    )
    rows = qkv.shape[0]
    q = torch.empty(rows, heads, dim, dtype=qkv.dtype, device=qkv.device)
    index_q = q.new_empty(rows, groups, index_dim)
    if rows:
        launch = settings("kv_store", qkv)
        # Pointers that a kernel without norms or indexer never follows.
        own = HeadNorms(table, table, 0.0) if norms is None else norms
        _kv_store_kernel[(rows, cdiv(heads, launch["BLOCK_H"]) + 1)](
            qkv,
            positions,
            kv_slots,
            own.q,
            own.k,
            own.index_q if index_dim else table,
            own.index_k if index_dim else table,
            table,
            q,
            index_q,
            k_cache,
            v_cache,
            k_cache if index_k_cache is None else index_k_cache,
            qkv.stride(0),
            0 if parts is None else parts.stride(0),
            table.shape[0],
            own.eps,
            PARTS=1 if parts is None else parts.shape[0],
            H=heads,
            G=groups,
            D=dim,
            INDEX_D=index_dim,
            HALF=rotary // 2,
            SHIFT=0 if norms is not None else 1,
            NORM=norms is not None,
            INDEX=index_dim > 0,
            BLOCK_G=power_of_2(groups),
            BLOCK_D=power_of_2(dim),
            BLOCK_HALF=power_of_2(rotary // 2),
            BLOCK_REST=power_of_2(dim - rotary) if dim > rotary else 0,
            INDEX_REST=power_of_2(index_dim - rotary) if index_dim > rotary else 0,
            **launch,
        )
    return q, index_q


def _are_norms(norms: HeadNorms, dim: int, index_dim: int, dtype: torch.dtype) -> bool:
    """True if the weights fit heads of ``dim``, and index heads unless ``index_dim`` is 0."""
    return all(
        w is not None
        and w.shape == (size,)
        and w.dtype in (dtype, torch.float32)
        and w.is_contiguous()
        for w, size in (
            (norms.q, dim),
            (norms.k, dim),
            *(((norms.index_q, index_dim), (norms.index_k, index_dim)) if index_dim else ()),
        )
    )
