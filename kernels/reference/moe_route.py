"""The router: which experts a row visits, and with what weight."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference import cast, remember_last


def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    topk: int,
    scale: float,
    num_experts: Tensor | None = None,
    num_shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores of the gate; the bias chooses, the plain scores weigh.

    s[n, e] = sigmoid(x[n] . gate[e]); chosen = the topk largest s + bias, lower id on a tie;
    weight[n, j] = scale * s[n, e_j] / sum_j s[n, e_j]. The last num_shared columns are the
    experts E, E + 1 .. with weight 1: shared experts that lie behind the routed ones. A row of
    padding (position -1) visits nothing: ids -1, weights 0.

    Shapes  x [N, H]; gate [E, H]; bias [E] or None; positions [N]; num_experts [1] int64 or
            None; returns ids [N, topk + num_shared] int32 and weights alike.
    Dtypes  x is cast to gate.dtype (fp32, fp64), all else in it; weights are returned in it.
    Writes  num_experts += the number of distinct routed experts in ids.
    Raises  ValueError when topk > E.
    Source  MiniMaxM3VLTopKRouter and MiniMaxM3VLSparseMoeBlock (transformers 5.23,
            models/minimax_m3_vl), which multiply by scale after the experts.
    """
    if topk > gate.shape[0]:
        raise ValueError(f"moe_route: top {topk} of {gate.shape[0]} experts")
    scores = F.linear(cast(x, gate.dtype), gate).sigmoid()
    choice = scores if bias is None else scores + bias
    # A stable sort keeps the lower id first among equals; torch.topk promises no order.
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = scores.gather(1, ids)
    weights = weights * (scale / weights.sum(-1, keepdim=True))
    padding, used = _padding(positions)
    if num_experts is not None:
        visited = ids if used is None else ids.index_select(0, used)
        num_experts += visited.flatten().bincount().count_nonzero()
    if num_shared:
        always = torch.arange(num_shared, device=ids.device) + gate.shape[0]
        ids = torch.cat((ids, always.expand(len(ids), -1)), dim=1)
        weights = torch.cat((weights, weights.new_ones(len(ids), num_shared)), dim=1)
    if used is not None:
        ids, weights = ids.masked_fill(padding, -1), weights.masked_fill(padding, 0.0)
    return ids.int(), weights


@remember_last
def _padding(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which rows are padding [N, 1], and the numbers of the others; None where none is."""
    padding = positions < 0
    used = (~padding).nonzero()[:, 0]
    return padding[:, None], None if len(used) == len(positions) else used
