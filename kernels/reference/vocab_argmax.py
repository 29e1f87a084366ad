"""Greedy choice over the vocabulary."""

import torch
from torch import Tensor


def vocab_argmax(logits: Tensor) -> Tensor:
    """Id of the largest logit of each row; the lowest id among equals.

    Shapes  logits [N, V]; returns [N] int64.
    """
    return torch.argmax(logits, dim=-1)
