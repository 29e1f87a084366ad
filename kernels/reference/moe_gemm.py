"""The routed experts."""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference import cast, wide
from eaglerun.kernels.reference.swiglu_oai import swiglu_oai


def moe_gemm(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    ids: Tensor,
    weights: Tensor,
    alpha: float,
    limit: float,
    beta: float,
    shared_up: Tensor | None = None,
    shared_down: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each row's experts, and the shared expert's output.

    a[n, j] = round(swiglu_oai(w13[ids[n, j]] x[n])), the product unrounded
    y[n] = s[n] + sum_j weights[n, j] * w2[ids[n, j]] a[n, j], rounded once; s[n] is the dense
    layer round(shared_down round(swiglu_oai(round(shared_up x[n])))). ids of -1 add nothing;
    without a shared expert x[n] is not used where all are -1.

    Shapes  x [N, H]; w13 [E, 2 I, H], gate rows then up rows; w2 [E, H, I]; ids, weights
            [N, topk]; shared_up [2 Is, H], shared_down [H, Is], or both None; returns [N, H].
    Dtypes  products, activation and sums in fp32 (fp64 for fp64); a and y round to x.dtype.
    Raises  ValueError when ids and weights differ in shape.
    Source  MiniMaxM3VLExperts, MiniMaxM3VLSparseMoeBlock (transformers 5.23,
            models/minimax_m3_vl).
    """
    if ids.shape != weights.shape:
        raise ValueError(f"moe_gemm: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}")
    # Pairs (row, j) in the order of their expert, those of padding (id -1) in front and dropped.
    experts, pairs = ids.flatten().sort(stable=True)
    hit = [(expert, len(list(same))) for expert, same in groupby(experts.tolist())]
    if hit and hit[0][0] < 0:
        pairs = pairs[hit.pop(0)[1] :]
    rows = pairs // ids.shape[1]
    gate_up = _per_expert(wide(x).index_select(0, rows), w13, hit)
    activated = wide(cast(swiglu_oai(gate_up, alpha, limit, beta), x.dtype))
    outputs = _per_expert(activated, w2, hit)
    outputs = outputs * weights.flatten().index_select(0, pairs)[:, None]
    if shared_up is None or shared_down is None:
        total = torch.zeros_like(wide(x))
    else:
        gate_up = F.linear(x, shared_up)
        total = wide(F.linear(swiglu_oai(gate_up, alpha, limit, beta), shared_down))
    return cast(total.index_add_(0, rows, outputs), x.dtype)


def _per_expert(x: Tensor, w: Tensor, hit: list[tuple[int, int]]) -> Tensor:
    """x w[e]^T for each expert's rows, which lie side by side; no weight is copied."""
    parts = x.split([count for _, count in hit]) if hit else ()
    done = [F.linear(part, wide(w[e])) for part, (e, _) in zip(parts, hit, strict=True)]
    return torch.cat(done) if done else x.new_empty(0, w.shape[1])
