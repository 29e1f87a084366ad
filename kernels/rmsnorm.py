# mypy: allow-untyped-defs, allow-incomplete-defs
"""RMS normalisation of the draft (plain weight) and of the target (weight + 1)."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, jit, let_next, power_of_2, require, tl, wait_before
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import rmsnorm as reference

MAX_ROW = 32768


@jit
def _rmsnorm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    x_row,
    x_group,
    residual_row,
    residual_group,
    weight_group,
    groups,
    eps,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    w = tl.load(weight_ptr + group * weight_group + d, mask=live, other=0.0).to(tl.float32)
    wait_before(OVERLAP)
    let_next(OVERLAP)
    x = tl.load(x_ptr + row * x_row + group * x_group + d, mask=live, other=0.0).to(tl.float32)
    out = (row * groups + group) * D + d
    if ADD:
        at = row * residual_row + group * residual_group
        x += tl.load(residual_ptr + at + d, mask=live, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out, rounded, mask=live)
        # The norm reads what was stored, as an unfused norm would.
        x = rounded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * (OFFSET + w)
    tl.store(y_ptr + out, y, mask=live)


@paired(reference.rmsnorm)
def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm with a plain weight.

    y[n, d] = x[n, d] * rsqrt(mean_d(x[n, :]^2) + eps) * weight[d], fp32 inside, cast once.

    Shapes  x [D], [N, D] or [N, G, D] of any strides but the last, or contiguous of more dims;
            weight [D], or [G, D] with a row for each of x's [..., G, D]; returns x's shape,
            contiguous. N may be 0. D <= 32768.
    Dtypes  x bf16, fp16 or fp32; weight the same or fp32.
    Error   1 ulp of x.dtype from the reference. A row's bits do not depend on the others: one
            program a row.
    Raises  ValueError on another shape, stride or dtype.
    Source  Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    return _norm("rmsnorm", x, None, weight, eps, 0.0)[0]


@paired(reference.gemma_rmsnorm)
def gemma_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm whose weight is an offset from one: a zero weight is the identity scale.

    y[n, d] = x[n, d] * rsqrt(mean_d(x[n, :]^2) + eps) * (1 + weight[d]), fp32 inside, cast once.

    Shapes, Dtypes, Error, Raises  as rmsnorm.
    Source  MiniMaxM3VLRMSNorm (transformers 5.23, models/minimax_m3_vl).
    """
    return _norm("gemma_rmsnorm", x, None, weight, eps, 1.0)[0]


@paired(reference.add_rmsnorm)
def add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Complete the residual stream, then rmsnorm it: (y, r), r = round(x + residual),
    y = rmsnorm(r, weight).

    The norm reads the rounded sum, so that the fused and the unfused form have the same bits.

    Shapes  x, residual as rmsnorm's x, alike; weight as there; both returned are new.
    Dtypes  x and residual alike; the sum in fp32, rounded to x.dtype before the norm reads it.
    Error   r bit for bit the reference's; y as rmsnorm.
    Raises  as rmsnorm, and when x and residual differ.
    """
    y, total = _norm("add_rmsnorm", x, residual, weight, eps, 0.0)
    return y, total


@paired(reference.add_gemma_rmsnorm)
def add_gemma_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """add_rmsnorm in the target's form: y = gemma_rmsnorm(r, weight); all else as there."""
    y, total = _norm("add_gemma_rmsnorm", x, residual, weight, eps, 1.0)
    return y, total


def _norm(
    name: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    other = rows if residual is None else _rows(residual)
    width = x.shape[-1] if x.ndim else 0
    require(
        1 <= weight.ndim <= 2
        and weight.shape == x.shape[-weight.ndim :]
        and weight.is_contiguous()
        and 0 < width <= MAX_ROW
        and x.dtype in FLOATS
        and weight.dtype in (x.dtype, torch.float32)
        and rows.stride(2) == other.stride(2) == 1
        and (residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype)),
        name,
        x=x,
        residual=residual,
        weight=weight,
    )
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty_like(y)
    if x.numel():
        _rmsnorm_kernel[(rows.shape[0], rows.shape[1])](
            rows,
            other,
            weight,
            y,
            total,
            rows.stride(0),
            rows.stride(1),
            other.stride(0),
            other.stride(1),
            width if weight.ndim == 2 else 0,
            rows.shape[1],
            eps,
            D=width,
            OFFSET=offset,
            ADD=residual is not None,
            BLOCK_D=power_of_2(width),
            **settings("rmsnorm", x),
        )
    return y, total


def _rows(x: Tensor) -> Tensor:
    """x as [N, G, D], never a copy."""
    if x.ndim < 3:
        return x.view(1, 1, -1) if x.ndim < 2 else x[:, None]
    return x if x.ndim == 3 else x.view(-1, *x.shape[-2:])
