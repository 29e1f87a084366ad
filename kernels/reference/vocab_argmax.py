"""Greedy choice over the vocabulary."""

from torch import Tensor

from eaglerun.kernels.reference import best_of
from eaglerun.kernels.rows import Best


def vocab_argmax(logits: Tensor) -> Best:
    """See eaglerun.kernels.vocab_argmax.vocab_argmax."""
    return best_of(logits)
