"""Muon: momentum whose matrices are made orthogonal before the step (Jordan et al., 2024).

All matrices of one shape are worked on at once.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# The quintic iteration's coefficients: steep at zero, near one everywhere after five rounds.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonal(x: Tensor, rounds: int = 5) -> Tensor:
    """About U V^T of each matrix of x [..., R, C] with the singular value decomposition U S V^T."""
    y = x.to(torch.bfloat16 if x.is_cuda else torch.float32)
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = y @ y.mT
        y = _A * y + (_B * gram + _C * gram @ gram) @ y
    return (y.mT if tall else y).to(x.dtype)


class Muon(torch.optim.Optimizer):
    """For matrices [R, C] and stacks of them [E, R, C].

    A step has the root mean square 0.2 * lr, as AdamW's steps have, so that both share a schedule.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of every group; a closure is not asked for."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                by_shape.setdefault(tuple(p.shape[-2:]), []).append(p)
            for (rows, columns), params in by_shape.items():
                grads = [p.grad for p in params if p.grad is not None]
                for p, grad in zip(params, grads, strict=True):
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(grad, 1 - group["momentum"])
                    grad.lerp_(state["momentum"], group["momentum"])  # Nesterov's look ahead
                flat = torch.cat([g.reshape(-1, rows, columns) for g in grads])
                scale = 0.2 * max(rows, columns) ** 0.5
                parts = orthogonal(flat).split([p.numel() // (rows * columns) for p in params])
                for p, part in zip(params, parts, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(part.reshape(p.shape), alpha=-group["lr"] * scale)
