"""What each kernel must compute: plain PyTorch, and the CPU backend."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def remember_last(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the answer to the last call, and give it again to a call with the very same tensors.

    The layers of a forward ask the same thing about the same rows, and on a CPU asking costs more
    than a layer's arithmetic. Tensors are told apart by identity: whoever changes one in place
    between two calls is answered wrongly, and nobody does that to a forward's positions.
    """
    asked: tuple[object, ...] = ()
    answer: list[R] = []

    @functools.wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal asked, answer
        if kwargs or len(args) != len(asked) or any(map(_differ, asked, args)):
            answer = [function(*args, **kwargs)]
            asked = () if kwargs else args
        return answer[0]

    return remembering


def _differ(a: object, b: object) -> bool:
    return a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b)


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype a reference accumulates in: float64 stays, the rest becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
