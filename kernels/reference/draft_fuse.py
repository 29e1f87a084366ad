"""The two fused norms that build the draft's matrix inputs."""

import torch
from torch import Tensor

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


def dual_rmsnorm_cat(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float
) -> Tensor:
    """Two RMSNorms side by side: the draft's qkv input (embedding first, then hidden).

    y = [rmsnorm(a, a_weight) | rmsnorm(b, b_weight)]

    Shapes  a, b [N, D], last dim contiguous; weights [D]; returns [N, 2 * D] contiguous.
    Dtypes  as rmsnorm; one cast at the end.
    Raises  ValueError when a and b differ in shape or a weight is not [D].
    """
    if a.shape != b.shape:
        raise ValueError(f"dual_rmsnorm_cat: a {tuple(a.shape)}, b {tuple(b.shape)}")
    return torch.cat((rmsnorm(a, a_weight, eps), rmsnorm(b, b_weight, eps)), dim=-1)
