# mypy: allow-untyped-defs, allow-incomplete-defs
"""The fused norms that build the draft's matrix inputs, the embedding looked up by one of them."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, begin, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import draft_fuse as reference
from eaglerun.kernels.rmsnorm import MAX_ROW, rmsnorm


@jit(varying=("ids_ptr", "ids_step"))
def _embed_dual_rmsnorm_kernel(
    ids_ptr,
    table_ptr,
    hidden_ptr,
    embed_weight_ptr,
    hidden_weight_ptr,
    y_ptr,
    ids_step,
    table_row,
    hidden_row,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (n, 0) norms the embedding of row n's id, (n, 1) its hidden state."""
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    live = d < D
    if tl.program_id(1) == 0:
        x_ptr = table_ptr + tl.load(ids_ptr + row * ids_step) * table_row
        x = tl.load(x_ptr + d, mask=live, other=0.0).to(tl.float32)
        w = tl.load(embed_weight_ptr + d, mask=live, other=0.0).to(tl.float32)
    else:
        x = tl.load(hidden_ptr + row * hidden_row + d, mask=live, other=0.0).to(tl.float32)
        w = tl.load(hidden_weight_ptr + d, mask=live, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * w
    tl.store(y_ptr + (row * 2 + tl.program_id(1)) * D + d, y, mask=live)


@paired(reference.group_rmsnorm)
def group_rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One RMSNorm per aux tap, laid side by side as the input of fc.

    y[n, g * D + d] = x[n, g, d] * rsqrt(mean_d(x[n, g, :]^2) + eps) * weight[g, d]

    Shapes  x [N, G, D], last dim contiguous, any other strides (the aux buffers are [G, rows, D]);
            weight [G, D]; returns [N, G * D] contiguous.
    Dtypes, Error  as rmsnorm, whose kernel this is.
    Raises  ValueError when weight is not [G, D], and as rmsnorm.
    Source  fc_norm of EAGLE-3.1 drafts (vLLM 0.33.0, models/llama_eagle3.py).
    """
    require(x.ndim == 3 and weight.shape == x.shape[1:], "group_rmsnorm", x=x, weight=weight)
    return rmsnorm.kernel(x, weight, eps).flatten(1)


@paired(reference.embed_dual_rmsnorm)
def embed_dual_rmsnorm(
    ids: Tensor,
    table: Tensor,
    hidden: Tensor,
    embed_weight: Tensor,
    hidden_weight: Tensor,
    eps: float,
) -> Tensor:
    """The draft's qkv input: the embedding of each id and the hidden state beside it, normed.

    y[n] = [rmsnorm(table[ids[n]], embed_weight) | rmsnorm(hidden[n], hidden_weight)], fp32
    inside, cast once.

    Shapes  ids [N], each a row of table; table [V, D], hidden [N, D], last dims contiguous;
            weights [D]; returns [N, 2 * D] contiguous. N may be 0. D <= 32768.
    Dtypes  ids int64; table and hidden bf16, fp16 or fp32, alike; weights the same or fp32.
    Error   as rmsnorm.
    Raises  ValueError on another shape, stride or dtype. The reference raises IndexError on an
            id that table has not; the kernel does not see one.
    """
    rows, width = hidden.shape
    require(
        ids.shape == (rows,)
        and ids.dtype == torch.int64
        and table.ndim == 2
        and embed_weight.shape == hidden_weight.shape == table.shape[1:] == (width,)
        and 0 < width <= MAX_ROW
        and table.stride(1) == hidden.stride(1) == 1
        and table.dtype == hidden.dtype
        and hidden.dtype in FLOATS
        and {embed_weight.dtype, hidden_weight.dtype} <= {hidden.dtype, torch.float32},
        "embed_dual_rmsnorm",
        ids=ids,
        table=table,
        hidden=hidden,
        embed_weight=embed_weight,
        hidden_weight=hidden_weight,
    )
    y = torch.empty(rows, 2 * width, dtype=hidden.dtype, device=hidden.device)
    if rows:
        _embed_dual_rmsnorm_kernel[(rows, 2)](
            ids,
            table,
            hidden,
            embed_weight,
            hidden_weight,
            y,
            ids.stride(0),
            table.stride(0),
            hidden.stride(0),
            eps,
            D=width,
            BLOCK_D=power_of_2(width),
            **settings("rmsnorm", hidden),
        )
    return y
