"""Where the rows of a decode step stand: ids, positions, KV slots and lengths, on the device."""

import torch
from torch import Tensor

from eaglerun.kernels.rows import Newest


def kv_slots_of(positions: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """KV slot of each position: block_table[p // block_size] * block_size + p % block_size.

    Shapes  positions [B, Q] int64, -1 on padding rows; block_table [B, M] int32; returns [B, Q]
            int64, -1 where the position is -1.
    Source  facts of paged attention: vLLM's slot mapping.
    """
    at = positions.clamp(min=0)
    blocks = torch.gather(block_table.long(), 1, at // block_size)
    return torch.where(positions >= 0, blocks * block_size + at % block_size, -1)


def verify_inputs(
    slots: Tensor,
    num_drafts: Tensor,
    length: Tensor,
    last_token: Tensor,
    draft_tokens: Tensor,
    block_table: Tensor,
    block_size: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows [last token, d1 .. dk] that the target runs for each sequence, and its state.

    Row j stands at position length - 1 + j; it is a padding row where j > num_drafts. Keys that
    the rows see, once their own are written: length + num_drafts.

    Shapes  slots, num_drafts [B] int64 (num_drafts -1 on padding sequences); by slot: length,
            last_token [S] int64, draft_tokens [S, >= num_rows - 1], block_table [S, M] int32.
            Returns token_ids, positions, kv_slots [B, num_rows] int64, seq_lens [B] int32, and
            length [B] and block_table [B, M] of the slots. Padding rows: id 0, position -1,
            slot -1.
    """
    length, table = length[slots], block_table[slots]
    row = torch.arange(num_rows, device=length.device)
    real = row <= num_drafts[:, None]
    drafts = draft_tokens[slots, : num_rows - 1]
    ids = torch.where(real, torch.cat([last_token[slots][:, None], drafts], dim=1), 0)
    positions = torch.where(real, length[:, None] - 1 + row, -1)
    seq_lens = torch.where(num_drafts >= 0, length + num_drafts, 0).int()
    return ids, positions, kv_slots_of(positions, table, block_size), seq_lens, length, table


def draft_inputs(
    position: Tensor, pass_index: int, num_propose: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, KV slot and length of the one row per sequence that draft pass ``pass_index`` runs.

    The row of pass s stands s places after the newest token. Its KV is written from pass 1 on
    (the fill wrote that of pass 0). Sequences that propose fewer than s + 1 tokens have a padding
    row (vLLM's rule for lengths: rejected rows are behind, not under, the new ones).

    Shapes  position [B] int64, of the newest token; num_propose [B] int64; block_table [B, M].
            Returns positions [B, 1], kv_slots [B, 1] int64 and seq_lens [B] int32.
    """
    real = pass_index < num_propose
    at = torch.where(real, position + pass_index, -1)[:, None]
    slots = kv_slots_of(at, block_table, block_size)
    if pass_index == 0:
        slots = torch.full_like(slots, -1)
    return at, slots, (at[:, 0] + 1).int()


def accepted_inputs(
    emitted: Tensor, length: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The draft rows of the tokens that a verify emitted: token j of a sequence stands at position
    length + j. Rows that emit nothing are padding: id 0, position -1, slot -1.

    Shapes  emitted [B, Q] int64, -1 where there is none; length [B] int64, before the step;
            block_table [B, M] int32. Returns token_ids, positions and kv_slots [B, Q] int64.
    """
    j = torch.arange(emitted.shape[1], device=emitted.device)
    positions = torch.where(emitted >= 0, length[:, None] + j, -1)
    return emitted.clamp(min=0), positions, kv_slots_of(positions, block_table, block_size)


def newest_inputs(
    slots: Tensor,
    accepted: Tensor,
    num_propose: Tensor,
    length: Tensor,
    last_token: Tensor,
    hidden: Tensor,
) -> Newest:
    """What the first draft pass starts from: the newest token of each sequence, where it stands,
    and the hidden state of the position before, row accepted[b] of its rows.

    Shapes  slots, accepted, num_propose [B] int64; by slot: length, last_token [S] int64; hidden
            [B * Q, H]; B at least 1. Returns tokens, positions [B] int64 and hidden [B, H],
            zeros where num_propose is 0: that of a padding sequence may hold anything.
    """
    row = torch.arange(slots.shape[0], device=slots.device)
    own = hidden.unflatten(0, (slots.shape[0], -1))[row, accepted]
    own = torch.where((num_propose > 0)[:, None], own, 0.0)
    return Newest(last_token[slots], length[slots] - 1, own)
