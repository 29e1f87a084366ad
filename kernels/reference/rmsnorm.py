"""RMS normalisation in the draft's form (plain weight) and the target's (weight + 1)."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cast, wide


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with a plain weight.

    y[n, d] = x[n, d] * rsqrt(mean_d(x[n, :]^2) + eps) * weight[d], cast once at the end.

    Shapes  x [..., D], last dim contiguous; weight [D], or [G, D] with a row for each of x's
            [..., G, D]; returns x's shape. No rows at all are allowed.
    Dtypes  x bf16, fp16, fp32 or fp64; weight the same or fp32; fp32 inside (fp64 for fp64).
    Raises  ValueError when weight is not the last one or two dims of x.
    Source  Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    _check("rmsnorm", x, weight)
    return cast(_unit_rms(x, eps) * wide(weight), x.dtype)


def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm whose weight is an offset from one: a zero weight is the identity scale.

    y[n, d] = x[n, d] * rsqrt(mean_d(x[n, :]^2) + eps) * (1 + weight[d]), cast once at the end.

    Shapes, Dtypes, Raises  as rmsnorm.
    Source  MiniMaxM3VLRMSNorm (transformers 5.23, models/minimax_m3_vl).
    """
    _check("gemma_rmsnorm", x, weight)
    unit = _unit_rms(x, eps)
    return cast(torch.addcmul(unit, unit, wide(weight)), x.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Complete the residual stream, then rmsnorm it.

    r = round(x + residual); y = rmsnorm(r, weight): the norm reads the rounded sum, so that the
    fused and the unfused form have the same bits.

    Shapes  x, residual [..., D]; weight [D]; returns (y, r), both new.
    Dtypes  x and residual alike; the sum in fp32 (fp64 for fp64), rounded to x.dtype.
    Raises  ValueError when x and residual differ in shape or weight is not [D].
    """
    total = _completed("add_rmsnorm", x, residual)
    return rmsnorm(total, weight, eps), total


def add_gemma_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Complete the residual stream, then gemma_rmsnorm it: add_rmsnorm in the target's form."""
    total = _completed("add_gemma_rmsnorm", x, residual)
    return gemma_rmsnorm(total, weight, eps), total


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _completed(name: str, x: Tensor, residual: Tensor) -> Tensor:
    if x.shape != residual.shape:
        raise ValueError(f"{name}: x {tuple(x.shape)}, residual {tuple(residual.shape)}")
    # One rounding: torch adds two bf16 numbers in fp32.
    return x + residual


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    if not 1 <= weight.ndim <= 2 or weight.shape != x.shape[-weight.ndim :]:
        raise ValueError(f"{name}: x {tuple(x.shape)}, weight {tuple(weight.shape)}")
