# mypy: allow-untyped-defs, allow-incomplete-defs
"""The product of few rows with a weight matrix: a decode step's projections.

It reads every weight once, and that is all it costs. The library's kernels reach the memory limit
for the largest matrices alone; this one does for those of a layer too, and gives a row the same
bits whatever the number of rows, up to 64.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.kernels import paired
from eaglerun.kernels.language import (
    FLOATS,
    begin,
    cdiv,
    dot_dtype,
    jit,
    power_of_2,
    require,
    tl,
)
from eaglerun.kernels.launch import Settings, linear_regime, settings
from eaglerun.kernels.reference import linear as reference

# Above, the library's product.
MAX_ROWS = 64


@jit(varying=("rows",))
def _linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    rows,
    x_row,
    w_row,
    O,  # noqa: E741
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BIAS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Transposed, weights [BLOCK_N, k] times rows [k, BLOCK_T], as in moe_gemm.

    SPLITS: program_id(1) takes one of as many equal pieces of the sum.
    """
    begin(OVERLAP)
    split = tl.program_id(1)
    PIECE: tl.constexpr = K // SPLITS
    o = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    # Columns past the end read the last one, and are not stored.
    w_rows = w_ptr + tl.minimum(o, O - 1).to(tl.int64) * w_row
    w_at = w_rows[:, None] + split * PIECE + k[None, :]
    x_at = x_ptr + t[None, :] * x_row + split * PIECE + k[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    for start in range(0, PIECE, BLOCK_K):
        if PIECE % BLOCK_K == 0:
            w = tl.load(w_at).to(DOT)
            x = tl.load(x_at, mask=(t < rows)[None, :], other=0.0).to(DOT)
        else:
            inside = start + k < PIECE
            w = tl.load(w_at, mask=inside[None, :], other=0.0).to(DOT)
            x = tl.load(x_at, mask=(t < rows)[None, :] & inside[:, None], other=0.0).to(DOT)
        y = tl.dot(w, x, y, input_precision="ieee")
        w_at += BLOCK_K
        x_at += BLOCK_K
    if BIAS:
        added = o < tl.where(split == 0, O, 0)
        y += tl.load(bias_ptr + o, mask=added, other=0.0).to(tl.float32)[:, None]
    at = (split * rows + t).to(tl.int64)[None, :] * O + o[:, None]
    tl.store(y_ptr + at, y, mask=(t < rows)[None, :] & (o < O)[:, None])


@paired(reference.linear)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[n, o] = sum_k x[n, k] weight[o, k] (+ bias[o]), rounded once.

    Up to 64 rows by the kernel here; more rows, and fp32, by torch's product, which is at the
    limit there.

    Shapes  x [N, K], weight [O, K], last dims contiguous, rows of any stride; bias [O] or None;
            returns [N, O] contiguous. N may be 0.
    Dtypes  x, weight, bias alike: bf16, fp16 or fp32; sums in fp32.
    Error   1 ulp of x.dtype at the row's largest value: fp32 sums in another order. Up to 64
            rows a row's bits do not depend on the number of rows; in a batch-invariant engine
            (launch.invariant), in bf16 and at M3's widths, at any number.
    Raises  ValueError on another shape, stride or dtype.
    """
    _check("linear", x, weight, bias)
    rows, out = x.shape[0], weight.shape[0]
    if rows > MAX_ROWS or x.dtype == torch.float32 or not rows:
        return F.linear(x, weight, bias)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    _launch(x, weight, bias, y, 1, settings(f"linear_{linear_regime(rows, out)}", x))
    return y


def product_parts(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The product as several, [parts, N, O] fp32, that add up to it: of few columns and long sums,
    which by themselves would not fill the device.

    None of other shapes, and of other dtypes than bf16, whose caches take no fp32 (kv_store).
    Raises  ValueError as linear, in the name of ``name``.
    """
    _check(name, x, weight, bias)
    rows, (out, width) = x.shape[0], weight.shape
    if rows > MAX_ROWS or x.dtype != torch.bfloat16 or not rows:
        return None
    launch = settings("linear_parts", x)
    pieces, rest = divmod(width, launch["BLOCK_K"])
    limit = launch.pop("PROGRAMS") // cdiv(out, launch["BLOCK_N"])
    splits = 1 if rest else max(s for s in range(1, max(limit, 1) + 1) if pieces % s == 0)
    if splits == 1:
        return None
    parts = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    _launch(x, weight, bias, parts, splits, launch)
    return parts


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(
        x.ndim == weight.ndim == 2
        and x.shape[1] == weight.shape[1] > 0
        and x.stride(1) == weight.stride(1) == 1
        and x.dtype == weight.dtype
        and x.dtype in FLOATS
        and (bias is None or (bias.shape == weight.shape[:1] and bias.dtype == x.dtype)),
        name,
        x=x,
        weight=weight,
        bias=bias,
    )


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, splits: int, launch: Settings
) -> None:
    rows, (out, width) = x.shape[0], weight.shape
    _linear_kernel[(cdiv(out, launch["BLOCK_N"]), splits)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        rows,
        x.stride(0),
        weight.stride(0),
        out,
        K=width,
        SPLITS=splits,
        BIAS=bias is not None,
        DOT=dot_dtype(x.dtype),
        BLOCK_T=power_of_2(rows, 16),
        **launch,
    )
