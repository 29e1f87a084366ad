import pytest
import torch
from compare import compare
from paged import cut, paged, ragged

from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.language import cdiv
from eaglerun.kernels.launch import changed

LENGTHS = (5, 0, 150, 67)


def selection(positions, groups, block_size, topk):
    """Random causal blocks, the row's own among them, left packed, in any order."""
    ids = torch.full((len(positions), groups, topk), -1, dtype=torch.int32)
    for n, p in enumerate(positions.tolist()):
        for g in range(groups if p >= 0 else 0):
            last = p // block_size
            others = torch.randperm(last)[: topk - 1]
            chosen = torch.cat((others, torch.tensor([last])))
            ids[n, g, : len(chosen)] = chosen.int()
    return ids.to(positions.device)


@pytest.mark.parametrize(
    "rows, topk, block_size, heads, groups, dim",
    [(1, 1, 4, 8, 2, 32), (1, 16, 4, 3, 3, 24), (3, 3, 16, 8, 2, 32), (2, 3, 64, 4, 1, 16)],
)
def test_uniform(rows, topk, block_size, heads, groups, dim, device):
    kv = paged(LENGTHS, block_size, (groups, dim), (groups, dim), device=device)
    where = kv.uniform(rows)
    where.positions[-1] = -1
    ids = selection(where.positions, groups, block_size, topk)
    q = torch.randn(len(where.positions), heads, dim, device=device)
    out = compare(attention_sparse, q, kv.layer, ids, where, 0.2)
    assert out[-1].eq(0).all()


@pytest.mark.parametrize(
    "dtype, cache_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float8_e4m3fn),
    ],
)
def test_m3(dtype, cache_dtype, device):
    kv = paged((2500,), 128, (4, 128), (4, 128), dtype=cache_dtype, device=device)
    where = kv.uniform(1)
    ids = selection(where.positions, 4, 128, 16)
    q = torch.randn(1, 64, 128, device=device).to(dtype)
    compare(attention_sparse, q, kv.layer, ids, where, 128**-0.5, ulps=4, floor=0.1)


def test_all_blocks_are_full_attention(device):
    kv = paged((70, 33), 8, (2, 16), (2, 16), device=device)
    where = kv.uniform(2)
    ids = selection(where.positions, 2, 8, cdiv(70, 8))
    q = torch.randn(4, 4, 16, device=device)
    sparse = attention_sparse.kernel(q, kv.layer, ids, where, 0.2)
    dense = attention_dense.kernel(q, kv.layer, where, 0.2)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("block_size", [4, 32])
def test_ragged(block_size, share, device):
    kv = paged(LENGTHS, block_size, (2, 16), (2, 16), device=device)
    q_lens = (2, 0, 19, 5)
    where = kv.ragged(q_lens, 2)
    ids = selection(where.positions, 2, block_size, 3)
    q = torch.randn(len(where.positions), 8, 16, device=device)
    with changed("attention_sparse_prefill", SHARE=share):
        out = compare(attention_sparse, q, kv.layer, ids, where, 0.2)
        assert out[-2:].eq(0).all()
        # Alone, in another tile: the same bits.
        last = ragged(cut(where, slice(-7, -2), slice(-1, None)), (5,))
        alone = attention_sparse.kernel(q[-7:-2], kv.layer, ids[-7:-2], last, 0.2)
        same_bits(alone, out[-7:-2])


def same_bits(a, b):
    """On a GPU: in the interpreter a row's product hangs on its place in the matrix library's."""
    if a.is_cuda:
        assert torch.equal(a, b)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "heads, topk", [(3, 5), (16, 16), (64, 2), pytest.param(64, 16, marks=pytest.mark.long)]
)
def test_rows_that_share_a_program(heads, topk, device):
    """16, 4 and 1 rows a program, selections side by side alike or not at all."""
    kv = paged((610,), 32, (1, 16), (1, 16), device=device)
    where = kv.ragged((40,), 0)
    ids = selection(where.positions, 1, 32, topk)
    ids[10:20] = ids[10:11]
    q = torch.randn(40, heads, 16, device=device)
    with changed("attention_sparse_prefill", SHARE=1):
        shared = compare(attention_sparse, q, kv.layer, ids, where, 0.2)
        for first in (1, 6):
            part = ragged(cut(where, slice(first, None)), (40 - first,))
            some = attention_sparse.kernel(q[first:], kv.layer, ids[first:], part, 0.2)
            same_bits(some, shared[first:])


@pytest.mark.parametrize("dim", [128, 24])
def test_tiles_copied_by_descriptor(dim, device):
    """Selections in any order, with unused slots between: blocks before the first that a row does
    not see whole need no mask, and come through descriptors where they can."""
    kv = paged((330, 129), 64, (2, dim), (2, dim), dtype=torch.bfloat16, device=device)
    q_lens = (4, 2)
    where = kv.ragged(q_lens, 1)
    ids = selection(where.positions, 2, 64, 4)
    for row in ids[1:]:
        row[:] = row[:, torch.randperm(4)]
    q = torch.randn(len(where.positions), 8, dim, device=device).bfloat16()
    outs = []
    for described in (0, 1):
        with changed("attention_sparse_prefill", DESCRIBED=described):
            out = compare(attention_sparse, q, kv.layer, ids, where, 0.2, ulps=4, floor=0.1)
        outs.append(out)
    assert torch.equal(*outs)


def test_ragged_fp8(device):
    kv = paged((50, 9), 16, (2, 16), (2, 16), dtype=torch.float8_e4m3fn, device=device)
    q_lens = (5, 2)
    where = kv.ragged(q_lens, 1)
    ids = selection(where.positions, 2, 16, 3)
    q = torch.randn(len(where.positions), 4, 16, device=device)
    compare(attention_sparse, q, kv.layer, ids, where, 0.2)


def test_raises(device):
    kv = paged((7, 3), 4, (2, 16), (2, 16), device=device)
    where = kv.uniform(1)
    q, ids = torch.randn(2, 4, 16, device=device), selection(where.positions, 2, 4, 3)
    for bad in (ids.long(), ids[:, :1]):
        with pytest.raises(ValueError, match="attention_sparse"):
            attention_sparse.kernel(q, kv.layer, bad, where, 0.2)
