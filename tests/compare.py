"""A kernel against its reference on the same arguments, written memory included."""

from typing import Any

import torch
from torch import Tensor

from eaglerun.kernels import Op
from eaglerun.kernels.rows import WORDS, Best


def compare(
    op: Op[..., Any], *args: Any, tolerance: float = 1e-5, ulps: int = 1, floor: float = 0.01
) -> Any:
    """Run both on copies of ``args``; returns the kernel's result.

    Integers must be equal. float32 and float64 may differ by ``tolerance`` of the largest
    value, narrower floats by ``ulps`` units in the last place, of each value but at least of
    ``floor`` of the largest: sums that nearly cancel keep the error of their terms. fp8 must be
    equal but for one value in a hundred, which may be the next one: what is rounded to it differs
    by its own error, and rarely lies that close to the middle of two.
    """
    mine, theirs = _copied(args), _copied(args)
    actual, expected = op.kernel(*mine), op.reference(*theirs)
    for a, e in zip(_tensors((actual, *mine)), _tensors((expected, *theirs)), strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        close(a, e, tolerance, ulps, floor)
    return actual


def close(
    a: Tensor, e: Tensor, tolerance: float = 1e-5, ulps: int = 1, floor: float = 0.01
) -> None:
    if not a.is_floating_point():
        assert torch.equal(a, e), (a, e)
        return
    assert torch.equal(a.isnan(), e.isnan()), "NaN where the other has none"
    if a.dtype == torch.float8_e4m3fn:
        steps = (_rank_of_fp8(a) - _rank_of_fp8(e)).abs()
        written = steps[~e.isnan()].double()
        assert steps.max() <= 1 and written.sum() <= 0.01 * len(written), (a, e)
        return
    a, e, dtype = a.double().nan_to_num(), e.double().nan_to_num(), a.dtype
    if not a.numel():
        return
    size = e.abs()
    # The scores that stand for none (1e30) are no measure of the others' error.
    absent = size > 1e29
    assert torch.equal(a[absent], e[absent])
    a, e, size = a[~absent], e[~absent], size[~absent]
    if not a.numel():
        return
    if dtype.itemsize == 2:
        bound = ulps * torch.finfo(dtype).eps * torch.maximum(size, size.max() * floor)
    else:
        bound = torch.full_like(size, tolerance * float(size.max()))
    worst = ((a - e).abs() - bound).max()
    assert worst <= 0, f"{float((a - e).abs().max()):.3g} off, of {float(size.max()):.3g}"


def _rank_of_fp8(x: Tensor) -> Tensor:
    """Values of e4m3fn in ascending order, counted from 0; neighbours differ by one."""
    bits = x.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def _copied(args: tuple[Any, ...]) -> list[Any]:
    return [_copy(a) if isinstance(a, Tensor) else _copied_word(a) for a in args]


def _copied_word(value: Any) -> Any:
    """A tuple of tensors with each of them copied; anything else as it is."""
    return type(value)(*_copied(value)) if isinstance(value, WORDS) else value


def _copy(t: Tensor) -> Tensor:
    """A copy with the strides of t: a view of copied storage."""
    flat = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return torch.as_strided(flat.clone(), t.shape, t.stride(), t.storage_offset())


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    found: list[Tensor] = []
    for v in values:
        if isinstance(v, Best):
            # The value as a number: a float may be off by its last bit.
            found += [v.values, v.ids]
        elif isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (tuple, list)):
            found += _tensors(tuple(v))
    return found
