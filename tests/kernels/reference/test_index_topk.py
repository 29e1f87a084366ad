"""The indexer against loops that follow the definition, and against transformers' indexer."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import cut, paged
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLIndexer

from eaglerun.kernels.reference.index_topk import (
    block_scores,
    index_topk,
    topk_blocks,
)
from eaglerun.kernels.reference.kv_store import kv_store
from eaglerun.kernels.reference.rope import rope_table
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows

CPU = torch.device("cpu")


def chosen_by_the_rules(scores, position, block_size, topk, init, local):
    """Forced blocks first (init before local, a block that is both counts as local), then the
    best scores; a lower block id wins every tie."""
    num_blocks = position // block_size + 1

    def rank(c):
        if c >= num_blocks - local:
            return 1
        return 0 if c < init else 2

    order = sorted(range(num_blocks), key=lambda c: (rank(c), 0 if rank(c) < 2 else -scores[c], c))
    return sorted(order[:topk])


@st.composite
def cases(draw):
    block_size = draw(st.integers(1, 5))
    rows = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 60), min_size=1, max_size=3))
    return block_size, rows, lengths, draw(st.integers(1, 3)), draw(st.randoms())


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    topk=st.integers(1, 20),
    init=st.integers(0, 3),
    local=st.integers(0, 3),
    levels=st.sampled_from([1, 2, 1000]),
)
def test_scores_and_selection(case, topk, init, local, levels):
    """Few levels of score make many ties."""
    block_size, rows, lengths, groups, random = case
    torch.manual_seed(random.randrange(2**31))
    kv = paged(tuple(lengths), block_size, (4,), device=CPU)
    cache = kv.caches[0]
    cache.copy_((cache * levels / 3).round())
    where = kv.uniform(rows)
    positions = where.positions
    for n in range(len(positions)):
        if random.random() < 0.2:
            positions[n] = -1
    index_q = torch.randint(-2, 3, (len(where.positions), groups, 4)).float()
    index_q[positions < 0] = torch.nan
    where = where._replace(max_seq_len=kv.max_seq_len + random.randrange(2 * block_size))
    scores = block_scores(index_q, kv.layer, where)
    ids = index_topk(index_q, kv.layer, where, topk, init, local)
    assert ids.dtype == torch.int32 and ids.shape == (len(where.positions), groups, topk)
    for n, p in enumerate(positions.tolist()):
        table = kv.block_tables[n // rows].tolist()
        for g in range(groups):
            best = []
            for c in range(p // block_size + 1 if p >= 0 else 0):
                block = cache[table[c]]
                keys = range(min(block_size, p + 1 - c * block_size))
                best.append(max(float(index_q[n, g] @ block[j]) for j in keys))
            assert scores[n, g, : len(best)].tolist() == best
            assert scores[n, g, len(best) :].eq(-1e30).all()
            expected = chosen_by_the_rules(best, p, block_size, topk, init, local) if best else []
            assert ids[n, g].tolist() == expected + [-1] * (topk - len(expected))


def test_ragged_is_uniform_row_by_row():
    kv = paged((300, 0, 9), 4, (8,), device=CPU)
    q_lens = (280, 0, 9)
    where = kv.ragged(q_lens, 2)
    index_q = torch.randn(len(where.positions), 2, 8)
    ids = index_topk(index_q, kv.layer, where, 5, 1, 2)
    for n in (0, 255, 256, 279, 280, 288):
        b = slice(0, 1) if n < 280 else slice(2, 3)
        row = slice(n, n + 1)
        one = index_topk(index_q[row], kv.layer, cut(where, row, b), 5, 1, 2)
        assert torch.equal(ids[row], one)
    assert ids[-2:].eq(-1).all()


def test_nan_scores_come_last_and_keep_their_place():
    scores = torch.tensor([[[3.0, -1e30, 1.0, -1e30, 0.5, 9.0]]])
    ids = topk_blocks(scores, torch.tensor([19]), 4, 4, 0, 1)  # five causal blocks of six
    assert ids.tolist() == [[[0, 1, 2, 4]]]
    ids = topk_blocks(scores, torch.tensor([19]), 4, 9, 0, 1)
    assert ids.tolist() == [[[0, 1, 2, 3, 4, -1, -1, -1, -1]]]


def test_blocks_of_the_fact_sheet():
    scores = torch.randn(5, 1, 17)
    positions = torch.tensor([0, 127, 128, 2047, 2048])
    ids = topk_blocks(scores, positions, 128, 16, 0, 1)
    assert (ids >= 0).sum(-1).flatten().tolist() == [1, 1, 2, 16, 16]
    assert 16 in ids[4] and scores[4, 0, :16].argmin() not in ids[4]


def test_selection_is_that_of_transformers():
    """Through projection, norm and rotation, with two local blocks."""
    config = MiniMaxM3VLTextConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        index_n_heads=2,
        index_head_dim=8,
        index_block_size=4,
        index_topk_blocks=5,
        index_local_blocks=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    indexer = MiniMaxM3VLIndexer(config, 0)
    length, block_size = 90, 4
    hidden = torch.randn(length, 24)
    table = rope_table(128, 4, 1e4, CPU, torch.float32)
    positions = torch.arange(length)
    with torch.no_grad():
        for norm in (indexer.q_norm, indexer.k_norm):
            norm.weight.normal_(0, 0.3)
        cos, sin = table[:length].chunk(2, dim=-1)
        angles = tuple(torch.cat((x, x), dim=-1)[None] for x in (cos, sin))
        theirs = indexer(hidden[None], angles, None, positions[None])[0].transpose(0, 1)
        blocks = torch.randperm(30)[:23].int()[None]
        slots = blocks[0, positions // block_size].long() * block_size + positions % block_size
        main = torch.zeros(length, 8 * (4 + 2 * 2))
        qkv = torch.cat((main, indexer.q_proj(hidden), indexer.k_proj(hidden)), dim=1)
        caches = [torch.full((30, block_size, *c), torch.nan) for c in ((2, 8), (2, 8), (8,))]
        own = (indexer.q_norm.weight, indexer.k_norm.weight)
        norms = HeadNorms(torch.zeros(8), torch.zeros(8), 1e-6, *own)
        end = torch.tensor([length], dtype=torch.int32)
        where, kv = Rows(positions, slots, blocks, end, length), LayerKV(*caches)
        _, index_q = kv_store(qkv, where, norms, table, kv)
    ids = index_topk(index_q, kv, where, 5, 0, 2)
    assert torch.equal(ids.sort(dim=-1).values, theirs.int().sort(dim=-1).values)
