"""Attention over the selected blocks of the paged cache."""

import torch
from torch import Tensor

from eaglerun.kernels.reference.attention_dense import (
    attend,
    check_rows,
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
    visible, slots = visible_keys(positions, block_tables, seq_lens, max_seq_len, block_size)
    batch, rows, length = visible.shape
    num_blocks = length // block_size
    # Unused slots (-1) fall into the extra last column, which is cut off.
    chosen = torch.zeros(*block_ids.shape[:2], num_blocks + 1, dtype=torch.bool, device=q.device)
    chosen.scatter_(-1, block_ids.long() % (num_blocks + 1), True)
    chosen = chosen[..., :num_blocks].view(batch, rows, groups, num_blocks, 1).transpose(1, 2)
    visible = visible.view(batch, 1, rows, num_blocks, block_size) & chosen
    return attend(q, k_cache, v_cache, slots, visible.flatten(-2), scale)


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
