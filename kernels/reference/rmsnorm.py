"""RMS normalisation in the draft's form (plain weight) and the target's (weight + 1)."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cast, wide


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See eaglerun.kernels.rmsnorm.rmsnorm."""
    _check("rmsnorm", x, weight)
    return cast(_unit_rms(x, eps) * wide(weight), x.dtype)


def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See eaglerun.kernels.rmsnorm.gemma_rmsnorm."""
    _check("gemma_rmsnorm", x, weight)
    unit = _unit_rms(x, eps)
    return cast(torch.addcmul(unit, unit, wide(weight)), x.dtype)


def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See eaglerun.kernels.rmsnorm.add_rmsnorm."""
    total = _completed("add_rmsnorm", x, residual)
    return rmsnorm(total, weight, eps), total


def add_gemma_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See eaglerun.kernels.rmsnorm.add_gemma_rmsnorm."""
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
