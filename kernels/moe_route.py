# mypy: allow-untyped-defs, allow-incomplete-defs
"""The router: which experts a row visits, and with what weight."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import (
    FLOATS,
    begin,
    cdiv,
    dot_dtype,
    interpreting,
    jit,
    power_of_2,
    require,
    tl,
)
from eaglerun.kernels.launch import route_regime, settings
from eaglerun.kernels.reference import moe_route as reference
from eaglerun.kernels.rows import Routing
from eaglerun.kernels.vocab_argmax import index_of, ordered_key


@jit(varying=("rows",))
def _logits_kernel(
    x_ptr,
    gate_ptr,
    part_ptr,
    rows,
    x_row,
    H,
    E,
    PER_SPLIT: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """part[n, split, e] = x[n] . gate[e] over the split's columns, to fp32 accuracy.

    A bf16 x meets the fp32 gate as three bf16 numbers that sum to it (3 * 8 bits hold its 24),
    whose products are exact, so that the tensor cores do.
    """
    begin(OVERLAP)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    live = t < rows
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, PER_SPLIT, BLOCK_K):
        k = split * PER_SPLIT + start + tl.arange(0, BLOCK_K)
        x_at = t.to(tl.int64)[:, None] * x_row + k[None, :]
        x = tl.load(x_ptr + x_at, mask=live[:, None] & (k < H)[None, :], other=0.0)
        w_at = e[:, None] * H + k[None, :]
        w = tl.load(gate_ptr + w_at, mask=(e < E)[:, None] & (k < H)[None, :], other=0.0)
        w = tl.trans(w.to(tl.float32))
        if EXACT:
            acc = tl.dot(x.to(tl.float32), w, acc, input_precision="ieee")
        else:
            high = w.to(DOT)
            rest = w - high.to(tl.float32)
            middle = rest.to(DOT)
            low = (rest - middle.to(tl.float32)).to(DOT)
            acc = tl.dot(x, low, acc)
            acc = tl.dot(x, middle, acc)
            acc = tl.dot(x, high, acc)
    at = (t.to(tl.int64) * tl.num_programs(2) + split)[:, None] * E + e[None, :]
    tl.store(part_ptr + at, acc, mask=live[:, None] & (e < E)[None, :])


@jit
def _choose_kernel(
    part_ptr,
    bias_ptr,
    positions_ptr,
    ids_ptr,
    weights_ptr,
    count_ptr,
    E,
    scale,
    SPLITS: tl.constexpr,
    TOPK: tl.constexpr,
    BIAS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The choice of one row. COUNT: it is the only row, and its experts are counted here."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    at = row * (SPLITS * E) + s[:, None] * E + e[None, :]
    part = tl.load(part_ptr + at, mask=(s < SPLITS)[:, None] & (e < E)[None, :], other=0.0)
    score = 1.0 / (1.0 + tl.exp(-tl.sum(part, axis=0)))
    choice = score
    if BIAS:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    lowest: tl.constexpr = -0x7FFFFFFFFFFFFFFF
    key = tl.where(e < E, ordered_key(choice, e), lowest)
    j = tl.arange(0, BLOCK_K)
    ids = tl.full([BLOCK_K], -1, tl.int32)
    weights = tl.zeros([BLOCK_K], tl.float32)
    total = tl.zeros([], tl.float32)
    for i in tl.static_range(TOPK):
        best = index_of(tl.max(key, axis=0)).to(tl.int32)
        weight = tl.sum(tl.where(e == best, score, 0.0), axis=0)
        total += weight
        ids = tl.where(j == i, best, ids)
        weights = tl.where(j == i, weight, weights)
        key = tl.where(e == best, lowest, key)
    weights = weights * (scale / total)
    real = tl.load(positions_ptr + row) >= 0
    out = row * TOPK + j
    tl.store(ids_ptr + out, tl.where(real, ids, -1), mask=j < TOPK)
    tl.store(weights_ptr + out, tl.where(real, weights, 0.0), mask=j < TOPK)
    if COUNT:
        tl.store(count_ptr, tl.load(count_ptr) + tl.where(real, TOPK, 0))


@jit(varying=("rows",))
def _count_kernel(
    ids_ptr, count_ptr, rows, E, TOPK: tl.constexpr,
    BLOCK: tl.constexpr, BINS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """count += the number of distinct ids in 0 .. E - 1."""
    begin(OVERLAP)
    # A multiple of TOPK for the compiler too, which then loads several ids at once.
    pairs = rows * TOPK
    bins = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, BLOCK):
        p = start + tl.arange(0, BLOCK)
        ids = tl.load(ids_ptr + p, mask=p < pairs, other=-1)
        bins += tl.histogram(tl.where((ids >= 0) & (ids < E), ids, BINS - 1), BINS)
    hit = (bins > 0) & (tl.arange(0, BINS) < E)
    tl.store(count_ptr, tl.load(count_ptr) + tl.sum(hit.to(tl.int64), axis=0))


@paired(reference.moe_route)
def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    topk: int,
    scale: float,
    num_experts: Tensor | None = None,
) -> Routing:
    """Sigmoid scores of the gate; the bias chooses, the plain scores weigh.

    s[n, e] = sigmoid(x[n] . gate[e]); chosen = the topk largest s + bias, lower id on a tie;
    weight[n, j] = scale * s[n, e_j] / sum_j s[n, e_j]. A row of padding (position -1) visits
    nothing: ids -1, weights 0.

    Shapes  x [N, H], last dim contiguous; gate [E, H] contiguous; bias [E] or None; positions
            [N]; num_experts [1] int64 or None; returns ids [N, topk] int32 and weights alike.
            E <= 512, topk <= 16. N may be 0.
    Dtypes  x bf16, fp16 or fp32; gate and bias fp32; products exact, sums fp32 in fixed order.
    Writes  num_experts += the number of distinct experts in ids.
    Error   logits 1e-6 of |x| |gate|, so ids as the reference's but for scores closer than
            that. A row's bits depend on which of the launch table's tiles its N takes: the same
            up to 64 rows, from 65 to 512, and above; in a batch-invariant engine
            (launch.invariant) at any number.
    Raises  ValueError when topk > E, and on another shape, stride or dtype.
    Source  MiniMaxM3VLTopKRouter and MiniMaxM3VLSparseMoeBlock (transformers 5.23,
            models/minimax_m3_vl), which multiply by scale after the experts.
    """
    rows, width = x.shape
    experts = gate.shape[0]
    require(
        topk <= experts <= 512
        and topk <= 16
        and gate.shape[1] == width
        and x.stride(1) == 1
        and x.dtype in FLOATS
        and gate.dtype == torch.float32
        and gate.is_contiguous()
        and (bias is None or (bias.shape == (experts,) and bias.dtype == torch.float32))
        and positions.shape == (rows,)
        and positions.is_contiguous(),
        "moe_route",
        x=x,
        gate=gate,
        bias=bias,
        positions=positions,
        topk=topk,
    )
    ids = torch.empty(rows, topk, dtype=torch.int32, device=x.device)
    weights = torch.empty(rows, topk, dtype=torch.float32, device=x.device)
    if not rows:
        return Routing(ids, weights)
    launch = settings(f"route_logits_{route_regime(rows)}", x)
    per_split = launch["BLOCK_K"] * cdiv(width, launch.pop("SPLITS") * launch["BLOCK_K"])
    splits = cdiv(width, per_split)
    part = torch.empty(rows, splits, experts, dtype=torch.float32, device=x.device)
    _logits_kernel[(cdiv(rows, launch["BLOCK_T"]), cdiv(experts, launch["BLOCK_E"]), splits)](
        x,
        gate,
        part,
        rows,
        x.stride(0),
        width,
        experts,
        PER_SPLIT=per_split,
        EXACT=interpreting() or x.dtype != torch.bfloat16,
        DOT=dot_dtype(x.dtype),
        **launch,
    )
    launch = settings("route_choose", x)
    _choose_kernel[(rows,)](
        part,
        gate if bias is None else bias,
        positions,
        ids,
        weights,
        ids if num_experts is None else num_experts,
        experts,
        scale,
        SPLITS=splits,
        TOPK=topk,
        BIAS=bias is not None,
        COUNT=num_experts is not None and rows == 1,
        BLOCK_S=power_of_2(splits),
        BLOCK_E=power_of_2(experts),
        BLOCK_K=power_of_2(topk),
        **launch,
    )
    if num_experts is not None and rows > 1:
        _count_kernel[(1,)](
            ids,
            num_experts,
            rows,
            experts,
            TOPK=topk,
            BINS=power_of_2(experts + 1),
            **settings("route_count", x),
        )
    return Routing(ids, weights)
