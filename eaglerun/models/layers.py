"""The parts both models are made of: weights with a forward, never trained."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eaglerun.kernels.linear import linear
from eaglerun.kernels.reference.rope import rope_table
from eaglerun.kernels.rmsnorm import (
    add_gemma_rmsnorm,
    add_rmsnorm,
    gemma_rmsnorm,
    rmsnorm,
)


class Linear(nn.Module):
    """y = x weight^T (+ bias); weight [out_features, in_features]."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Output columns start..stop alone; the other rows of the weight are not read."""
        return linear(x, *self.rows_of(start, stop))

    def rows_of(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias of output columns start..stop."""
        return self.weight[start:stop], None if self.bias is None else self.bias[start:stop]


class Embedding(nn.Module):
    """Rows of weight [vocab_size, hidden] by id."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Norm(nn.Module):
    """RMSNorm with a plain weight (the draft's); weight [size], or [groups, size]."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normed sum, and the sum: the completed residual stream."""
        return add_rmsnorm(x, residual, self.weight, self.eps)


class GemmaNorm(Norm):
    """RMSNorm whose weight is an offset from one (the target's). Never mixed with Norm."""

    def forward(self, x: Tensor) -> Tensor:
        return gemma_rmsnorm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_gemma_rmsnorm(x, residual, self.weight, self.eps)


class Rope:
    """The rotation table [max_positions, rotary_dim], float32 (float64 in a float64 model).

    It is a function of its arguments and no part of a checkpoint: built on a device's first use,
    so that a model made on the meta device has it too, and kept at that address.
    """

    def __init__(
        self, max_positions: int, rotary_dim: int, theta: float, dtype: torch.dtype
    ) -> None:
        self._arguments = (max_positions, rotary_dim, theta)
        self._dtype = dtype
        self._tables: dict[torch.device, Tensor] = {}

    def table(self, device: torch.device) -> Tensor:
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = rope_table(*self._arguments, device, self._dtype)
        return found
