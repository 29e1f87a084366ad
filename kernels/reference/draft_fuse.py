"""The fused norms that build the draft's matrix inputs, the embedding looked up by one of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference.rmsnorm import rmsnorm


def group_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See eaglerun.kernels.draft_fuse.group_rmsnorm."""
    if weight.shape != x.shape[1:]:
        raise ValueError(f"group_rmsnorm: x {tuple(x.shape)}, weight {tuple(weight.shape)}")
    return rmsnorm(x, weight, eps).flatten(1).contiguous()


def embed_dual_rmsnorm(
    ids: Tensor,
    table: Tensor,
    hidden: Tensor,
    embed_weight: Tensor,
    hidden_weight: Tensor,
    eps: float,
) -> Tensor:
    """See eaglerun.kernels.draft_fuse.embed_dual_rmsnorm."""
    if hidden.shape != (*ids.shape, table.shape[1]):
        raise ValueError(
            f"embed_dual_rmsnorm: ids {tuple(ids.shape)}, table {tuple(table.shape)}, hidden "
            f"{tuple(hidden.shape)}"
        )
    embeds = rmsnorm(F.embedding(ids, table), embed_weight, eps)
    return torch.cat((embeds, rmsnorm(hidden, hidden_weight, eps)), dim=-1)
