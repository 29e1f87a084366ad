"""What each kernel must compute: plain PyTorch, and the CPU backend.

A reference's contract is the docstring of the op of the same name (kernels/<op>.py). Beyond it a
reference takes float64 too, and accumulates in it, and any strides that PyTorch takes; where it
checks less, PyTorch raises.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from eaglerun.kernels.rows import Best

P = ParamSpec("P")
R = TypeVar("R")


def remember_last(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the answer to the last call, and give it again to a call with the very same tensors.

    The layers of a forward ask the same thing about the same rows, and on a CPU asking costs more
    than a layer's arithmetic. Tensors are told apart by identity: whoever changes one in place
    between two calls is answered wrongly, and nobody does that to a forward's positions; nor may
    anyone write into an answer. Question and answer are one tuple, so that two threads that
    interleave recompute and never mix.
    """
    last: tuple[tuple[object, ...], R] | None = None

    @functools.wraps(function)
    def remembering(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal last
        held = last
        if held is None or kwargs or not _same(held[0], args):
            held = (args, function(*args, **kwargs))
            if not kwargs:
                last = held
        return held[1]

    return remembering


def _same(asked: tuple[object, ...], args: tuple[object, ...]) -> bool:
    if len(asked) != len(args):
        return False
    for a, b in zip(asked, args, strict=True):
        if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
            return False
    return True


def wide(x: Tensor) -> Tensor:
    """``x`` in the dtype a reference accumulates in: float64 stays, the rest becomes float32."""
    return x if x.dtype == torch.float32 or x.dtype == torch.float64 else x.float()


def best_of(scores: Tensor) -> Best:
    """The largest of each row of ``scores`` [N, V], the first of equals; a NaN is above all."""
    values, ids = scores.max(dim=-1)
    return Best(torch.stack((values.double().view(torch.int64), ids), dim=-1))


FP8_MAX = 448.0  # of e4m3fn, which has no infinity


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which costs as much as a small sum even where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as a cache of ``dtype`` holds it: the nearest value, the even one of two; fp8 (e4m3fn,
    scale 1) saturates at 448."""
    return cast(x.clamp(-FP8_MAX, FP8_MAX) if dtype == torch.float8_e4m3fn else x, dtype)


def as_bytes(cache: Tensor) -> Tensor:
    """A cache of fp8 as uint8, for torch copies and gathers few kinds of numbers; others as is."""
    return cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache


def cache_rows(cache: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``index`` [L] of a cache [R, D], as values of ``dtype``."""
    return cast(as_bytes(cache).index_select(0, index).view(cache.dtype), dtype)
