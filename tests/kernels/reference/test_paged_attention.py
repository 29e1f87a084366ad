"""Attention over pages against scaled_dot_product_attention on each row's own list of keys."""

import pytest
import torch
from paged import paged
from torch.nn import functional as F

from eaglerun.kernels.reference.attention_dense import attention_dense
from eaglerun.kernels.reference.attention_sparse import attention_sparse
from eaglerun.kernels.rows import LayerKV

CPU = torch.device("cpu")
LENGTHS = (37, 0, 5, 64)
SHAPES = [(4, 4, 2, 8), (5, 6, 1, 16), (16, 3, 3, 4), (1, 8, 2, 8)]


def cells(kv, b, keys, block_size):
    """K and V of the given keys of sequence b, through the block table: [keys, G, D]."""
    slots = [int(kv.block_tables[b, t // block_size]) * block_size + t % block_size for t in keys]
    return [cache.flatten(0, 1)[slots] for cache in kv.caches]


def one_row(q, kv, b, keys, block_size, scale):
    """q [H, D] to the listed keys; each group may have a list of its own."""
    heads, groups = q.shape[0], kv.caches[0].shape[2]
    out = torch.zeros_like(q)
    for h in range(heads):
        g = h // (heads // groups)
        mine = keys[g] if isinstance(keys, dict) else keys
        if mine:
            k, v = (x[:, g][None] for x in cells(kv, b, mine, block_size))
            out[h] = F.scaled_dot_product_attention(q[h][None, None], k, v, scale=scale)[0, 0]
    return out


def make(block_size, groups, dim, lengths=LENGTHS):
    kv = paged(lengths, block_size, (groups, dim), (groups, dim), device=CPU)
    kv.block_tables[0, -1] = -1  # what lies past a sequence's blocks may be no block at all
    return kv


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("first_key, window", [(0, None), (1, None), (1, 6), (0, 1)])
@pytest.mark.parametrize("block_size, heads, groups, dim", SHAPES)
def test_dense(block_size, heads, groups, dim, first_key, window, rows):
    kv = make(block_size, groups, dim)
    where = kv.uniform(rows)
    where.positions[-rows] = -1  # a draft that was not made
    q = torch.randn(len(where.positions), heads, dim)
    q[where.positions < 0] = torch.nan
    rows_seen = where._replace(max_seq_len=kv.max_seq_len + 2)
    ours = attention_dense(q, kv.layer, rows_seen, 0.3, first_key, window)
    for n, p in enumerate(where.positions.tolist()):
        low = max(first_key, 0 if window is None else p - window + 1)
        keys = list(range(low, p + 1))
        theirs = one_row(q[n].nan_to_num(), kv, n // rows, keys, block_size, 0.3)
        torch.testing.assert_close(ours[n], theirs, rtol=1e-5, atol=1e-5)


def test_keys_end_at_the_sequence_not_at_the_position():
    """seq_len below position + 1: what was not written is not read."""
    kv = make(4, 2, 8, (9,))
    q = torch.randn(1, 4, 8)
    where = kv.uniform(1)._replace(positions=torch.tensor([15]), max_seq_len=16)
    ours = attention_dense(q, kv.layer, where, 0.3)
    torch.testing.assert_close(ours[0], one_row(q[0], kv, 0, list(range(9)), 4, 0.3))


@pytest.mark.parametrize("block_size, heads, groups, dim", SHAPES[:2])
def test_dense_ragged(block_size, heads, groups, dim):
    lengths = (600, 0, 5, 64)  # more rows than a tile
    kv = make(block_size, groups, dim, lengths)
    q_lens = (520, 0, 5, 1)
    where = kv.ragged(q_lens, 2)
    q = torch.randn(len(where.positions), heads, dim)
    q[where.positions < 0] = torch.nan
    ours = attention_dense(q, kv.layer, where, 0.3)
    for n in (0, 1, 255, 256, 400, 519, 520, 524, 525):
        b = next(i for i in range(4) if n < sum(q_lens[: i + 1]))
        keys = list(range(int(where.positions[n]) + 1))
        theirs = one_row(q[n], kv, b, keys, block_size, 0.3)
        torch.testing.assert_close(ours[n], theirs, rtol=1e-5, atol=1e-5)
    assert ours[-2:].eq(0).all()


def random_blocks(positions, groups, block_size, topk):
    """Distinct causal blocks in no order, unused places anywhere."""
    ids = torch.full((len(positions), groups, topk), -1, dtype=torch.int32)
    for n, p in enumerate(positions.tolist()):
        for g in range(groups):
            count = min(topk, p // block_size + 1)
            chosen = torch.randperm(p // block_size + 1)[:count].int()
            ids[n, g, torch.randperm(topk)[:count]] = chosen
    return ids


def selected(p, blocks, block_size):
    return {
        g: [t for t in range(p + 1) if t // block_size in row]
        for g, row in enumerate(blocks.tolist())
    }


@pytest.mark.parametrize("topk", [1, 3, 40])  # gathered by row, or masked where that is less
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("block_size, heads, groups, dim", SHAPES)
def test_sparse(block_size, heads, groups, dim, rows, topk):
    kv = make(block_size, groups, dim)
    where = kv.uniform(rows)
    where.positions[-rows] = -1
    q = torch.randn(len(where.positions), heads, dim)
    q[where.positions < 0] = torch.nan
    ids = random_blocks(where.positions, groups, block_size, topk)
    ours = attention_sparse(q, kv.layer, ids, where, 0.3)
    for n, p in enumerate(where.positions.tolist()):
        keys = selected(p, ids[n], block_size)
        theirs = one_row(q[n].nan_to_num(), kv, n // rows, keys, block_size, 0.3)
        torch.testing.assert_close(ours[n], theirs, rtol=1e-5, atol=1e-5)


def test_sparse_without_any_block_is_zero():
    kv = make(4, 2, 8)
    q = torch.randn(4, 4, 8)
    where = kv.uniform(1)
    for topk in (1, 40):
        nothing = torch.full((4, 2, topk), -1, dtype=torch.int32)
        assert attention_sparse(q, kv.layer, nothing, where, 0.3).eq(0).all()


def test_sparse_ragged():
    kv = make(4, 2, 8, (300, 0, 7))
    q_lens = (290, 0, 7)
    where = kv.ragged(q_lens, 1)
    q = torch.randn(len(where.positions), 4, 8)
    ids = random_blocks(where.positions, 2, 4, 3)
    ours = attention_sparse(q, kv.layer, ids, where, 0.3)
    for n in (0, 9, 255, 256, 289, 290, 296):
        keys = selected(int(where.positions[n]), ids[n], 4)
        theirs = one_row(q[n], kv, 0 if n < 290 else 2, keys, 4, 0.3)
        torch.testing.assert_close(ours[n], theirs, rtol=1e-5, atol=1e-5)
    assert ours[-1].eq(0).all()


@pytest.mark.parametrize("rows", [1, 3])
def test_all_blocks_are_full_attention(rows):
    kv = make(4, 2, 8)
    q = torch.randn(4 * rows, 4, 8)
    where = kv.uniform(rows)
    ids = torch.arange(16, dtype=torch.int32).expand(len(q), 2, -1)
    full = attention_dense(q, kv.layer, where, 0.3)
    torch.testing.assert_close(attention_sparse(q, kv.layer, ids, where, 0.3), full)


def test_nothing_to_do():
    kv = make(4, 2, 8)
    q, none = torch.randn(0, 4, 8), torch.zeros(0).long()
    where = kv.uniform(1)._replace(positions=none, kv_slots=none)
    assert attention_dense(q, kv.layer, where, 0.3).shape == q.shape
    q = torch.full((4, 4, 8), torch.nan)
    where = kv.uniform(1)._replace(
        positions=torch.full((4,), -1), seq_lens=torch.zeros(4).int(), max_seq_len=0
    )
    assert attention_dense(q, kv.layer, where, 0.3).eq(0).all()
    ids = torch.full((4, 2, 3), -1, dtype=torch.int32)
    assert attention_sparse(q, kv.layer, ids, where, 0.3).eq(0).all()


def test_bf16_accumulates_wide():
    kv = make(16, 2, 32)
    q = torch.randn(4, 8, 32).bfloat16()
    low = [cache.bfloat16() for cache in kv.caches]
    where = kv.uniform(1)
    exact = attention_dense(q.double(), LayerKV(*(c.double() for c in low)), where, 0.2)
    assert exact.dtype == torch.float64
    ours = attention_dense(q, LayerKV(*low), where, 0.2)
    torch.testing.assert_close(ours, exact.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rows, heads", [(3, 4), (4, 3)])
def test_shapes_that_do_not_fit(rows, heads):
    kv = make(4, 2, 8)
    where = kv.uniform(1)._replace(positions=torch.zeros(rows).long())
    with pytest.raises(ValueError, match="attention_dense"):
        attention_dense(torch.randn(rows, heads, 8), kv.layer, where, 0.3)
