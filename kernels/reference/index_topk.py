"""The lightning indexer: a score for each block of keys, and the blocks a row attends to."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cache_rows, remember_last, wide
from eaglerun.kernels.reference.attention_dense import (
    check_rows,
    keys_of,
    penalty,
    ragged_tiles,
    visible_keys,
)
from eaglerun.kernels.rows import LayerKV, Rows

# Finite, as in the kernels, and above or below every real score. Init wins over local.
INIT_SCORE, LOCAL_SCORE, NO_SCORE = 1e30, 1e29, -1e30


def block_scores(index_q: Tensor, kv: LayerKV, rows: Rows) -> Tensor:
    """See eaglerun.kernels.index_topk.block_scores."""
    index_k = kv.index_keys("block_scores")
    if rows.cu_seqlens is not None:
        raise ValueError("block_scores: ragged rows")
    check_rows("block_scores", index_q, 1, rows)
    block_size, dim = index_k.shape[1:]
    keys = visible_keys(*keys_of(rows), block_size)
    batch, per_seq, length = keys.hidden.shape
    groups = index_q.shape[1]
    q = wide(index_q).reshape(batch, per_seq * groups, dim)
    k = cache_rows(index_k.view(-1, dim), keys.slots.flatten(), q.dtype)
    scores = torch.bmm(q, k.view(batch, length, dim).transpose(1, 2))
    bias, _ = penalty(keys.hidden, index_q.dtype)
    scores = scores.view(batch, per_seq, groups, length).add_(bias[:, 0])
    best = scores.view(batch * per_seq, groups, length // block_size, block_size).amax(-1)
    return best.nan_to_num_(nan=NO_SCORE, neginf=NO_SCORE)


def topk_blocks(
    scores: Tensor,
    positions: Tensor,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """See eaglerun.kernels.index_topk.topk_blocks."""
    num_blocks = scores.shape[2]
    num_causal, fixed, values = _fixed_scores(
        positions, num_blocks, block_size, init_blocks, local_blocks, scores.dtype
    )
    # A stable sort keeps the lower block first among equals; torch.topk promises no order.
    order = torch.where(fixed, values, scores).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., :topk]
    chosen = torch.where(order < num_causal, order, num_blocks).sort(dim=-1).values
    chosen = chosen.masked_fill_(chosen == num_blocks, -1).int()
    if topk > num_blocks:
        return torch.nn.functional.pad(chosen, (0, topk - num_blocks), value=-1)
    return chosen


@remember_last
def _fixed_scores(
    positions: Tensor,
    num_blocks: int,
    block_size: int,
    init_blocks: int,
    local_blocks: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a row's position decides: its causal blocks [N, 1, 1], which blocks have a score of
    their own [N, 1, num_blocks], and that score."""
    columns = torch.arange(num_blocks, device=positions.device)
    num_causal = (positions // block_size + 1)[:, None, None]
    init = (columns < init_blocks).expand(len(positions), 1, -1)
    local = columns >= num_causal - local_blocks
    beyond = columns >= num_causal
    values = torch.full(local.shape, INIT_SCORE, dtype=dtype, device=positions.device)
    values = values.masked_fill(local, LOCAL_SCORE)
    # Below NaN and empty blocks, so that neither is pushed out.
    values = values.masked_fill(beyond, 2 * NO_SCORE)
    return num_causal, init | local | beyond, values


def index_topk(
    index_q: Tensor,
    kv: LayerKV,
    rows: Rows,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """See eaglerun.kernels.index_topk.index_topk."""
    forced = (topk, init_blocks, local_blocks)
    if rows.cu_seqlens is not None:
        shape = (index_q.shape[0], index_q.shape[1], topk)
        out = torch.full(shape, -1, dtype=torch.int32, device=index_q.device)
        for part, tile in ragged_tiles(rows):
            out[part] = index_topk(index_q[part], kv, tile, *forced)
        return out
    scores = block_scores(index_q, kv, rows)
    return topk_blocks(scores, rows.positions, kv.index_keys("index_topk").shape[1], *forced)
