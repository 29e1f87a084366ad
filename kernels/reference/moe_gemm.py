"""The routed experts."""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference import cast, wide
from eaglerun.kernels.reference.swiglu_oai import swiglu_oai
from eaglerun.kernels.rows import Experts, Routing


def moe_gemm(
    x: Tensor, routing: Routing, experts: Experts, alpha: float, limit: float, beta: float
) -> Tensor:
    """See eaglerun.kernels.moe_gemm.moe_gemm."""
    ids, weights = routing
    if ids.shape != weights.shape:
        raise ValueError(f"moe_gemm: ids {tuple(ids.shape)}, weights {tuple(weights.shape)}")
    # Pairs (row, j) in the order of their expert, those of padding (id -1) in front and dropped.
    visited, pairs = ids.flatten().sort(stable=True)
    hit = [(expert, len(list(same))) for expert, same in groupby(visited.tolist())]
    if hit and hit[0][0] < 0:
        pairs = pairs[hit.pop(0)[1] :]
    rows = pairs // ids.shape[1]
    gate_up = _per_expert(wide(x).index_select(0, rows), experts.w13, hit)
    activated = wide(cast(swiglu_oai(gate_up, alpha, limit, beta), x.dtype))
    outputs = _per_expert(activated, experts.w2, hit)
    outputs = outputs * weights.flatten().index_select(0, pairs)[:, None]
    if experts.shared_up is None or experts.shared_down is None:
        total = torch.zeros_like(wide(x))
    else:
        gate_up = F.linear(x, experts.shared_up)
        activated = swiglu_oai(gate_up, alpha, limit, beta)
        total = wide(F.linear(activated, experts.shared_down))
    return cast(total.index_add_(0, rows, outputs), x.dtype)


def _per_expert(x: Tensor, w: Tensor, hit: list[tuple[int, int]]) -> Tensor:
    """x w[e]^T for each expert's rows, which lie side by side; no weight is copied."""
    parts = x.split([count for _, count in hit]) if hit else ()
    done = [F.linear(part, wide(w[e])) for part, (e, _) in zip(parts, hit, strict=True)]
    return torch.cat(done) if done else x.new_empty(0, w.shape[1])
