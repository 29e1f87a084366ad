"""The draft state that a block hands to the block after it."""

import torch
from torch import Tensor


def store_carry(hidden: Tensor, kv_slots: Tensor, carry: Tensor, block_size: int) -> None:
    """Keep fc(aux) of each row that stands in the last place of its block.

    carry[kv_slots[n] // block_size] = hidden[n] where kv_slots[n] % block_size == block_size - 1.
    A rejected row's value is overwritten when its place is computed again, before the block can
    be published.

    Shapes  hidden [N, H]; kv_slots [N] int64, -1 on padding rows; carry [num_blocks, H].
    Writes  carry, in place.
    """
    last = (kv_slots >= 0) & (kv_slots % block_size == block_size - 1)
    carry[torch.div(kv_slots[last], block_size, rounding_mode="floor")] = hidden[last]
