"""Which drafts of a verify stand, what is emitted, and what that makes of the state."""

import torch
from torch import Tensor


def accept(targets: Tensor, matches: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """See eaglerun.kernels.accept.accept."""
    k = matches.shape[1]
    row = torch.arange(k + 1, device=targets.device)
    judged = matches & (row[:k] < num_drafts[:, None])
    accepted = judged.long().cumprod(dim=1).sum(dim=1)
    kept = (row <= accepted[:, None]) & (num_drafts >= 0)[:, None]
    return torch.where(kept, targets, -1), accepted


def move_on(
    emitted: Tensor,
    accepted: Tensor,
    slots: Tensor,
    length: Tensor,
    last_token: Tensor,
    num_generated: Tensor,
    kept_emitted: Tensor,
    kept_accepted: Tensor,
) -> None:
    """See eaglerun.kernels.accept.move_on."""
    batch, rows = emitted.shape
    count = (emitted >= 0).sum(dim=1)
    length[slots] = length[slots] + count
    num_generated[slots] = num_generated[slots] + count
    last_token[slots] = emitted.gather(1, accepted[:, None])[:, 0].clamp(min=0)
    kept_emitted[:batch, :rows] = emitted
    kept_accepted[:batch] = accepted


def window(source: Tensor, slots: Tensor, start: Tensor, count: int) -> Tensor:
    """See eaglerun.kernels.accept.window."""
    at = start[:, None] + torch.arange(count, device=source.device)
    return source[slots[:, None], at.clamp(max=source.shape[1] - 1)]
