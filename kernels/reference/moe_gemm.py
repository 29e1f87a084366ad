"""The routed experts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference import wide
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
    shared: Tensor | None = None,
) -> Tensor:
    """The weighted sum of each row's experts, and the shared expert's output.

    a[n, j] = round(swiglu_oai(w13[ids[n, j]] x[n])), the product unrounded
    y[n] = shared[n] + sum_j weights[n, j] * w2[ids[n, j]] a[n, j], rounded once. ids of -1 add
    nothing, and x[n] is not used where all are -1.

    Shapes  x [N, H]; w13 [E, 2 I, H], gate rows then up rows; w2 [E, H, I]; ids, weights
            [N, topk]; shared [N, H] or None (zero); returns [N, H].
    Dtypes  products, activation and sums in fp32 (fp64 for fp64); a and y round to x.dtype.
    Raises  ValueError when ids and weights differ in shape.
    Source  MiniMaxM3VLExperts (transformers 5.23, models/minimax_m3_vl).
    """
    if ids.shape != weights.shape:
        raise ValueError(f"moe_gemm: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}")
    num_experts, topk = w13.shape[0], ids.shape[1]
    # Pairs (row, j) in the order of their expert, those of padding (id -1) in front and dropped.
    flat = ids.flatten().long()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    pairs = flat.argsort(stable=True)[counts[0] :]
    rows = pairs // topk
    hit = [(expert, count) for expert, count in enumerate(counts[1:]) if count]
    gate_up = _per_expert(wide(x)[rows], w13, hit)
    activated = wide(swiglu_oai(gate_up, alpha, limit, beta).to(x.dtype))
    outputs = _per_expert(activated, w2, hit)
    outputs = outputs * weights.flatten()[pairs, None]
    total = torch.zeros_like(wide(x)) if shared is None else wide(shared).clone()
    return total.index_add_(0, rows, outputs).to(x.dtype)


def _per_expert(x: Tensor, w: Tensor, hit: list[tuple[int, int]]) -> Tensor:
    """x w[e]^T for each expert's rows, which lie side by side; no weight is copied."""
    parts = x.split([count for _, count in hit]) if hit else ()
    done = [F.linear(part, wide(w[e])) for part, (e, _) in zip(parts, hit, strict=True)]
    return torch.cat(done) if done else x.new_empty(0, w.shape[1])
