"""Which drafts of a verify stand, and what is emitted."""

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
