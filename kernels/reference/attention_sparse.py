"""Attention over the selected blocks of the paged cache."""

import torch
from torch import Tensor

from eaglerun.kernels.reference.attention_dense import (
    attend,
    blind_rows,
    check_rows,
    group_cells,
    penalty,
    ragged_tiles,
    visible_keys,
)


def attention_sparse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
) -> Tensor:
    """Attention of uniform rows, each group to its own selection of blocks.

    Row n of sequence b = n // (N / B), group g, sees the keys
        t <= positions[n], t < seq_lens[b], t // block_size in block_ids[n, g];
    the rest as attention_dense, which it equals when every causal block is selected. Unselected
    keys are absent from the denominator.

    Shapes  as attention_dense; block_ids [N, G, topk], block numbers inside the sequence in any
            order, -1 unused; returns [N, H, D].
    Dtypes, Raises  as attention_dense.
    Source  MiniMaxM3VLIndexer.build_block_mask (transformers 5.23, models/minimax_m3_vl).
    """
    check_rows("attention_sparse", q, k_cache, block_tables)
    block_size, groups = k_cache.shape[1:3]
    keys = visible_keys(positions, block_tables, seq_lens, max_seq_len, block_size)
    batch, rows, length = keys.hidden.shape
    num_blocks = length // block_size
    bias, _ = penalty(keys.hidden, q.dtype)
    if block_ids.shape[2] * rows < num_blocks:
        cells, bias = _selected(block_ids, keys.slots, bias, num_blocks)
    else:
        cells = group_cells(keys.slots, groups)
        chosen = _chosen(block_ids, num_blocks, bias.dtype).view(batch, rows, groups, -1, 1)
        bias = bias.view(batch, 1, rows, num_blocks, block_size) + chosen.transpose(1, 2)
        bias = bias.view(batch, groups, rows, 1, length)
    return attend(q, k_cache, v_cache, cells, bias, blind_rows(bias), scale)


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


def attention_sparse_ragged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    q_lens: tuple[int, ...],
    max_seq_len: int,
    scale: float,
) -> Tensor:
    """attention_sparse with q_lens[b] rows for sequence b: prefill chunks.

    Shapes  as attention_sparse; cu_seqlens_q [B + 1] the running sum of q_lens; rows past the
            last are zero.
    """
    out = torch.zeros_like(q)
    for rows, b, keys in ragged_tiles(q_lens, seq_lens, positions):
        out[rows] = attention_sparse(
            q[rows],
            k_cache,
            v_cache,
            block_ids[rows],
            positions[rows],
            block_tables[b],
            seq_lens[b],
            keys,
            scale,
        )
    return out
