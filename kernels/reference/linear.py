"""The product of rows with a weight matrix."""

from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[n, o] = sum_k x[n, k] weight[o, k] (+ bias[o]), rounded once.

    Shapes  x [N, K]; weight [O, K]; bias [O] or None; returns [N, O].
    Dtypes  x, weight, bias alike; sums in fp32 (fp64 for fp64).
    """
    return F.linear(x, weight, bias)
