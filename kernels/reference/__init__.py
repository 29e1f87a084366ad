"""What each kernel must compute: plain PyTorch, and the CPU backend."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype a reference accumulates in: float64 stays, the rest becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
