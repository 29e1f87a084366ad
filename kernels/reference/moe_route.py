"""The router: which experts a row visits, and with what weight."""

from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference import cast, remember_last
from eaglerun.kernels.rows import Routing


def moe_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    topk: int,
    scale: float,
    num_experts: Tensor | None = None,
) -> Routing:
    """See eaglerun.kernels.moe_route.moe_route."""
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
    if used is not None:
        ids, weights = ids.masked_fill(padding, -1), weights.masked_fill(padding, 0.0)
    return Routing(ids.int(), weights)


@remember_last
def _padding(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """Which rows are padding [N, 1], and the numbers of the others; None where none is."""
    padding = positions < 0
    used = (~padding).nonzero()[:, 0]
    return padding[:, None], None if len(used) == len(positions) else used
