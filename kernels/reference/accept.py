"""Which drafts of a verify stand, what is emitted, and what that makes of the state."""

import torch
from torch import Tensor

from eaglerun.kernels.rows import BySlot, Emitted


def accept(targets: Tensor, values: Tensor, matches: Tensor, num_drafts: Tensor) -> Emitted:
    """See eaglerun.kernels.accept.accept."""
    k = matches.shape[1]
    row, drafted = torch.arange(k + 1, device=targets.device), num_drafts[:, None]
    judged = matches & (row[:k] < drafted)
    accepted = judged.long().cumprod(dim=1).sum(dim=1)
    kept = (row <= accepted[:, None]) & (drafted >= 0)
    # x - x is 0 for any other x than NaN and infinity.
    broken = ((row <= drafted) & (values - values != 0)).any(dim=1)
    return Emitted(torch.where(kept, targets, -1), accepted, broken.long())


def move_on(
    slots: Tensor, emitted: Emitted, by_slot: BySlot, num_generated: Tensor, kept: Emitted
) -> None:
    """See eaglerun.kernels.accept.move_on."""
    tokens, accepted, broken = emitted
    batch, rows = tokens.shape
    count = (tokens >= 0).sum(dim=1)
    by_slot.length[slots] = by_slot.length[slots] + count
    num_generated[slots] = num_generated[slots] + count
    by_slot.last_token[slots] = tokens.gather(1, accepted[:, None])[:, 0].clamp(min=0)
    kept.tokens[:batch, :rows] = tokens
    kept.accepted[:batch] = accepted
    kept.broken[:batch] = broken


def window(source: Tensor, slots: Tensor, start: Tensor, count: int) -> Tensor:
    """See eaglerun.kernels.accept.window."""
    at = start[:, None] + torch.arange(count, device=source.device)
    return source[slots[:, None], at.clamp(max=source.shape[1] - 1)]
