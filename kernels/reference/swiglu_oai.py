"""The gated activations: the target's clamped SwiGLU and the draft's plain one."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cast, wide


def swiglu_oai(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """See eaglerun.kernels.swiglu_oai.swiglu_oai."""
    gate, up = _halves("swiglu_oai", gate_up)
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return cast((up + beta) * gate * torch.sigmoid(alpha * gate), gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """See eaglerun.kernels.swiglu_oai.swiglu."""
    gate, up = _halves("swiglu", gate_up)
    return cast(gate * torch.sigmoid(gate) * up, gate_up.dtype)


def _halves(name: str, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{name}: gate_up {tuple(gate_up.shape)} has no two halves")
    gate, up = wide(gate_up).chunk(2, dim=-1)
    return gate, up
