"""Greedy choice over the vocabulary."""

import torch
from torch import Tensor


def vocab_argmax(logits: Tensor) -> Tensor:
    """See eaglerun.kernels.vocab_argmax.vocab_argmax."""
    return torch.argmax(logits, dim=-1)
