import pytest
import torch
from compare import compare
from paged import paged, ragged

from eaglerun.kernels.index_topk import block_scores, index_topk, topk_blocks

LENGTHS = (5, 0, 131, 67)


@pytest.mark.parametrize(
    "rows, block_size, groups, dim",
    [(1, 4, 2, 32), (4, 16, 3, 24), (1, 128, 4, 128), (3, 128, 1, 16)],
)
def test_uniform(rows, block_size, groups, dim, device):
    kv = paged(LENGTHS, block_size, (dim,), device=device)
    where = kv.uniform(rows)
    where.positions[-1] = -1
    q = torch.randn(len(where.positions), groups, dim, device=device)
    compare(block_scores, q, kv.layer, where)
    out = compare(index_topk, q, kv.layer, where, 3, 0, 1)
    assert out[-1].eq(-1).all()
    compare(index_topk, q, kv.layer, where, 5, 1, 2)


def test_bf16_and_a_broken_key(device):
    kv = paged((70,), 8, (32,), dtype=torch.bfloat16, device=device)
    kv.caches[0][kv.block_tables[0, 3].long(), 5] = float("nan")
    q = torch.randn(1, 2, 32, device=device).bfloat16()
    where = kv.uniform(1)
    scores = compare(block_scores, q, kv.layer, where)
    assert scores[0, :, 3].eq(torch.tensor(-1e30)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8(dtype, device):
    kv = paged((70, 131), 8, (32,), dtype=torch.float8_e4m3fn, device=device)
    where = kv.uniform(2)
    q = torch.randn(len(where.positions), 2, 32, device=device).to(dtype)
    compare(block_scores, q, kv.layer, where)
    compare(index_topk, q, kv.layer, where, 3, 0, 1)


@pytest.mark.parametrize("block_size", [4, 128])
def test_ragged(block_size, device):
    kv = paged(LENGTHS, block_size, (24,), device=device)
    q_lens = (2, 0, 35, 5)
    where = kv.ragged(q_lens, 3)
    q = torch.randn(len(where.positions), 2, 24, device=device)
    out = compare(index_topk, q, kv.layer, where, 4, 0, 1)
    assert out[-3:].eq(-1).all()


def test_more_blocks_than_a_program_takes(device):
    """Prefill scores 16 blocks a program: the first program's, the last's, and none of a sequence's
    own."""
    kv = paged((700, 300, 0, 17), 16, (32,), dtype=torch.bfloat16, device=device)
    q_lens = (60, 5, 0, 17)
    where = kv.ragged(q_lens, 0)
    q = torch.randn(len(where.positions), 2, 32, device=device).bfloat16()
    compare(index_topk, q, kv.layer, where, 4, 0, 1)


@pytest.mark.parametrize("dim", [32, 256])
def test_blocks_of_256_keys_in_bf16(dim, device):
    """Tiles whose number of registers is limited are compiled for any block that an op allows."""
    kv = paged((700,), 256, (dim,), dtype=torch.bfloat16, device=device)
    q = torch.randn(1, 2, dim, device=device).bfloat16()
    where = kv.uniform(1)
    compare(block_scores, q, kv.layer, where)
    where = kv.ragged((70,), 0)
    q = torch.randn(70, 2, dim, device=device).bfloat16()
    compare(index_topk, q, kv.layer, where, 2, 0, 1)


def test_a_broken_key_in_a_block_that_all_rows_see(device):
    """Blocks behind every row of a chunk are scored without a mask."""
    kv = paged((70,), 16, (32,), dtype=torch.bfloat16, device=device)
    kv.caches[0][kv.block_tables[0, 1].long(), 5] = float("nan")
    where = kv.ragged((4,), 0)
    q = torch.randn(4, 2, 32, device=device).bfloat16()
    ids = compare(index_topk, q, kv.layer, where, 4, 0, 1)
    assert not ids.eq(1).any()


@pytest.mark.parametrize("columns", [1, 17, 1300])
@pytest.mark.parametrize("init_blocks, local_blocks", [(0, 1), (2, 0), (3, 2)])
def test_topk_of_equal_scores(columns, init_blocks, local_blocks, device):
    scores = torch.randn(3, 2, columns, device=device).round()
    positions = torch.randint(0, columns * 8, (3,), device=device)
    positions[0], positions[1] = -1, columns * 8 - 1
    forced = (16, init_blocks, local_blocks)
    compare(topk_blocks, scores, positions, 8, *forced)
    compare(topk_blocks, torch.zeros_like(scores[2:]), positions[2:], 8, *forced)
    # What lies past a row's blocks is never read.
    blocks = torch.arange(columns, device=device)
    causal = blocks <= torch.div(positions, 8, rounding_mode="floor")[:, None, None]
    spoiled = scores.masked_fill(~causal, float("nan"))
    chosen = topk_blocks.kernel(scores, positions, 8, *forced)
    assert torch.equal(topk_blocks.kernel(spoiled, positions, 8, *forced), chosen)


def test_blocks_of_the_fact_sheet(device):
    scores = torch.randn(5, 1, 17, device=device)
    positions = torch.tensor([0, 127, 128, 2047, 2048], device=device)
    ids = topk_blocks.kernel(scores, positions, 128, 16, 0, 1)
    assert (ids >= 0).sum(-1).flatten().tolist() == [1, 1, 2, 16, 16]
    dropped = scores[4, 0, :16].argmin().item()
    assert sorted({*range(17)} - {dropped}) == ids[4, 0].tolist()


def test_raises(device):
    kv = paged((7, 3), 4, (16,), device=device)
    q = torch.randn(3, 2, 16, device=device)
    where = kv.uniform(1)
    three = where._replace(positions=torch.zeros(3, device=device).long())
    for op in (block_scores.kernel, block_scores.reference):
        for rows, layer in (
            (three, kv.layer),
            (ragged(where, (1, 1)), kv.layer),
            (where, kv.layer._replace(index_k=None)),
        ):
            with pytest.raises(ValueError, match="block_scores"):
                op(q[: len(rows.positions)], layer, rows)
