"""The empty parameters of a model, with the shapes and formats that its table of weights states."""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.table import Weight, WeightTable

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
}


@dataclass(frozen=True, slots=True)
class Allocation:
    """Makes a model's parameters by name.

    dtype   the model's own; a weight's format may ask for another
    prefix  stands before every name: the module whose parameters are made
    """

    table: WeightTable
    device: torch.device
    dtype: torch.dtype
    prefix: str = ""

    def under(self, module: str) -> Self:
        """The same for a module inside this one."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.table.weights

    def weight(self, name: str) -> Weight:
        return self.table.weights[self.prefix + name]

    def tensor(self, name: str) -> Tensor:
        weight = self.weight(name)
        held = weight.format.held[str(self.dtype).removeprefix("torch.")]
        return torch.empty(weight.shape(), device=self.device, dtype=_DTYPES[held])

    def parameter(self, name: str) -> nn.Parameter:
        return nn.Parameter(self.tensor(name), requires_grad=False)
