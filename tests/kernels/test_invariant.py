"""In a batch-invariant engine a row's bits do not depend on what runs beside it."""

import pytest
import torch
from compare import close, compare
from paged import cut, paged, ragged

from eaglerun.kernels import launch
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.index_topk import index_topk
from eaglerun.kernels.language import interpreting
from eaglerun.kernels.launch import invariant, settings
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rows import Experts, Routing

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


@pytest.mark.parametrize("lengths", [(300, 77), pytest.param((700, 1), marks=pytest.mark.long)])
def test_attention_of_a_step(lengths, device):
    """Rows alone, drafted rows together, other bounds of length, dense or of all blocks."""
    kv = paged(lengths, BLOCK, (GROUPS, DIM), (GROUPS, DIM), dtype=BF16, device=device)
    where = kv.uniform(4)
    q = torch.randn(len(where.positions), HEADS, DIM, device=device).to(BF16)
    whole = compare(attention_dense, q, kv.layer, where, 0.2, **CLOSE)
    for row in range(4):
        one = slice(row, None, 4)
        rows = cut(where, one)._replace(max_seq_len=5000)
        same(attention_dense.kernel(q[one], kv.layer, rows, 0.2), whole[one])
    selected = all_blocks(where.positions, 16)
    sparse = compare(attention_sparse, q, kv.layer, selected, where, 0.2, **CLOSE)
    same(sparse, whole)


def test_attention_of_a_prompt(device):
    """Chunks cut anywhere, dense or of all blocks."""
    kv = paged((200, 150), BLOCK, (GROUPS, DIM), (GROUPS, DIM), dtype=BF16, device=device)
    q_lens = (90, 33)
    where = kv.ragged(q_lens, 1)
    q = torch.randn(len(where.positions), HEADS, DIM, device=device).to(BF16)
    whole = compare(attention_dense, q, kv.layer, where, 0.2, **CLOSE)
    ids = all_blocks(where.positions, 4)
    sparse = compare(attention_sparse, q, kv.layer, ids, where, 0.2, **CLOSE)
    same(sparse, whole)
    for first, last in ((0, 7), (7, 90)):
        rows = slice(first, last)
        chunk = ragged(cut(where, rows, slice(1)), (last - first,))
        same(attention_dense.kernel(q[rows], kv.layer, chunk, 0.2), whole[rows])
        same(attention_sparse.kernel(q[rows], kv.layer, ids[rows], chunk, 0.2), whole[rows])


def test_selection(device):
    kv = paged((330,), BLOCK, (DIM,), dtype=BF16, device=device)
    wish = (2, 0, 1)
    where = kv.uniform(8)
    q = torch.randn(8, GROUPS, DIM, device=device).to(BF16)
    whole = index_topk.kernel(q, kv.layer, where, *wish)
    for row in range(8):
        one = slice(row, row + 1)
        rows = cut(where, one)._replace(max_seq_len=400)
        assert torch.equal(index_topk.kernel(q[one], kv.layer, rows, *wish)[0], whole[row])
    chunk = index_topk.kernel(q, kv.layer, ragged(where, (8,)), *wish)
    for row in range(8):
        one = slice(row, row + 1)
        got = index_topk.kernel(q[one], kv.layer, ragged(cut(where, one), (1,)), *wish)
        assert torch.equal(got[0], chunk[row])


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
    shapes = ((64, 48), (48, 32))
    layer = Experts(*(torch.randn(2, *shape, device=device).to(BF16) for shape in shapes))
    x = torch.randn(200, 48, device=device).to(BF16)
    ids = torch.rand(200, 2, device=device).argsort(dim=1).int().contiguous()
    weights = torch.rand(200, 2, device=device)
    whole = compare(moe_gemm, x, Routing(ids, weights), layer, 1.7, 7.0, 1.0, ulps=2, floor=1)
    for n in (1, 3, 9, 150):
        some = moe_gemm.kernel(x[:n], Routing(ids[:n], weights[:n]), layer, 1.7, 7.0, 1.0)
        same(some, whole[:n])
