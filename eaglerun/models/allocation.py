"""The empty parameters of a model on a rank, with the shapes and formats that its table states."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.table import WeightTable

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Makes a model's parameters by name, as rank ``rank`` of ``size`` holds them.

    dtype   the model's own; a weight's format may ask for another
    prefix  stands before every name: the module whose parameters are made
    """

    table: WeightTable
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    size: int = 1
    prefix: str = ""

    def under(self, module: str) -> Self:
        """The same for a module inside this one."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.table.weights

    def rows(self, name: str, *parts: str) -> int:
        """How many rows of the weight ``name`` are of these parts."""
        weight = self.table.weights[self.prefix + name]
        return weight.rows(*parts, rank=self.rank, size=self.size)

    def tensor(self, name: str) -> Tensor:
        weight = self.table.weights[self.prefix + name]
        held = weight.format.held[str(self.dtype).removeprefix("torch.")]
        shape = weight.shape(self.rank, self.size)
        return torch.empty(shape, device=self.device, dtype=_DTYPES[held])

    def parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.tensor(name), requires_grad=False)
