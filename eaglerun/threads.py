"""The number of threads that the CPU backend computes with."""

import os

import torch
from torch import nn

# The cores, or OMP_NUM_THREADS. An engine may have lowered the number when the next one asks.
AVAILABLE = torch.get_num_threads()
# Weights that keep one thread busy. With less for each, threads wait for each other more than they
# compute (recipes/demo-cpu.md).
BYTES_PER_THREAD = 64 << 20


def use_threads(wish: int | None, models: list[nn.Module]) -> int:
    """Set torch's number of threads for engines of these models, and return it."""
    weight_bytes = sum(weight.nbytes for model in models for weight in model.parameters())
    count = cpu_threads(wish, weight_bytes)
    torch.set_num_threads(count)
    return count


def cpu_threads(wish: int | None, weight_bytes: int) -> int:
    """Threads for models of ``weight_bytes``; ``wish`` is the setting and goes before the rule.

    The rule: one thread for each BYTES_PER_THREAD, at most AVAILABLE. One alone where threads spin
    while they wait, because beside another program those are tens of times slower. They spin where
    torch was loaded before eaglerun.
    """
    if wish is not None:
        return wish
    if os.environ.get("OMP_WAIT_POLICY", "active").lower() != "passive":
        return 1
    return max(1, min(AVAILABLE, weight_bytes // BYTES_PER_THREAD))
