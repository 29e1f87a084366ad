"""Where the rows of a decode step stand: ids, positions, KV slots and lengths, on the device."""

import torch
from torch import Tensor

from eaglerun.kernels.rows import BySlot, Newest


def kv_slots_of(positions: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """See eaglerun.kernels.draft_inputs.kv_slots_of."""
    at = positions.clamp(min=0)
    blocks = torch.gather(block_table.long(), 1, at // block_size)
    return torch.where(positions >= 0, blocks * block_size + at % block_size, -1)


def verify_inputs(
    slots: Tensor,
    num_drafts: Tensor,
    by_slot: BySlot,
    table: Tensor,
    block_size: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See eaglerun.kernels.draft_inputs.verify_inputs."""
    length = by_slot.length[slots]
    torch.index_select(by_slot.block_table, 0, slots, out=table)
    row = torch.arange(num_rows, device=length.device)
    real = row <= num_drafts[:, None]
    drafts = by_slot.draft_tokens[slots, : num_rows - 1]
    ids = torch.where(real, torch.cat([by_slot.last_token[slots][:, None], drafts], dim=1), 0)
    positions = torch.where(real, length[:, None] - 1 + row, -1)
    seq_lens = torch.where(num_drafts >= 0, length + num_drafts, 0).int()
    return ids, positions, kv_slots_of(positions, table, block_size), seq_lens, length


def draft_inputs(
    position: Tensor, pass_index: int, num_propose: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See eaglerun.kernels.draft_inputs.draft_inputs."""
    real = pass_index < num_propose
    at = torch.where(real, position + pass_index, -1)[:, None]
    slots = kv_slots_of(at, block_table, block_size)
    if pass_index == 0:
        slots = torch.full_like(slots, -1)
    return at, slots, (at[:, 0] + 1).int()


def accepted_inputs(
    emitted: Tensor, length: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See eaglerun.kernels.draft_inputs.accepted_inputs."""
    j = torch.arange(emitted.shape[1], device=emitted.device)
    positions = torch.where(emitted >= 0, length[:, None] + j, -1)
    return emitted.clamp(min=0), positions, kv_slots_of(positions, block_table, block_size)


def newest_inputs(
    slots: Tensor,
    accepted: Tensor,
    num_propose: Tensor,
    by_slot: BySlot,
    hidden: Tensor,
    newest: Newest,
) -> None:
    """See eaglerun.kernels.draft_inputs.newest_inputs."""
    row = torch.arange(slots.shape[0], device=slots.device)
    own = hidden.unflatten(0, (slots.shape[0], -1))[row, accepted]
    newest.hidden.copy_(torch.where((num_propose > 0)[:, None], own, 0.0))
    torch.index_select(by_slot.last_token, 0, slots, out=newest.tokens)
    torch.sub(by_slot.length[slots], 1, out=newest.positions)
