# mypy: allow-untyped-defs, allow-incomplete-defs
"""The two fused norms that build the draft's matrix inputs."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, begin, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import draft_fuse as reference
from eaglerun.kernels.rmsnorm import MAX_ROW, rmsnorm


@jit
def _dual_rmsnorm_cat_kernel(
    a_ptr,
    b_ptr,
    a_weight_ptr,
    b_weight_ptr,
    y_ptr,
    a_row,
    b_row,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    if tl.program_id(1) == 0:
        x = tl.load(a_ptr + row * a_row + d, mask=live, other=0.0).to(tl.float32)
        w = tl.load(a_weight_ptr + d, mask=live, other=0.0).to(tl.float32)
    else:
        x = tl.load(b_ptr + row * b_row + d, mask=live, other=0.0).to(tl.float32)
        w = tl.load(b_weight_ptr + d, mask=live, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * w
    tl.store(y_ptr + (row * 2 + tl.program_id(1)) * D + d, y, mask=live)


@paired(reference.group_rmsnorm)
def group_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One RMSNorm per aux tap, laid side by side as the input of fc.

    y[n, g * D + d] = x[n, g, d] * rsqrt(mean_d(x[n, g, :]^2) + eps) * weight[g, d]

    Shapes  x [N, G, D], last dim contiguous, any other strides; weight [G, D]; returns
            [N, G * D] contiguous.
    Dtypes, Error  as rmsnorm, whose kernel this is.
    Raises  ValueError when weight is not [G, D], and as rmsnorm.
    Source  fc_norm of EAGLE-3.1 drafts (vLLM 0.33.0, models/llama_eagle3.py).
    """
    require(x.ndim == 3 and weight.shape == x.shape[1:], "group_rmsnorm", x=x, weight=weight)
    return rmsnorm.kernel(x, weight, eps).flatten(1)


@paired(reference.dual_rmsnorm_cat)
def dual_rmsnorm_cat(
    a: Tensor, b: Tensor, a_weight: Tensor, b_weight: Tensor, eps: float
) -> Tensor:
    """Two RMSNorms side by side: the draft's qkv input (embedding first, then hidden).

    y = [rmsnorm(a, a_weight) | rmsnorm(b, b_weight)], fp32 inside, cast once.

    Shapes  a, b [N, D], last dim contiguous; weights [D]; returns [N, 2 * D] contiguous. N may
            be 0. D <= 32768.
    Dtypes  a and b bf16, fp16 or fp32, alike; weights the same or fp32.
    Error   as rmsnorm.
    Raises  ValueError on another shape, stride or dtype.
    """
    rows, width = a.shape
    require(
        a.shape == b.shape
        and a_weight.shape == b_weight.shape == (width,)
        and 0 < width <= MAX_ROW
        and a.stride(1) == b.stride(1) == 1
        and a.dtype == b.dtype
        and a.dtype in FLOATS
        and {a_weight.dtype, b_weight.dtype} <= {a.dtype, torch.float32},
        "dual_rmsnorm_cat",
        a=a,
        b=b,
        a_weight=a_weight,
        b_weight=b_weight,
    )
    y = torch.empty(rows, 2 * width, dtype=a.dtype, device=a.device)
    if rows:
        _dual_rmsnorm_cat_kernel[(rows, 2)](
            a,
            b,
            a_weight,
            b_weight,
            y,
            a.stride(0),
            b.stride(0),
            eps,
            D=width,
            BLOCK_D=power_of_2(width),
            **settings("rmsnorm", a),
        )
    return y
