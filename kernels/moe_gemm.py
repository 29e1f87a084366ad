# mypy: allow-untyped-defs, allow-incomplete-defs
"""The routed experts: pairs (row, expert) sorted into tiles of one expert, two grouped matrix
products with the activation between them, and the weighted sum.

Everything is sized by shapes, never by how the rows were routed: a tile list long enough for any
routing, whose unused end is marked -1 and skipped. A product is computed transposed, weights
[BLOCK_N, k] times rows [k, BLOCK_T], so that few rows still fill the tensor cores' long side with
weights, which is what a decode step reads.
"""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, cdiv, dot_dtype, jit, power_of_2, require, tl
from eaglerun.kernels.launch import moe_regime, settings
from eaglerun.kernels.reference import moe_gemm as reference
from eaglerun.kernels.swiglu_oai import clamped_swiglu


@jit
def _sort_kernel(
    ids_ptr,
    pairs_ptr,
    tile_expert_ptr,
    pairs,
    E,
    max_tiles,
    BLOCK_T: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program e lists the pairs of expert e, in order, in the tiles that are its own.

    Every program counts all experts for itself, which costs less than a launch to count them
    once. The last one, e = E, marks the tiles that nobody has.
    """
    expert = tl.program_id(0)
    bin_id = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    p = tl.arange(0, BLOCK)
    for start in range(0, pairs, BLOCK):
        ids = tl.load(ids_ptr + start + p, mask=start + p < pairs, other=-1)
        count += tl.histogram(tl.where(ids >= 0, ids, BINS - 1), BINS)
    tiles = tl.where(bin_id < E, (count + BLOCK_T - 1) // BLOCK_T, 0)
    first = tl.sum(tl.where(bin_id < expert, tiles, 0), axis=0)
    mine = tl.sum(tl.where(bin_id == expert, tiles, 0), axis=0)
    if expert == E:
        mine = max_tiles - first
    for i in range(0, mine):
        tl.store(tile_expert_ptr + first + i, tl.where(expert == E, -1, expert))
    if (expert < E) & (mine > 0):
        base = pairs_ptr + first * BLOCK_T
        done = tl.zeros([], tl.int32)
        for start in range(0, pairs, BLOCK):
            ids = tl.load(ids_ptr + start + p, mask=start + p < pairs, other=-1)
            hit = ids == expert
            place = done + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            tl.store(base + place, start + p, mask=hit)
            done += tl.sum(hit.to(tl.int32), axis=0)
        t = tl.arange(0, BLOCK_T)
        end = (mine - 1) * BLOCK_T + t
        tl.store(base + end, tl.full([BLOCK_T], -1, tl.int32), mask=end >= done)


@jit
def _tile(
    tile_expert_ptr, pairs_ptr, ids_ptr, max_tiles, n_tiles,
    SORTED: tl.constexpr, GROUP: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """This program's expert (-1: none), pairs (-1: none) and column tile.

    GROUP row tiles go through the column tiles together, so that tiles of one expert meet its
    weights in the cache. Unsorted: there is one row, and pair i is tile i.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * n_tiles)
    size = tl.minimum(max_tiles - group * GROUP, GROUP)
    inner = pid % (GROUP * n_tiles)
    tile = group * GROUP + inner % size
    t = tl.arange(0, BLOCK_T)
    if SORTED:
        expert = tl.load(tile_expert_ptr + tile)
        pairs = tl.load(pairs_ptr + tile * BLOCK_T + t)
    else:
        expert = tl.load(ids_ptr + tile)
        pairs = tl.where(t == 0, tile, -1)
    return expert, pairs, inner // size


@jit
def _up_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    ids_ptr,
    tile_expert_ptr,
    pairs_ptr,
    x_row,
    max_tiles,
    n_tiles,
    alpha,
    limit,
    beta,
    topk,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SORTED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """a[pair, i] = activation(w[e, i] . x, w[e, I + i] . x)."""
    expert, pairs, n_tile = _tile(
        tile_expert_ptr, pairs_ptr, ids_ptr, max_tiles, n_tiles, SORTED, GROUP, BLOCK_T
    )
    if expert < 0:
        return
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = pairs >= 0
    rows = tl.where(real, pairs // topk, 0).to(tl.int64)
    # Columns past the end read the last one, and are not stored.
    at = tl.minimum(n, I - 1)
    gate_at = w_ptr + expert.to(tl.int64) * (2 * I * H) + at[:, None] * H + k[None, :]
    up_at = gate_at + I * H
    x_at = x_ptr + rows[None, :] * x_row + k[:, None]
    gate = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            x = tl.load(x_at, mask=real[None, :], other=0.0).to(DOT)
            wg = tl.load(gate_at).to(DOT)
            wu = tl.load(up_at).to(DOT)
        else:
            inside = start + k < H
            x = tl.load(x_at, mask=real[None, :] & inside[:, None], other=0.0).to(DOT)
            wg = tl.load(gate_at, mask=inside[None, :], other=0.0).to(DOT)
            wu = tl.load(up_at, mask=inside[None, :], other=0.0).to(DOT)
        gate = tl.dot(wg, x, gate, input_precision="ieee")
        up = tl.dot(wu, x, up, input_precision="ieee")
        x_at += BLOCK_K
        gate_at += BLOCK_K
        up_at += BLOCK_K
    y = clamped_swiglu(gate, up, alpha, limit, beta)
    out = pairs.to(tl.int64)[None, :] * I + n[:, None]
    tl.store(a_ptr + out, y, mask=real[None, :] & (n < I)[:, None])


@jit
def _down_kernel(
    a_ptr,
    w_ptr,
    y_ptr,
    ids_ptr,
    tile_expert_ptr,
    pairs_ptr,
    max_tiles,
    n_tiles,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SORTED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y[pair, h] = w[e, h] . a[pair], in fp32."""
    expert, pairs, n_tile = _tile(
        tile_expert_ptr, pairs_ptr, ids_ptr, max_tiles, n_tiles, SORTED, GROUP, BLOCK_T
    )
    if expert < 0:
        return
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    real = pairs >= 0
    at = tl.minimum(n, H - 1)
    w_at = w_ptr + expert.to(tl.int64) * (H * I) + at[:, None] * I + k[None, :]
    a_at = a_ptr + tl.where(real, pairs, 0).to(tl.int64)[None, :] * I + k[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, I, BLOCK_K):
        if I % BLOCK_K == 0:
            a = tl.load(a_at, mask=real[None, :], other=0.0).to(DOT)
            w = tl.load(w_at).to(DOT)
        else:
            inside = start + k < I
            a = tl.load(a_at, mask=real[None, :] & inside[:, None], other=0.0).to(DOT)
            w = tl.load(w_at, mask=inside[None, :], other=0.0).to(DOT)
        y = tl.dot(w, a, y, input_precision="ieee")
        a_at += BLOCK_K
        w_at += BLOCK_K
    out = pairs.to(tl.int64)[None, :] * H + n[:, None]
    tl.store(y_ptr + out, y, mask=real[None, :] & (n < H)[:, None])


@jit
def _combine_kernel(
    y_ptr,
    ids_ptr,
    weights_ptr,
    shared_ptr,
    out_ptr,
    shared_row,
    topk,
    H,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = h < H
    total = tl.zeros([BLOCK], tl.float32)
    if SHARED:
        total += tl.load(shared_ptr + row * shared_row + h, mask=live, other=0.0).to(tl.float32)
    for j in range(0, topk):
        pair = row * topk + j
        real = tl.load(ids_ptr + pair) >= 0
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        y = tl.load(y_ptr + pair * H + h, mask=h < tl.where(real, H, 0), other=0.0)
        total += tl.where(real, weight, 0.0) * y
    tl.store(out_ptr + row * H + h, total, mask=live)


@paired(reference.moe_gemm)
def moe_gemm(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    ids: Tensor,
    weights: Tensor,
    alpha: float,
    limit: float,
    beta: float,
    shared: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each row's experts, and the shared expert's output.

    a[n, j] = round(swiglu_oai(w13[ids[n, j]] x[n])), the product unrounded
    y[n] = shared[n] + sum_j weights[n, j] * w2[ids[n, j]] a[n, j], rounded once. ids of -1 add
    nothing, and x[n] is not used where all are -1. No weight of an expert that is in no id is
    read.

    Shapes  x [N, H], last dim contiguous; w13 [E, 2 I, H], gate rows then up rows; w2 [E, H, I];
            ids [N, topk] int32, weights [N, topk] fp32; all contiguous; shared [N, H] or None
            (zero); returns [N, H]. E < 1024. N may be 0.
    Dtypes  x, w13, w2, shared alike: bf16, fp16 or fp32; products and sums in fp32; a and y round
            to x.dtype.
    Error   2 ulp of x.dtype at the row's largest value: fp32 sums in another order. A row's bits
            depend on the number of rows only through the tile that the launch table names for
            it (BLOCK_K and the tensor core instruction), never on where it stands or who else
            visits its experts.
    Raises  ValueError on another shape, stride or dtype.
    Source  MiniMaxM3VLExperts (transformers 5.23, models/minimax_m3_vl).
    """
    rows, hidden = x.shape
    experts, width = w13.shape[0], w13.shape[1] // 2
    topk = ids.shape[1]
    require(
        ids.shape == weights.shape == (rows, topk)
        and ids.dtype == torch.int32
        and weights.dtype == torch.float32
        and w13.shape == (experts, 2 * width, hidden)
        and w2.shape == (experts, hidden, width)
        and x.dtype == w13.dtype == w2.dtype
        and x.dtype in FLOATS
        and x.stride(1) == 1
        and all(t.is_contiguous() for t in (w13, w2, ids, weights))
        and experts < 1024
        and (
            shared is None
            or (shared.shape == x.shape and shared.dtype == x.dtype and shared.stride(1) == 1)
        ),
        "moe_gemm",
        x=x,
        w13=w13,
        w2=w2,
        ids=ids,
        weights=weights,
        shared=shared,
    )
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    pairs, device = rows * topk, x.device
    regime = moe_regime(x, pairs, experts)
    up, down = settings(f"moe_up_{regime}", x), settings(f"moe_down_{regime}", x)
    block_t = up["BLOCK_T"]
    # sum_e ceil(c_e / T) over at most min(pairs, E) visited experts.
    max_tiles = min(pairs, experts + pairs // block_t)
    tile_expert = torch.empty(max_tiles, dtype=torch.int32, device=device)
    order = torch.empty(max_tiles * block_t, dtype=torch.int32, device=device)
    activated = torch.empty(pairs, width, dtype=x.dtype, device=device)
    product = torch.empty(pairs, hidden, dtype=torch.float32, device=device)
    if rows > 1:
        _sort_kernel[(experts + 1,)](
            ids,
            order,
            tile_expert,
            pairs,
            experts,
            max_tiles,
            BLOCK_T=block_t,
            BINS=power_of_2(experts + 1),
            **settings("moe_sort", x),
        )
    tiles = (tile_expert, order)
    n_tiles = cdiv(width, up["BLOCK_N"])
    _up_kernel[(max_tiles * n_tiles,)](
        x,
        w13,
        activated,
        ids,
        *tiles,
        x.stride(0),
        max_tiles,
        n_tiles,
        alpha,
        limit,
        beta,
        topk,
        H=hidden,
        I=width,
        SORTED=rows > 1,
        DOT=dot_dtype(x.dtype),
        **up,
    )
    n_tiles = cdiv(hidden, down["BLOCK_N"])
    _down_kernel[(max_tiles * n_tiles,)](
        activated,
        w2,
        product,
        ids,
        *tiles,
        max_tiles,
        n_tiles,
        H=hidden,
        I=width,
        SORTED=rows > 1,
        DOT=dot_dtype(x.dtype),
        BLOCK_T=block_t,
        **down,
    )
    launch = settings("moe_combine", x)
    _combine_kernel[(rows, cdiv(hidden, launch["BLOCK"]))](
        product,
        ids,
        weights,
        x if shared is None else shared,
        out,
        0 if shared is None else shared.stride(0),
        topk,
        hidden,
        SHARED=shared is not None,
        **launch,
    )
    return out
