"""Kernels, each with a PyTorch reference of the same name and signature in reference/.

An op's docstring is its contract, and stands once: with the op. The reference points to it.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

_force_reference = False


class Op(Generic[P, R]):
    """A kernel bound to its reference.

    Tensors on the CPU take the reference, tensors on a CUDA or HIP device the kernel, and so do
    those on "meta", whose launches are listed (ahead.py). Nothing else decides: a layout or dtype
    that the kernel cannot take is a ValueError, never a silent fallback. The first argument of
    every op is a tensor, and it decides.
    """

    def __init__(self, kernel: Callable[P, R], reference: Callable[P, R]) -> None:
        self.kernel = kernel
        self.reference = reference
        functools.update_wrapper(self, kernel)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        on_cpu = getattr(first, "is_cpu")  # noqa: B009  P.args knows no types
        return (self.kernel if not on_cpu and not _force_reference else self.reference)(
            *args, **kwargs
        )


def paired(reference: Callable[P, R]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Bind a kernel's launch to its reference.

    Raises  TypeError when their signatures differ.
    """

    def bind(kernel: Callable[P, R]) -> Op[P, R]:
        if inspect.signature(kernel) != inspect.signature(reference):
            raise TypeError(f"{kernel.__name__} and its reference have different signatures")
        return Op(kernel, reference)

    return bind


@contextlib.contextmanager
def reference_kernels() -> Iterator[None]:
    """Run every op through its reference, on whatever device. For bisecting."""
    global _force_reference
    before, _force_reference = _force_reference, True
    try:
        yield
    finally:
        _force_reference = before
