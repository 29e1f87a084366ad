"""Attention over the selected blocks of the paged cache."""

import torch
from torch import Tensor

from eaglerun.kernels.reference.attention_dense import (
    attend,
    blind_rows,
    check_rows,
    group_cells,
    keys_of,
    penalty,
    ragged_tiles,
    visible_keys,
)
from eaglerun.kernels.rows import LayerKV, Rows


def attention_sparse(q: Tensor, kv: LayerKV, block_ids: Tensor, rows: Rows, scale: float) -> Tensor:
    """See eaglerun.kernels.attention_sparse.attention_sparse."""
    if rows.cu_seqlens is not None:
        out = torch.zeros_like(q)
        for part, tile in ragged_tiles(rows):
            out[part] = attention_sparse(q[part], kv, block_ids[part], tile, scale)
        return out
    block_size, groups = kv.k.shape[1:3]
    check_rows("attention_sparse", q, groups, rows)
    keys = visible_keys(*keys_of(rows), block_size)
    batch, per_seq, length = keys.hidden.shape
    num_blocks = length // block_size
    bias, _ = penalty(keys.hidden, q.dtype)
    if block_ids.shape[2] * per_seq < num_blocks:
        cells, bias = _selected(block_ids, keys.slots, bias, num_blocks)
    else:
        cells = group_cells(keys.slots, groups)
        chosen = _chosen(block_ids, num_blocks, bias.dtype).view(batch, per_seq, groups, -1, 1)
        bias = bias.view(batch, 1, per_seq, num_blocks, block_size) + chosen.transpose(1, 2)
        bias = bias.view(batch, groups, per_seq, 1, length)
    return attend(q, kv, cells, bias, blind_rows(bias), scale)


def _chosen(block_ids: Tensor, num_blocks: int, dtype: torch.dtype) -> Tensor:
    """0 for a block that is chosen, minus infinity for the others: [N, G, num_blocks].

    Where a sequence's keys are few, masking them costs less than gathering for each row.
    """
    shape = (*block_ids.shape[:2], num_blocks + 1)
    penalties = torch.full(shape, -torch.inf, dtype=dtype, device=block_ids.device)
    # Unused places (-1) fall into the extra last column, which is cut off.
    return penalties.scatter_(-1, block_ids.long() % (num_blocks + 1), 0.0)[..., :num_blocks]


def _selected(
    block_ids: Tensor, slots: Tensor, bias: Tensor, num_blocks: int
) -> tuple[Tensor, Tensor]:
    """Cells [N, G, topk * block_size] and bias [N, G, 1, 1, ..] of the chosen blocks alone: each
    row becomes a sequence of its own."""
    count, groups = block_ids.shape[:2]
    block_size = slots.shape[1] // num_blocks
    unused = block_ids < 0
    row = torch.arange(count, device=slots.device)[:, None, None]
    ids = block_ids.clamp(min=0)
    of_sequence = (row // (count // len(slots)) * num_blocks + ids).flatten()
    of_row = (row * num_blocks + ids).flatten()
    slots = slots.view(-1, block_size).index_select(0, of_sequence).view(count, groups, -1)
    bias = bias.reshape(-1, block_size).index_select(0, of_row)
    bias = bias.view(*block_ids.shape, block_size).masked_fill_(unused[..., None], -torch.inf)
    cells = slots * groups + torch.arange(groups, device=slots.device)[:, None]
    return cells, bias.view(count, groups, 1, 1, -1)
