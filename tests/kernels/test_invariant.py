"""In a batch-invariant engine a row's bits do not depend on what runs beside it."""

import pytest
import torch
from compare import close, compare
from paged import paged

from eaglerun.kernels import launch
from eaglerun.kernels.attention_dense import attention_dense, attention_dense_ragged
from eaglerun.kernels.attention_sparse import attention_sparse, attention_sparse_ragged
from eaglerun.kernels.index_topk import index_topk, index_topk_ragged
from eaglerun.kernels.language import interpreting
from eaglerun.kernels.launch import invariant, settings
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route

BF16 = torch.bfloat16
BLOCK, GROUPS, HEADS, DIM = 64, 2, 8, 32
CLOSE = {"ulps": 4, "floor": 0.1}


@pytest.fixture(autouse=True)
def in_an_invariant_engine():
    with invariant(True):
        yield


def same(a, b):
    """Equal, bit for bit; in the interpreter, whose products are numpy's, as close as to a
    reference."""
    if interpreting():
        close(a, b, **CLOSE)
    else:
        assert torch.equal(a, b)


def all_blocks(positions, topk):
    """Every causal block, ascending and left packed, for each group."""
    c = torch.arange(topk, device=positions.device)
    ids = torch.where(c <= positions[:, None] // BLOCK, c, -1)
    return ids.int()[:, None].expand(-1, GROUPS, -1).contiguous()


def test_settings_are_those_rows_only_there_and_for_two_bytes(device, monkeypatch):
    narrow, wide = torch.empty(1, dtype=BF16, device=device), torch.empty(1, device=device)
    assert settings("attention_decode", narrow)["MIN_M"] == 64
    assert settings("attention_decode", wide)["MIN_M"] == 16
    assert settings("linear_few", narrow)["BLOCK_N"] == 64
    with invariant(True):
        pass
    assert settings("attention_decode", narrow)["MIN_M"] == 64
    monkeypatch.setattr(launch, "_invariant", False)
    assert settings("attention_decode", narrow)["MIN_M"] == 16
    with pytest.raises(ZeroDivisionError), invariant(True):
        assert settings("attention_decode", narrow)["MIN_M"] == 64
        raise ZeroDivisionError
    assert settings("attention_decode", narrow)["MIN_M"] == 16


@pytest.mark.parametrize("lengths", [(300, 77), (700, 1)])
def test_attention_of_a_step(lengths, device):
    """Rows alone, drafted rows together, other bounds of length, dense or of all blocks."""
    kv = paged(lengths, BLOCK, (GROUPS, DIM), (GROUPS, DIM), dtype=BF16, device=device)
    where = (kv.block_tables, kv.seq_lens, kv.max_seq_len)
    positions = kv.uniform(4)
    q = torch.randn(len(positions), HEADS, DIM, device=device).to(BF16)
    whole = compare(attention_dense, q, *kv.caches, positions, *where, 0.2, **CLOSE)
    for row in range(4):
        one = slice(row, None, 4)
        alone = attention_dense.kernel(
            q[one], *kv.caches, positions[one].contiguous(), *where[:2], 5000, 0.2
        )
        same(alone, whole[one])
    selected = all_blocks(positions, 16)
    sparse = compare(attention_sparse, q, *kv.caches, selected, positions, *where, 0.2, **CLOSE)
    same(sparse, whole)


def test_attention_of_a_prompt(device):
    """Chunks cut anywhere, dense or of all blocks."""
    kv = paged((200, 150), BLOCK, (GROUPS, DIM), (GROUPS, DIM), dtype=BF16, device=device)
    q_lens = (90, 33)
    positions, sums = kv.ragged(q_lens, 1)
    q = torch.randn(len(positions), HEADS, DIM, device=device).to(BF16)
    where = (kv.block_tables, kv.seq_lens, sums, q_lens, kv.max_seq_len)
    whole = compare(attention_dense_ragged, q, *kv.caches, positions, *where, 0.2, **CLOSE)
    ids = all_blocks(positions, 4)
    sparse = compare(attention_sparse_ragged, q, *kv.caches, ids, positions, *where, 0.2, **CLOSE)
    same(sparse, whole)
    for first, last in ((0, 7), (7, 90)):
        chunk = (positions[first:last], kv.block_tables[:1], kv.seq_lens[:1])
        count = torch.tensor([0, last - first], dtype=torch.int32, device=device)
        rest = (count, (last - first,), 200, 0.2)
        part = attention_dense_ragged.kernel(q[first:last], *kv.caches, *chunk, *rest)
        same(part, whole[first:last])
        part = attention_sparse_ragged.kernel(
            q[first:last], *kv.caches, ids[first:last], *chunk, *rest
        )
        same(part, whole[first:last])


def test_selection(device):
    kv = paged((330,), BLOCK, (DIM,), dtype=BF16, device=device)
    wish = (2, 0, 1)
    positions = kv.uniform(8)
    q = torch.randn(8, GROUPS, DIM, device=device).to(BF16)
    where = (kv.block_tables, kv.seq_lens)
    whole = index_topk.kernel(q, *kv.caches, positions, *where, 330, *wish)
    for row in range(8):
        one = (q[row : row + 1], *kv.caches, positions[row : row + 1])
        assert torch.equal(index_topk.kernel(*one, *where, 400, *wish)[0], whole[row])
    sums = torch.tensor([0, 8], dtype=torch.int32, device=device)
    ragged = index_topk_ragged.kernel(q, *kv.caches, positions, *where, sums, (8,), 330, *wish)
    for row in range(8):
        one = (q[row : row + 1], *kv.caches, positions[row : row + 1])
        count = torch.tensor([0, 1], dtype=torch.int32, device=device)
        got = index_topk_ragged.kernel(*one, *where, count, (1,), 330, *wish)
        assert torch.equal(got[0], ragged[row])


def test_routing(device):
    x, gate = torch.randn(130, 96, device=device).to(BF16), torch.randn(8, 96, device=device)
    positions = torch.arange(130, device=device)
    ids, weights = compare(moe_route, x, gate, None, positions, 2, 1.5)
    for n in (1, 64, 65):
        some = moe_route.kernel(x[:n], gate, None, positions[:n], 2, 1.5)
        assert torch.equal(some[0], ids[:n])
        same(some[1], weights[:n])


def test_experts(device):
    """From few rows an expert to many, whose products a default engine rounds."""
    w13, w2 = (torch.randn(2, *shape, device=device).to(BF16) for shape in ((64, 48), (48, 32)))
    x = torch.randn(200, 48, device=device).to(BF16)
    ids = torch.rand(200, 2, device=device).argsort(dim=1).int().contiguous()
    weights = torch.rand(200, 2, device=device)
    whole = compare(moe_gemm, x, w13, w2, ids, weights, 1.7, 7.0, 1.0, ulps=2, floor=1)
    for n in (1, 3, 9, 150):
        some = moe_gemm.kernel(x[:n], w13, w2, ids[:n], weights[:n], 1.7, 7.0, 1.0)
        same(some, whole[:n])
