# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton where it is installed. It is the one place that imports it.

Without it the ops still import and run their references; launching a kernel says what is missing.
"""

import importlib.util
import inspect
import math
from collections.abc import Callable, Collection
from typing import Any, overload

import torch

from eaglerun.kernels.rows import WORDS

INSTALLED = importlib.util.find_spec("triton") is not None

tl: Any
if INSTALLED:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    tl = triton.language
else:

    class _Language:
        constexpr = Any

    tl = _Language


class _Missing:
    """What jit makes of a kernel without Triton."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Any:
        raise ModuleNotFoundError(f"{self._name}: a kernel needs triton, which is not installed")


@overload
def jit(kernel: Callable[..., Any]) -> Any: ...


@overload
def jit(*, varying: Collection[str]) -> Callable[[Callable[..., Any]], Any]: ...


def jit(kernel: Callable[..., Any] | None = None, *, varying: Collection[str] = ()) -> Any:
    """triton.jit, as @jit or @jit(varying=...); launched as kernel[grid](*args, **settings).

    Triton compiles a program for each kind that an argument can be: an integer that is 1, divisible
    by 16 or neither, a pointer that is aligned or not. ``varying`` names the arguments whose kind
    changes with what a step holds (numbers of rows and tiles, widths of block tables, positions in
    a larger buffer): one program takes them all, so that no step waits for a compiler. It cannot
    load vectors by what it knows of such an argument. So sizes and strides that the model fixes
    are not among them, nor is a bound of neighbouring elements.
    Raises  ValueError when the kernel has no argument of that name.
    """

    def compiled(kernel: Callable[..., Any]) -> Any:
        missing = set(varying) - set(inspect.signature(kernel).parameters)
        if missing:
            raise ValueError(f"{kernel.__name__} has no argument {', '.join(sorted(missing))}")
        if not INSTALLED:
            return _Missing(kernel.__name__)
        names = list(varying)
        return triton.jit(kernel, do_not_specialize=names, do_not_specialize_on_alignment=names)

    return compiled if kernel is None else compiled(kernel)


@jit
def let_next(OVERLAP: tl.constexpr):
    """Let the programs of the next kernel start as soon as all of this one have.

    They wait where they need what came before (wait_before). To be called after wait_before: a
    kernel that let the next in while it waits itself would let in the whole chain behind it, whose
    programs then lie unevenly over the device. For the same reason one that reads many weights
    does not let in another that does (moe_gemm). OVERLAP comes with the launch setting that asks
    the driver for it (launch.overlapping); without it nothing happens here.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait_before(OVERLAP: tl.constexpr):
    """Wait until all kernels before have ended and what they wrote can be read.

    Before it a program may read only what no kernel writes (weights) and what the kernel just
    before has itself waited for (moe_gemm's x), and write nothing. Every program that does
    anything waits, so that the end of one kernel is the end of all before it.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@jit
def begin(OVERLAP: tl.constexpr):
    wait_before(OVERLAP)
    let_next(OVERLAP)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return INSTALLED and bool(triton.knobs.runtime.interpret)


def descriptor(x: torch.Tensor, block: list[int]) -> object:
    """x as a tensor descriptor, whose load([row, column]) is a block, zero past the end of x.

    Shapes  x [R, C], rows of a multiple of 16 bytes.
    """
    return TensorDescriptor.from_tensor(x, block)


def dot_dtype(dtype: torch.dtype) -> Any:
    """What the operands of a matrix product are cast to: their dtype, and float32 in the
    interpreter, whose bfloat16 arithmetic is wrong without a word."""
    return tl.float32 if interpreting() else getattr(tl, str(dtype).removeprefix("torch."))


def empty_each(count: int, shape: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """``count`` int64 tensors of one allocation, each at a multiple of 16 bytes: where that hung on
    the shape, the kernels that take them would be two programs each."""
    size = math.prod(shape)
    out = torch.empty(count, size + size % 2, dtype=torch.int64, device=device)
    return [piece.view(shape) for piece in out[:, :size]]


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, at_least: int = 1) -> int:
    """The smallest power of two that is at least n and ``at_least`` (itself one)."""
    return max(at_least, 1 << max(n - 1, 0).bit_length())


def require(fits: bool, name: str, /, **tensors: object) -> None:
    """Raise  ValueError with the shape, strides and dtype of what a kernel cannot take."""
    if not fits:
        told = ", ".join(_told(key, value) for key, value in tensors.items())
        raise ValueError(f"{name}: no kernel for {told}")


def _told(key: str, value: object) -> str:
    if isinstance(value, WORDS):
        return ", ".join(_told(f"{key}.{name}", part) for name, part in value._asdict().items())
    if isinstance(value, torch.Tensor):
        return f"{key} {tuple(value.shape)} strides {value.stride()} {value.dtype}"
    return f"{key} {value}"


# What a launch that does not fit the device, or does not compile, raises.
LAUNCH_ERRORS: tuple[type[Exception], ...] = (triton.TritonError,) if INSTALLED else ()
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# What a cache may be besides the dtype of the queries. fp8 holds values at scale 1.
CACHES = (torch.bfloat16, torch.float8_e4m3fn)
