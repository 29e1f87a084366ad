# mypy: allow-untyped-defs, allow-incomplete-defs
"""The draft state that a block hands to the block after it."""

from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import begin, cdiv, jit, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import carry as reference


@jit
def _store_carry_kernel(
    hidden_ptr,
    slots_ptr,
    carry_ptr,
    hidden_row,
    width,
    block_size,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot < 0:
        return
    if slot % block_size != block_size - 1:
        return
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(hidden_ptr + row * hidden_row + d, mask=d < width)
    tl.store(carry_ptr + (slot // block_size) * width + d, x, mask=d < width)


@paired(reference.store_carry)
def store_carry(hidden: Tensor, kv_slots: Tensor, carry: Tensor, block_size: int) -> None:
    """Keep fc(aux) of each row that stands in the last place of its block.

    carry[kv_slots[n] // block_size] = hidden[n] where kv_slots[n] % block_size == block_size - 1.
    A rejected row's value is overwritten when its place is computed again, before the block can
    be published.

    Shapes  hidden [N, H], last dim contiguous; kv_slots [N] int64, -1 on padding rows, whose
            hidden is not read; carry [num_blocks, H] contiguous.
    Dtypes  hidden and carry alike, any; a copy.
    Writes  carry, in place; no two rows have the same slot.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    require(
        hidden.ndim == 2
        and hidden.stride(1) == 1
        and carry.is_contiguous()
        and carry.shape[1:] == hidden.shape[1:]
        and carry.dtype == hidden.dtype
        and kv_slots.shape == hidden.shape[:1]
        and kv_slots.is_contiguous(),
        "store_carry",
        hidden=hidden,
        kv_slots=kv_slots,
        carry=carry,
    )
    rows, width = hidden.shape
    if rows:
        launch = settings("copy", hidden)
        _store_carry_kernel[(rows, cdiv(width, launch["BLOCK"]))](
            hidden, kv_slots, carry, hidden.stride(0), width, block_size, **launch
        )
