"""Which drafts of a verify stand, what is emitted, and what that makes of the state."""

import torch
from torch import Tensor


def accept(targets: Tensor, matches: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts up to the first that does not match, then the target's own token.

    accepted[b] = number of leading True in matches[b, :num_drafts[b]];
    emitted[b, j] = targets[b, j] for j <= accepted[b], else -1.

    Shapes  targets [B, K + 1] int64: the token of row j, the draft itself where it matches;
            matches [B, K] bool; num_drafts [B] int64, -1 on padding sequences, which emit
            nothing. Returns emitted [B, K + 1] int64 and accepted [B] int64 (0 on padding).
    Source  Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, for chains of one-hot drafts.
    """
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
    """What a verify emitted becomes the state of its sequences.

    With n = the number of tokens >= 0 in emitted[b] and s = slots[b]: length[s] += n,
    num_generated[s] += n, last_token[s] = max(emitted[b, accepted[b]], 0); emitted and accepted
    are kept for the moves after.

    Shapes  emitted [B, Q], accepted, slots [B] int64; length, last_token, num_generated [S]
            int64; kept_emitted [>= B, >= Q], kept_accepted [>= B] int64. Sequences that share a
            slot (padding) emit nothing.
    Writes  the last five, in place.
    """
    batch, rows = emitted.shape
    count = (emitted >= 0).sum(dim=1)
    length[slots] = length[slots] + count
    num_generated[slots] = num_generated[slots] + count
    last_token[slots] = emitted.gather(1, accepted[:, None])[:, 0].clamp(min=0)
    kept_emitted[:batch, :rows] = emitted
    kept_accepted[:batch] = accepted


def window(source: Tensor, slots: Tensor, start: Tensor, count: int) -> Tensor:
    """``count`` entries of each sequence's row of ``source`` from ``start`` on, the last one again
    past the end: y[b, j] = source[slots[b], min(start[b] + j, L - 1)].

    Shapes  source [S, L] int64; slots, start [B] int64; returns [B, count] int64.
    """
    at = start[:, None] + torch.arange(count, device=source.device)
    return source[slots[:, None], at.clamp(max=source.shape[1] - 1)]
