"""The fused norms that build the draft's matrix inputs, the embedding looked up by one of them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels.reference.rmsnorm import rmsnorm


def group_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One RMSNorm per aux tap, laid side by side as the input of fc.

    y[n, g * D + d] = x[n, g, d] * rsqrt(mean_d(x[n, g, :]^2) + eps) * weight[g, d]

    Shapes  x [N, G, D], last dim contiguous, any other strides (the aux buffers are [G, rows, D]);
            weight [G, D]; returns [N, G * D] contiguous.
    Dtypes  as rmsnorm; one cast at the end.
    Raises  ValueError when weight is not [G, D].
    Source  fc_norm of EAGLE-3.1 drafts (vLLM 0.33.0, models/llama_eagle3.py).
    """
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
    """The draft's qkv input: the embedding of each id and the hidden state beside it, normed.

    y[n] = [rmsnorm(table[ids[n]], embed_weight) | rmsnorm(hidden[n], hidden_weight)]

    Shapes  ids [N], each a row of table; table [V, D], hidden [N, D], last dims contiguous;
            weights [D]; returns [N, 2 * D] contiguous.
    Dtypes  as rmsnorm; one cast at the end.
    Raises  ValueError when hidden is not [N, D] or a weight is not [D]; IndexError on an id that
            table has not.
    """
    if hidden.shape != (*ids.shape, table.shape[1]):
        raise ValueError(
            f"embed_dual_rmsnorm: ids {tuple(ids.shape)}, table {tuple(table.shape)}, hidden "
            f"{tuple(hidden.shape)}"
        )
    embeds = rmsnorm(F.embedding(ids, table), embed_weight, eps)
    return torch.cat((embeds, rmsnorm(hidden, hidden_weight, eps)), dim=-1)
