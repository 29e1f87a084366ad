# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which drafts of a verify stand, and what is emitted."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import accept as reference


@jit
def _accept_kernel(
    targets_ptr,
    matches_ptr,
    num_drafts_ptr,
    emitted_ptr,
    accepted_ptr,
    targets_row,
    matches_row,
    num_drafts_step,
    K,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    num_drafts = tl.load(num_drafts_ptr + b * num_drafts_step)
    j = tl.arange(0, BLOCK_K)
    judged = (j < K) & (j < num_drafts)
    stands = tl.load(matches_ptr + b * matches_row + j, mask=judged, other=0).to(tl.int1)
    # The first row that does not stand: the number of drafts that do.
    accepted = tl.min(tl.where(judged & stands, BLOCK_K, j), axis=0)
    token = tl.load(targets_ptr + b * targets_row + j, mask=j <= K, other=-1)
    kept = (j <= accepted) & (num_drafts >= 0)
    tl.store(emitted_ptr + b * (K + 1) + j, tl.where(kept, token, -1), mask=j <= K)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))


@paired(reference.accept)
def accept(targets: Tensor, matches: Tensor, num_drafts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep drafts up to the first that does not match, then the target's own token.

    accepted[b] = number of leading True in matches[b, :num_drafts[b]];
    emitted[b, j] = targets[b, j] for j <= accepted[b], else -1.

    Shapes  targets [B, K + 1] int64; matches [B, K] bool, last dims contiguous; num_drafts [B]
            int64 of any stride, -1 on padding sequences, which emit nothing. Returns emitted
            [B, K + 1] and accepted [B] int64 (0 on padding). B and K may be 0.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    Source  Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, for chains of one-hot drafts.
    """
    batch, k = matches.shape
    require(
        targets.shape == (batch, k + 1)
        and num_drafts.shape == (batch,)
        and targets.dtype == num_drafts.dtype == torch.int64
        and matches.dtype == torch.bool
        and targets.stride(1) == 1
        and (k < 2 or matches.stride(1) == 1),
        "accept",
        targets=targets,
        matches=matches,
        num_drafts=num_drafts,
    )
    emitted = torch.empty(batch, k + 1, dtype=torch.int64, device=targets.device)
    accepted = torch.empty(batch, dtype=torch.int64, device=targets.device)
    if batch:
        _accept_kernel[(batch,)](
            targets,
            matches,
            num_drafts,
            emitted,
            accepted,
            targets.stride(0),
            matches.stride(0),
            num_drafts.stride(0),
            k,
            BLOCK_K=power_of_2(k + 1),
            **settings("one_warp", targets),
        )
    return emitted, accepted
