"""The gated activations: the target's clamped SwiGLU and the draft's plain one."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cast, wide


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """SwiGLU with a clamp and an offset, over a row of [gate | up].

    g = min(gate, limit) (no lower clamp); u = clamp(up, -limit, limit)
    y = (u + beta) * g * sigmoid(alpha * g), cast once at the end.

    Shapes  gate_up [N, 2 * I], last dim contiguous, gate first; returns [N, I] contiguous.
    Dtypes  fp32 inside (fp64 for fp64), one cast to gate_up.dtype.
    Raises  ValueError on an odd last dim.
    Source  MiniMaxM3VLDenseMLP (transformers 5.23, models/minimax_m3_vl); GPT-OSS with halves.
    """
    gate, up = _halves("swiglu_oai", gate_up)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return cast((up + beta) * gate * torch.sigmoid(alpha * gate), gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """y = gate * sigmoid(gate) * up over a row of [gate | up]; shapes, dtypes as swiglu_oai.

    Source  Shazeer 2020, arXiv:2002.05202, eq. 5, with beta = 1.
    """
    gate, up = _halves("swiglu", gate_up)
    return cast(gate * torch.sigmoid(gate) * up, gate_up.dtype)


def _halves(name: str, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up {tuple(gate_up.shape)} has no two halves")
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return gate, up
