"""The draft state that a block hands to the block after it."""

import torch
from torch import Tensor


def store_carry(hidden: Tensor, kv_slots: Tensor, carry: Tensor, block_size: int) -> None:
    """See eaglerun.kernels.carry.store_carry."""
    last = (kv_slots >= 0) & (kv_slots % block_size == block_size - 1)
    carry[torch.div(kv_slots[last], block_size, rounding_mode="floor")] = hidden[last]
