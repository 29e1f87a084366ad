# mypy: allow-untyped-defs, allow-incomplete-defs
"""The gated activations: the target's clamped SwiGLU and the draft's plain one."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, begin, cdiv, jit, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import swiglu_oai as reference


@jit
def clamped_swiglu(gate, up, alpha, limit, beta):
    """The activation of a gate and an up value, in fp32; the MoE kernel's epilogue too."""
    # Comparisons, for minimum would make a NaN the limit.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return (up + beta) * gate / (1.0 + tl.exp(-alpha * gate))


@jit
def _swiglu_kernel(
    x_ptr,
    y_ptr,
    x_row,
    width,
    alpha,
    limit,
    beta,
    CLAMPED: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = i < width
    gate = tl.load(x_ptr + row * x_row + i, mask=live, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * x_row + width + i, mask=live, other=0.0).to(tl.float32)
    if CLAMPED:
        y = clamped_swiglu(gate, up, alpha, limit, beta)
    else:
        y = up * gate / (1.0 + tl.exp(-gate))
    tl.store(y_ptr + row * width + i, y, mask=live)


@paired(reference.swiglu_oai)
def swiglu_oai(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """SwiGLU with a clamp and an offset, over a row of [gate | up].

    g = min(gate, limit) (no lower clamp); u = clamp(up, -limit, limit)
    y = (u + beta) * g * sigmoid(alpha * g), cast once at the end.

    Shapes  gate_up [N, 2 * I], last dim contiguous, gate first; returns [N, I] contiguous.
    Dtypes  bf16, fp16 or fp32; fp32 inside, one cast to gate_up.dtype.
    Error   1 ulp of the dtype, 1e-6 relative in fp32. A row's bits do not depend on the others.
    Raises  ValueError on another shape, stride or dtype.
    Source  MiniMaxM3VLDenseMLP (transformers 5.23, models/minimax_m3_vl); GPT-OSS with halves.
    """
    return _activate("swiglu_oai", gate_up, alpha, limit, beta, clamped=True)


@paired(reference.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """y = gate * sigmoid(gate) * up over a row of [gate | up]; all else as swiglu_oai.

    Source  Shazeer 2020, arXiv:2002.05202, eq. 5, with beta = 1.
    """
    return _activate("swiglu", gate_up, 0.0, 0.0, 0.0, clamped=False)


def _activate(
    name: str, gate_up: Tensor, alpha: float, limit: float, beta: float, *, clamped: bool
) -> Tensor:
    require(
        gate_up.ndim == 2
        and gate_up.shape[1] % 2 == 0
        and gate_up.stride(1) == 1
        and gate_up.dtype in FLOATS,
        name,
        gate_up=gate_up,
    )
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        launch = settings("swiglu", gate_up)
        _swiglu_kernel[(rows, cdiv(width, launch["BLOCK"]))](
            gate_up,
            y,
            gate_up.stride(0),
            width,
            alpha,
            limit,
            beta,
            CLAMPED=clamped,
            **launch,
        )
    return y
