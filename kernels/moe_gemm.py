# mypy: allow-untyped-defs, allow-incomplete-defs
"""The experts: pairs (row, expert) sorted into tiles of one expert, two grouped matrix products
with the activation between them, and the weighted sum. Of few rows the shared expert is one more
tile of all of them; of more it goes through the kernels of a dense layer. Its bits are the same.

Everything is sized by shapes, never by how the rows were routed: a tile list long enough for any
routing, whose unused end is marked -1 and skipped. A product is computed transposed, weights
[BLOCK_N, k] times rows [k, BLOCK_T], so that few rows still fill the tensor cores' long side with
weights, which is what a decode step reads.
"""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import (
    FLOATS,
    begin,
    cdiv,
    descriptor,
    dot_dtype,
    jit,
    power_of_2,
    require,
    tl,
    wait_before,
)
from eaglerun.kernels.launch import Settings, moe_regime, settings
from eaglerun.kernels.linear import linear
from eaglerun.kernels.reference import moe_gemm as reference
from eaglerun.kernels.rows import Experts, Routing
from eaglerun.kernels.swiglu_oai import clamped_swiglu, swiglu_oai


@jit(varying=("rows", "max_tiles"))
def _sort_kernel(
    ids_ptr,
    pairs_ptr,
    tile_expert_ptr,
    rows,
    E,
    max_tiles,
    TOPK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program e lists the pairs of expert e, in order, in the tiles that are its own.

    Every program counts all experts for itself, which costs less than a launch to count them
    once. The last one, e = E, marks the tiles that nobody has.
    """
    begin(OVERLAP)
    # A multiple of TOPK for the compiler too, which then loads several ids at once.
    pairs = rows * TOPK
    expert = tl.program_id(0)
    bin_id = tl.arange(0, BINS)
    count = tl.zeros([BINS], tl.int32)
    p = tl.arange(0, BLOCK)
    for start in range(0, pairs, BLOCK):
        ids = tl.load(ids_ptr + start + p, mask=start + p < pairs, other=-1)
        count += tl.histogram(tl.where(ids >= 0, ids, BINS - 1), BINS)
    # The last tile of an expert takes up to EXTRA pairs more.
    tiles = tl.maximum((count - EXTRA + BLOCK_T - 1) // BLOCK_T, 1)
    tiles = tl.where((bin_id < E) & (count > 0), tiles, 0)
    first = tl.sum(tl.where(bin_id < expert, tiles, 0), axis=0)
    mine = tl.sum(tl.where(bin_id == expert, tiles, 0), axis=0)
    if expert == E:
        mine = max_tiles - first
    for i in range(0, mine):
        tl.store(tile_expert_ptr + first + i, tl.where(expert == E, -1, expert))
    if (expert < E) & (mine > 0):
        stride: tl.constexpr = BLOCK_T + EXTRA
        base = pairs_ptr + first * stride
        done = tl.zeros([], tl.int32)
        for start in range(0, pairs, BLOCK):
            ids = tl.load(ids_ptr + start + p, mask=start + p < pairs, other=-1)
            hit = ids == expert
            place = done + tl.cumsum(hit.to(tl.int32), axis=0) - 1
            place += tl.minimum(place // BLOCK_T, mine - 1) * EXTRA
            tl.store(base + place, start + p, mask=hit)
            done += tl.sum(hit.to(tl.int32), axis=0)
        s = tl.arange(0, BLOCK_S)
        for i in range(0, mine):
            filled = tl.where(i < mine - 1, BLOCK_T, done - i * BLOCK_T)
            unused = tl.full([BLOCK_S], -1, tl.int32)
            tl.store(base + i * stride + s, unused, mask=(s >= filled) & (s < stride))


@jit
def _tile(max_tiles, n_tiles, GROUP: tl.constexpr):
    """This program's row tile and column tile.

    GROUP row tiles go through the column tiles together, so that tiles of one expert meet its
    weights in the cache.
    """
    pid = tl.program_id(0)
    group = pid // (GROUP * n_tiles)
    size = tl.minimum(max_tiles - group * GROUP, GROUP)
    inner = pid % (GROUP * n_tiles)
    return group * GROUP + inner % size, inner // size


@jit
def _pairs(
    pairs_ptr, tile, num_pairs, rows, shared, SORTED: tl.constexpr, START: tl.constexpr,
    COUNT: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Pairs START .. START + COUNT of a tile, -1 where there is none.

    Unsorted: there is one row, and pair i is tile i. Those of the shared expert, one of each
    row, come after the others.
    """
    t = tl.arange(0, COUNT)
    count = rows if SORTED else 1
    if SORTED:
        at = pairs_ptr + tile * STRIDE + START + t
        found = tl.load(at, mask=t < tl.where(shared, 0, COUNT), other=-1)
    else:
        found = tl.where(t == 0, tile, -1)
    return tl.where(shared, tl.where(t < count, num_pairs + t, -1), found)


@jit
def _row_of(pair, num_pairs, topk):
    """The row of x that a pair (-1: none, row 0) is of."""
    return tl.where(pair < num_pairs, tl.maximum(pair, 0) // topk, pair - num_pairs)


@jit
def _at(x_ptr, x_row, rows, k):
    """Where ``rows`` [R] begin, [k, R]."""
    return x_ptr + tl.maximum(rows, 0).to(tl.int64)[None, :] * x_row + k[:, None]


@jit
def _put(y_ptr, y, pairs, n, WIDTH: tl.constexpr):
    """y [n, pairs] to rows of WIDTH."""
    at = pairs.to(tl.int64)[None, :] * WIDTH + n[:, None]
    tl.store(y_ptr + at, y, mask=(pairs >= 0)[None, :] & (n < WIDTH)[:, None])


@jit
def _up(
    x_ptr, w_ptr, expert, a_ptr, pairs, more, num_pairs, shared, n_tile, x_row,
    alpha, limit, beta, topk,
    H: tl.constexpr, I: tl.constexpr, DOT: tl.constexpr, WIDER: tl.constexpr,  # noqa: E741
    BLOCK_T: tl.constexpr, EXTRA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The activated columns of a tile's pairs, and WIDER: of ``more`` by the same weights.

    shared: the products are rounded before the activation, as between the kernels of a layer.
    """
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Columns past the end read the last one, and are not stored.
    at = tl.minimum(n, I - 1)
    if not DESCRIBED:
        gate_at = w_ptr + at[:, None] * H + k[None, :]
        up_at = gate_at + I * H
    x_at = _at(x_ptr, x_row, _row_of(pairs, num_pairs, topk), k)
    gate = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if WIDER:
        x2_at = _at(x_ptr, x_row, _row_of(more, num_pairs, topk), k)
        gate2 = tl.zeros([BLOCK_N, EXTRA], tl.float32)
        up2 = tl.zeros([BLOCK_N, EXTRA], tl.float32)
    for start in range(0, H, BLOCK_K):
        inside = start + k < H
        wanted = (pairs >= 0)[None, :]
        if H % BLOCK_K:
            wanted = wanted & inside[:, None]
        if DESCRIBED:
            first = expert * (2 * I) + n_tile * BLOCK_N
            wg = w_ptr.load([first, start]).to(DOT)
            wu = w_ptr.load([first + I, start]).to(DOT)
        elif H % BLOCK_K == 0:
            wg = tl.load(gate_at).to(DOT)
            wu = tl.load(up_at).to(DOT)
        else:
            wg = tl.load(gate_at, mask=inside[None, :], other=0.0).to(DOT)
            wu = tl.load(up_at, mask=inside[None, :], other=0.0).to(DOT)
        x = tl.load(x_at, mask=wanted, other=0.0).to(DOT)
        gate = tl.dot(wg, x, gate, input_precision="ieee")
        up = tl.dot(wu, x, up, input_precision="ieee")
        if WIDER:
            x2 = tl.load(x2_at, mask=(more >= 0)[None, :] & inside[:, None], other=0.0).to(DOT)
            gate2 = tl.dot(wg, x2, gate2, input_precision="ieee")
            up2 = tl.dot(wu, x2, up2, input_precision="ieee")
            x2_at += BLOCK_K
        x_at += BLOCK_K
        if not DESCRIBED:
            gate_at += BLOCK_K
            up_at += BLOCK_K
    # What is written here may lie where a kernel before still reads.
    wait_before(OVERLAP)
    rounded: tl.constexpr = a_ptr.dtype.element_ty
    gate = tl.where(shared, gate.to(rounded).to(tl.float32), gate)
    up = tl.where(shared, up.to(rounded).to(tl.float32), up)
    _put(a_ptr, clamped_swiglu(gate, up, alpha, limit, beta), pairs, n, I)
    if WIDER:
        _put(a_ptr, clamped_swiglu(gate2, up2, alpha, limit, beta), more, n, I)


@jit(varying=("max_tiles", "num_pairs", "rows"))
def _up_kernel(
    x_ptr,
    w_ptr,
    shared_ptr,
    a_ptr,
    ids_ptr,
    tile_expert_ptr,
    pairs_ptr,
    x_row,
    max_tiles,
    n_tiles,
    num_pairs,
    rows,
    alpha,
    limit,
    beta,
    topk,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SORTED: tl.constexpr,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """a[pair, i] = activation(w[e, i] . x, w[e, I + i] . x).

    EXTRA: room for so many pairs more beside a full tile, by the same weights, so that an
    expert's few last pairs do not cost a tile's reading of them; 0: none. SHARED: the last tile
    is the shared expert's, of all rows. DESCRIBED: w_ptr describes all experts' rows to the unit
    that copies tiles, so that the warps compute no addresses of weights.
    """
    # No let_next: the programs of _down_kernel would take the places of these, unevenly.
    tile, n_tile = _tile(max_tiles, n_tiles, GROUP)
    shared = tile == (max_tiles - 1 if SHARED else -1)
    # The shared expert needs x alone, which the kernel just before (it chose or sorted the experts)
    # has waited for.
    if not shared:
        wait_before(OVERLAP)
    chosen = (tile_expert_ptr if SORTED else ids_ptr) + tile
    expert = tl.load(chosen, mask=tile < tl.where(shared, 0, max_tiles), other=0)
    if expert < 0:
        return
    if not DESCRIBED:
        w_ptr += expert.to(tl.int64) * (2 * I * H)
    if SHARED:
        w_ptr = tl.where(shared, shared_ptr, w_ptr)
    stride: tl.constexpr = BLOCK_T + EXTRA
    pairs = _pairs(pairs_ptr, tile, num_pairs, rows, shared, SORTED, 0, BLOCK_T, stride)
    if EXTRA > 0:
        more = _pairs(pairs_ptr, tile, num_pairs, rows, shared, SORTED, BLOCK_T, EXTRA, stride)
        if tl.max(more, axis=0) >= 0:
            _up(
                x_ptr, w_ptr, expert, a_ptr, pairs, more, num_pairs, shared, n_tile, x_row,
                alpha, limit, beta, topk, H, I, DOT, True, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K,
                DESCRIBED, OVERLAP,
            )  # fmt: skip
        else:
            _up(
                x_ptr, w_ptr, expert, a_ptr, pairs, pairs, num_pairs, shared, n_tile, x_row,
                alpha, limit, beta, topk, H, I, DOT, False, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K,
                DESCRIBED, OVERLAP,
            )  # fmt: skip
    else:
        _up(
            x_ptr, w_ptr, expert, a_ptr, pairs, pairs, num_pairs, shared, n_tile, x_row,
            alpha, limit, beta, topk, H, I, DOT, False, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K,
            DESCRIBED, OVERLAP,
        )  # fmt: skip


@jit
def _down(
    a_ptr, w_ptr, expert, y_ptr, pairs, more, n_tile,
    H: tl.constexpr, I: tl.constexpr, DOT: tl.constexpr, WIDER: tl.constexpr,  # noqa: E741
    BLOCK_T: tl.constexpr, EXTRA: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = tl.minimum(n, H - 1)
    if not DESCRIBED:
        w_at = w_ptr + at[:, None] * I + k[None, :]
    a_at = _at(a_ptr, I, pairs, k)
    y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    if WIDER:
        a2_at = _at(a_ptr, I, more, k)
        y2 = tl.zeros([BLOCK_N, EXTRA], tl.float32)
    for start in range(0, I, BLOCK_K):
        inside = start + k < I
        wanted = (pairs >= 0)[None, :]
        if I % BLOCK_K:
            wanted = wanted & inside[:, None]
        if DESCRIBED:
            w = w_ptr.load([expert * H + n_tile * BLOCK_N, start]).to(DOT)
        elif I % BLOCK_K == 0:
            w = tl.load(w_at).to(DOT)
        else:
            w = tl.load(w_at, mask=inside[None, :], other=0.0).to(DOT)
        y = tl.dot(w, tl.load(a_at, mask=wanted, other=0.0).to(DOT), y, input_precision="ieee")
        if WIDER:
            a2 = tl.load(a2_at, mask=(more >= 0)[None, :] & inside[:, None], other=0.0).to(DOT)
            y2 = tl.dot(w, a2, y2, input_precision="ieee")
            a2_at += BLOCK_K
        a_at += BLOCK_K
        if not DESCRIBED:
            w_at += BLOCK_K
    _put(y_ptr, y, pairs, n, H)
    if WIDER:
        _put(y_ptr, y2, more, n, H)


@jit(varying=("max_tiles", "num_pairs", "rows"))
def _down_kernel(
    a_ptr,
    w_ptr,
    shared_ptr,
    y_ptr,
    ids_ptr,
    tile_expert_ptr,
    pairs_ptr,
    max_tiles,
    n_tiles,
    num_pairs,
    rows,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    SORTED: tl.constexpr,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """y[pair, h] = w[e, h] . a[pair]; EXTRA, SHARED and DESCRIBED as in _up_kernel."""
    begin(OVERLAP)
    tile, n_tile = _tile(max_tiles, n_tiles, GROUP)
    shared = tile == (max_tiles - 1 if SHARED else -1)
    chosen = (tile_expert_ptr if SORTED else ids_ptr) + tile
    expert = tl.load(chosen, mask=tile < tl.where(shared, 0, max_tiles), other=0)
    if expert < 0:
        return
    if not DESCRIBED:
        w_ptr += expert.to(tl.int64) * (H * I)
    if SHARED:
        w_ptr = tl.where(shared, shared_ptr, w_ptr)
    stride: tl.constexpr = BLOCK_T + EXTRA
    pairs = _pairs(pairs_ptr, tile, num_pairs, rows, shared, SORTED, 0, BLOCK_T, stride)
    if EXTRA > 0:
        more = _pairs(pairs_ptr, tile, num_pairs, rows, shared, SORTED, BLOCK_T, EXTRA, stride)
        if tl.max(more, axis=0) >= 0:
            _down(
                a_ptr, w_ptr, expert, y_ptr, pairs, more, n_tile,
                H, I, DOT, True, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K, DESCRIBED,
            )  # fmt: skip
        else:
            _down(
                a_ptr, w_ptr, expert, y_ptr, pairs, pairs, n_tile,
                H, I, DOT, False, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K, DESCRIBED,
            )  # fmt: skip
    else:
        _down(
            a_ptr, w_ptr, expert, y_ptr, pairs, pairs, n_tile,
            H, I, DOT, False, BLOCK_T, EXTRA, BLOCK_N, BLOCK_K, DESCRIBED,
        )  # fmt: skip


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
    OVERLAP: tl.constexpr,
):
    """out[n] = shared[n] + sum_j weights[n, j] y[n, j], shared rounded as a layer's output is."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = h < H
    total = tl.zeros([BLOCK], tl.float32)
    if SHARED:
        own = tl.load(shared_ptr + row * shared_row + h, mask=live, other=0.0)
        total += own.to(out_ptr.dtype.element_ty).to(tl.float32)
    for j in range(0, topk):
        pair = row * topk + j
        real = tl.load(ids_ptr + pair) >= 0
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        y = tl.load(y_ptr + pair * H + h, mask=h < tl.where(real, H, 0), other=0.0)
        total += tl.where(real, weight, 0.0) * y.to(tl.float32)
    tl.store(out_ptr + row * H + h, total, mask=live)


@paired(reference.moe_gemm)
def moe_gemm(
    x: Tensor, routing: Routing, experts: Experts, alpha: float, limit: float, beta: float
) -> Tensor:
    """The weighted sum of each row's experts, and the shared expert's output.

    a[n, j] = round(swiglu_oai(w13[ids[n, j]] x[n])), the product unrounded
    y[n] = s[n] + sum_j weights[n, j] * w2[ids[n, j]] a[n, j], rounded once (where there are many
    rows an expert, each product is rounded to x.dtype before the sum, but not in a batch-invariant
    engine); s[n] is the dense layer round(shared_down round(swiglu_oai(round(shared_up x[n])))).
    ids of -1 add nothing. An expert that is in no id may hold anything; without a shared expert
    x[n] is not used where all ids are -1.

    Shapes  x [N, H], last dim contiguous; routing of N rows and experts, all contiguous; returns
            [N, H]. E < 1024. N may be 0.
    Dtypes  x and all weight matrices alike: bf16, fp16 or fp32; products and sums in fp32; a and
            y round to x.dtype.
    Error   2 ulp of x.dtype at the row's largest value: fp32 sums in another order. Up to 8 pairs
            an expert (N topk <= 8 E, the launch table's "few" and "several"), with a shared
            expert up to 64 rows, a row's bits depend neither on the number of rows nor on who
            else visits its experts; in a batch-invariant engine (launch.invariant) at any number.
    Launch  overlapping (launch.overlapping), x must be older than the kernel that wrote ids.
    Raises  ValueError on another shape, stride or dtype.
    Source  MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock (transformers 5.23,
            models/minimax_m3_vl).
    """
    ids, weights = routing
    w13, w2, shared_up, shared_down = experts
    rows, hidden = x.shape
    count, width = w13.shape[0], w13.shape[1] // 2
    topk = ids.shape[1]
    require(
        ids.shape == weights.shape == (rows, topk)
        and ids.dtype == torch.int32
        and weights.dtype == torch.float32
        and w13.shape == (count, 2 * width, hidden)
        and w2.shape == (count, hidden, width)
        and x.dtype == w13.dtype == w2.dtype
        and x.dtype in FLOATS
        and x.stride(1) == 1
        and all(t.is_contiguous() for t in (w13, w2, ids, weights))
        and count < 1024
        and _is_layer(shared_up, shared_down, x),
        "moe_gemm",
        x=x,
        routing=routing,
        experts=experts,
    )
    out = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    pairs, device = rows * topk, x.device
    regime = moe_regime(pairs, count)
    up, down = settings(f"moe_up_{regime}", x), settings(f"moe_down_{regime}", x)
    block_t, extra = up["BLOCK_T"], up["EXTRA"]
    # The shared expert as a tile of its own, where one holds all rows.
    fused = (
        bool(up.pop("SHARED_TILE", 0))
        and rows <= block_t
        and shared_down is not None
        and shared_down.shape[1] == width
    )
    shared: Tensor | None = None
    if shared_up is not None and shared_down is not None and not fused:
        gate_up = linear.kernel(x, shared_up)
        shared = linear.kernel(swiglu_oai.kernel(gate_up, alpha, limit, beta), shared_down)
    # sum_e ceil(c_e / T) over at most min(pairs, E) visited experts.
    max_tiles = min(pairs, count + pairs // block_t)
    tile_expert = torch.empty(max_tiles, dtype=torch.int32, device=device)
    order = torch.empty(max_tiles * (block_t + extra), dtype=torch.int32, device=device)
    all_pairs = pairs + rows if fused else pairs
    activated = torch.empty(all_pairs, width, dtype=x.dtype, device=device)
    # Many rows write and read their products as bytes that count; few do not.
    wide = x.dtype if down.pop("ROUNDED", 0) else torch.float32
    product = torch.empty(all_pairs, hidden, dtype=wide, device=device)
    for w, launch in ((w13, up), (w2, down)):
        # A tile of the shared expert would need a descriptor of its own.
        launch["DESCRIBED"] = bool(launch.get("DESCRIBED", 0)) and not fused and _can_describe(w)
    if rows > 1:
        _sort_kernel[(count + 1,)](
            ids,
            order,
            tile_expert,
            rows,
            count,
            max_tiles,
            TOPK=topk,
            BLOCK_T=block_t,
            EXTRA=extra,
            BINS=power_of_2(count + 1),
            BLOCK_S=power_of_2(block_t + extra),
            **settings("moe_sort", x),
        )
    tiles = max_tiles + 1 if fused else max_tiles
    n_tiles = cdiv(width, up["BLOCK_N"])
    _up_kernel[(tiles * n_tiles,)](
        x,
        _weights(w13, up),
        w13 if shared_up is None else shared_up,
        activated,
        ids,
        tile_expert,
        order,
        x.stride(0),
        tiles,
        n_tiles,
        pairs,
        rows,
        alpha,
        limit,
        beta,
        topk,
        H=hidden,
        I=width,
        SORTED=rows > 1,
        SHARED=fused,
        DOT=dot_dtype(x.dtype),
        **up,
    )
    n_tiles = cdiv(hidden, down["BLOCK_N"])
    _down_kernel[(tiles * n_tiles,)](
        activated,
        _weights(w2, down),
        w2 if shared_down is None else shared_down,
        product,
        ids,
        tile_expert,
        order,
        tiles,
        n_tiles,
        pairs,
        rows,
        H=hidden,
        I=width,
        SORTED=rows > 1,
        SHARED=fused,
        DOT=dot_dtype(x.dtype),
        BLOCK_T=block_t,
        EXTRA=extra,
        **down,
    )
    if fused:
        shared = product[pairs:]
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


def _can_describe(w: Tensor) -> bool:
    """Whether w [E, rows, columns] can be a descriptor."""
    return w.shape[2] * w.element_size() % 16 == 0 and w.data_ptr() % 16 == 0


def _weights(w: Tensor, launch: Settings) -> object:
    """w [E, rows, columns], or where ``launch`` says DESCRIBED, all rows as a descriptor."""
    if not launch["DESCRIBED"]:
        return w
    return descriptor(w.flatten(0, 1), [launch["BLOCK_N"], launch["BLOCK_K"]])


def _is_layer(up: Tensor | None, down: Tensor | None, x: Tensor) -> bool:
    """Whether the two are the weights of one layer over x, or both absent."""
    if up is None or down is None:
        return up is None and down is None
    return (
        up.shape == (2 * down.shape[1], x.shape[1])
        and down.shape[0] == x.shape[1]
        and up.dtype == down.dtype == x.dtype
        and up.is_contiguous()
        and down.is_contiguous()
    )
