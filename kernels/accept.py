# mypy: allow-untyped-defs, allow-incomplete-defs
"""Which drafts of a verify stand, what is emitted, and what that makes of the state."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import begin, empty_each, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import accept as reference
from eaglerun.kernels.rows import BySlot, Emitted


@jit(varying=("targets_ptr", "targets_row", "targets_step", "values_row", "matches_row", "K"))
def _accept_kernel(
    targets_ptr,
    values_ptr,
    matches_ptr,
    num_drafts_ptr,
    emitted_ptr,
    accepted_ptr,
    broken_ptr,
    targets_row,
    targets_step,
    values_row,
    values_step,
    matches_row,
    num_drafts_step,
    K,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    num_drafts = tl.load(num_drafts_ptr + b * num_drafts_step)
    j = tl.arange(0, BLOCK_K)
    judged = (j < K) & (j < num_drafts)
    stands = tl.load(matches_ptr + b * matches_row + j, mask=judged, other=0).to(tl.int1)
    # The first row that does not stand: the number of drafts that do.
    accepted = tl.min(tl.where(judged & stands, BLOCK_K, j), axis=0)
    token = tl.load(targets_ptr + b * targets_row + j * targets_step, mask=j <= K, other=-1)
    kept = (j <= accepted) & (num_drafts >= 0)
    tl.store(emitted_ptr + b * (K + 1) + j, tl.where(kept, token, -1), mask=j <= K)
    tl.store(accepted_ptr + b, accepted.to(tl.int64))
    real = (j <= K) & (j <= num_drafts)
    value = tl.load(values_ptr + b * values_row + j * values_step, mask=real, other=0.0)
    # A NaN is not below infinity either.
    finite = tl.abs(value) < float("inf")
    tl.store(broken_ptr + b, tl.max(tl.where(finite, 0, 1), axis=0).to(tl.int64))


@jit(varying=("rows",))
def _move_on_kernel(
    emitted_ptr,
    accepted_ptr,
    broken_ptr,
    slots_ptr,
    length_ptr,
    last_token_ptr,
    num_generated_ptr,
    kept_emitted_ptr,
    kept_accepted_ptr,
    kept_broken_ptr,
    slots_step,
    kept_row,
    kept_accepted_step,
    kept_broken_step,
    rows,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + b * slots_step)
    accepted = tl.load(accepted_ptr + b)
    j = tl.arange(0, BLOCK)
    token = tl.load(emitted_ptr + b * rows + j, mask=j < rows, other=-1)
    count = tl.sum((token >= 0).to(tl.int64), axis=0)
    newest = tl.max(tl.where(j == accepted, token, -1), axis=0)
    # Padding sequences share a slot, and all write what is there already.
    tl.store(length_ptr + slot, tl.load(length_ptr + slot) + count)
    tl.store(num_generated_ptr + slot, tl.load(num_generated_ptr + slot) + count)
    tl.store(last_token_ptr + slot, tl.maximum(newest, 0))
    tl.store(kept_emitted_ptr + b * kept_row + j, token, mask=j < rows)
    tl.store(kept_accepted_ptr + b * kept_accepted_step, accepted)
    tl.store(kept_broken_ptr + b * kept_broken_step, tl.load(broken_ptr + b))


@jit(varying=("source_row", "width", "count"))
def _window_kernel(
    source_ptr, slots_ptr, start_ptr, out_ptr, source_row, slots_step, width, count,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + b * slots_step)
    j = tl.arange(0, BLOCK)
    at = tl.minimum(tl.load(start_ptr + b) + j, width - 1)
    found = tl.load(source_ptr + slot * source_row + at, mask=j < count)
    tl.store(out_ptr + b * count + j, found, mask=j < count)


@paired(reference.accept)
def accept(targets: Tensor, values: Tensor, matches: Tensor, num_drafts: Tensor) -> Emitted:
    """Keep drafts up to the first that does not match, then the target's own token.

    accepted[b] = number of leading True in matches[b, :num_drafts[b]];
    tokens[b, j] = targets[b, j] for j <= accepted[b], else -1;
    broken[b] = 1 where a value of values[b, :num_drafts[b] + 1] is not finite, else 0.

    Shapes  targets [B, K + 1] int64, the token of row j, which is the draft itself where it
            matches; values [B, K + 1] float64, how good the target finds its best token there; both
            of any strides; matches [B, K] bool, last dim contiguous; num_drafts [B] int64 of any
            stride, -1 on padding sequences, which emit nothing. Returns tokens [B, K + 1],
            accepted and broken [B] (0 on padding) int64. B and K may be 0.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    Source  Leviathan et al. 2023, arXiv:2211.17192, algorithm 1, for chains of one-hot drafts.
    """
    batch, k = matches.shape
    require(
        targets.shape == values.shape == (batch, k + 1)
        and num_drafts.shape == (batch,)
        and targets.dtype == num_drafts.dtype == torch.int64
        and values.dtype == torch.float64
        and matches.dtype == torch.bool
        and (k < 2 or matches.stride(1) == 1),
        "accept",
        targets=targets,
        values=values,
        matches=matches,
        num_drafts=num_drafts,
    )
    tokens = torch.empty(batch, k + 1, dtype=torch.int64, device=targets.device)
    accepted, broken = empty_each(2, (batch,), targets.device)
    if batch:
        _accept_kernel[(batch,)](
            targets,
            values,
            matches,
            num_drafts,
            tokens,
            accepted,
            broken,
            *targets.stride(),
            *values.stride(),
            matches.stride(0),
            num_drafts.stride(0),
            k,
            BLOCK_K=power_of_2(k + 1),
            **settings("one_warp", targets),
        )
    return Emitted(tokens, accepted, broken)


@paired(reference.move_on)
def move_on(
    slots: Tensor, emitted: Emitted, by_slot: BySlot, num_generated: Tensor, kept: Emitted
) -> None:
    """What a verify emitted becomes the state of its sequences.

    With n = the number of tokens >= 0 in emitted.tokens[b] and s = slots[b]: length[s] += n,
    num_generated[s] += n, last_token[s] = max(tokens[b, accepted[b]], 0); what was emitted is kept
    for the moves after.

    Shapes  slots [B] of any stride; emitted of B sequences, contiguous; by_slot and num_generated
            of S slots; kept of at least B sequences and as many tokens, whose last dim is
            contiguous; all int64. Sequences that share a slot (padding) emit nothing. B may be 0.
    Writes  length and last_token of by_slot, num_generated, kept, in place.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    batch, rows = emitted.tokens.shape
    state = (by_slot.length, by_slot.last_token, num_generated)
    one_each = (emitted.accepted, emitted.broken)
    require(
        slots.shape == (batch,)
        and all(t.shape == (batch,) for t in one_each)
        and all(t.is_contiguous() for t in emitted)
        and all(t.ndim == 1 and t.is_contiguous() for t in state)
        and all(t.shape[0] >= batch for t in kept)
        and kept.tokens.shape[1] >= rows
        and kept.tokens.stride(1) == 1
        and kept.accepted.ndim == kept.broken.ndim == 1
        and all(t.dtype == torch.int64 for t in (slots, *emitted, *state, *kept)),
        "move_on",
        slots=slots,
        emitted=emitted,
        num_generated=num_generated,
        kept=kept,
    )
    if batch:
        _move_on_kernel[(batch,)](
            *emitted,
            slots,
            *state,
            *kept,
            slots.stride(0),
            kept.tokens.stride(0),
            kept.accepted.stride(0),
            kept.broken.stride(0),
            rows,
            BLOCK=power_of_2(rows),
            **settings("one_warp", slots),
        )


@paired(reference.window)
def window(source: Tensor, slots: Tensor, start: Tensor, count: int) -> Tensor:
    """``count`` entries of each sequence's row of ``source`` from ``start`` on, the last one again
    past the end: y[b, j] = source[slots[b], min(start[b] + j, L - 1)].

    Shapes  source [S, L], last dim contiguous; slots [B] of any stride; start [B] contiguous,
            not negative; all int64; returns [B, count] int64.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    batch = slots.shape[0]
    require(
        source.ndim == 2
        and source.stride(1) == 1
        and start.shape == (batch,)
        and start.is_contiguous()
        and all(t.dtype == torch.int64 for t in (source, slots, start)),
        "window",
        source=source,
        slots=slots,
        start=start,
    )
    out = torch.empty(batch, count, dtype=torch.int64, device=source.device)
    if out.numel():
        _window_kernel[(batch,)](
            source,
            slots,
            start,
            out,
            source.stride(0),
            slots.stride(0),
            source.shape[1],
            count,
            BLOCK=power_of_2(count),
            **settings("one_warp", source),
        )
    return out
