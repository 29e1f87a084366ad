"""Copies between host and device that the host does not wait for.

On a GPU both ends on the host lie in pinned memory. Such memory may be let go at once: torch hands
it out again only after the copies that use it have run.
"""

import torch
from torch import Tensor


def host_tensor(values: object, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of host values on ``device``; the host does not wait for the copy."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``; the host does not wait for the copy."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, there once the step's last event is; the next step may overwrite the
    original at once."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
