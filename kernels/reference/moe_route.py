"""The router: which experts a row visits, and with what weight."""

import torch
from torch import Tensor
from torch.nn import functional as F


def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    topk: int,
    scale: float,
    num_experts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores of the gate; the bias chooses, the plain scores weigh.

    s[n, e] = sigmoid(x[n] . gate[e]); chosen = the topk largest s + bias, lower id on a tie;
    weight[n, j] = scale * s[n, e_j] / sum_j s[n, e_j]. A row of padding (position -1) visits
    nothing: ids -1, weights 0.

    Shapes  x [N, H]; gate [E, H]; bias [E] or None; positions [N]; num_experts [1] int64 or
            None; returns ids [N, topk] int32 and weights [N, topk].
    Dtypes  x is cast to gate.dtype (fp32, fp64), all else in it; weights are returned in it.
    Writes  num_experts += the number of distinct experts in ids.
    Raises  ValueError when topk > E.
    Source  MiniMaxM3VLTopKRouter and MiniMaxM3VLSparseMoeBlock (transformers 5.23,
            models/minimax_m3_vl), which multiply by scale after the experts.
    """
    if topk > gate.shape[0]:
        raise ValueError(f"moe_route: top {topk} of {gate.shape[0]} experts")
    scores = F.linear(x.to(gate.dtype), gate).sigmoid()
    choice = scores if bias is None else scores + bias
    # A stable sort keeps the lower id first among equals; torch.topk promises no order.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, ids)
    weights = weights * (scale / weights.sum(-1, keepdim=True))
    padding = (positions < 0)[:, None]
    ids = ids.masked_fill(padding, -1)
    if num_experts is not None:
        hit = torch.zeros(gate.shape[0] + 1, dtype=torch.int64, device=x.device)
        hit[ids.flatten()] = 1  # -1 marks the last, which is not counted
        num_experts += hit[:-1].sum()
    return ids.int(), weights.masked_fill(padding, 0.0)
