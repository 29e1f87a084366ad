"""The fused store against the same steps taken one head and one row at a time."""

import pytest
import torch
from torch.nn import functional as F

from eaglerun.kernels.reference.kv_store import draft_kv_store, kv_store
from eaglerun.kernels.reference.rope import rope_table
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows

CPU = torch.device("cpu")
HEADS, GROUPS, DIM, INDEX_DIM, ROTARY, EPS = 4, 2, 8, 6, 4, 1e-5
POSITIONS = torch.tensor([3, -1, 0, 11, 40])
SLOTS = torch.tensor([9, -1, 2, -1, 15])
NONE = torch.zeros(0, dtype=torch.int32)
ROWS = Rows(POSITIONS, SLOTS, NONE[:, None], NONE, 0)


def turned(head, position, table):
    position = min(max(position, 0), len(table) - 1)
    r = table.shape[1] // 2
    c, s = table[position, :r], table[position, r:]
    return torch.cat((head[:r] * c - head[r : 2 * r] * s, head[r : 2 * r] * c + head[:r] * s,
                      head[2 * r :]))  # fmt: skip


def normed(head, weight):
    return F.rms_norm(head, head.shape, 1 + weight, EPS)


def check_written(cache, rows):
    """Rows with a slot are there; every other cell still is NaN."""
    flat = cache.flatten(0, 1)
    for n, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            torch.testing.assert_close(flat[slot], rows[n])
    others = torch.ones(len(flat), dtype=torch.bool)
    others[SLOTS[SLOTS >= 0]] = False
    assert flat[others].isnan().all()


def caches(*shapes):
    return [torch.full((4, 4, *shape), torch.nan).double() for shape in shapes]


@pytest.mark.parametrize("indexed", [False, True])
def test_stores_of_the_target(indexed):
    table = rope_table(32, ROTARY, 100.0, CPU, torch.float64)
    wide = torch.randn(5, (HEADS + 2 * GROUPS) * DIM + (GROUPS + 1) * INDEX_DIM + 3).double()
    main = (HEADS + 2 * GROUPS) * DIM
    qkv = wide[:, : main + (GROUPS + 1) * INDEX_DIM] if indexed else wide[:, :main]
    norms = [torch.randn(d).double() for d in (DIM, DIM, INDEX_DIM, INDEX_DIM)]
    k_cache, v_cache, index_cache = caches((GROUPS, DIM), (GROUPS, DIM), (INDEX_DIM,))
    if indexed:
        weights = HeadNorms(*norms[:2], EPS, *norms[2:])
        kv = LayerKV(k_cache, v_cache, index_cache)
        q, index_q = kv_store(qkv, ROWS, weights, table, kv)
        tail = qkv[:, main:].view(5, GROUPS + 1, INDEX_DIM)
        weights = [norms[2]] * GROUPS + [norms[3]]
        index = rows_of(tail, weights, table)
        torch.testing.assert_close(index_q, index[:, :GROUPS])
        check_written(index_cache, index[:, GROUPS])
    else:
        weights, kv = HeadNorms(*norms[:2], EPS), LayerKV(k_cache, v_cache)
        q, index_q = kv_store(qkv, ROWS, weights, table, kv)
        assert index_q is None
    heads = qkv[:, :main].view(5, -1, DIM)
    weights = [norms[0]] * HEADS + [norms[1]] * GROUPS
    qk = rows_of(heads[:, : HEADS + GROUPS], weights, table)
    torch.testing.assert_close(q, qk[:, :HEADS])
    check_written(k_cache, qk[:, HEADS:])
    check_written(v_cache, heads[:, HEADS + GROUPS :])


def rows_of(heads, weights, table):
    rows = [
        torch.stack([turned(normed(h, w), p, table) for h, w in zip(row, weights, strict=True)])
        for row, p in zip(heads, POSITIONS.tolist(), strict=True)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [0, HEADS])
def test_store_of_the_draft_turns_by_the_position_before(heads):
    table = rope_table(32, DIM, 100.0, CPU, torch.float64)
    qkv = torch.randn(5, (heads + 2 * GROUPS) * DIM).double()
    k_cache, v_cache = caches((GROUPS, DIM), (GROUPS, DIM))
    q = draft_kv_store(qkv, ROWS, table, LayerKV(k_cache, v_cache))
    rows = qkv.view(5, -1, DIM)
    qk = torch.stack([
        torch.stack([turned(h, p - 1, table) for h in row[: heads + GROUPS]])
        for row, p in zip(rows, POSITIONS.tolist(), strict=True)
    ])  # fmt: skip
    assert q.shape == (5, heads, DIM)
    torch.testing.assert_close(q, qk[:, :heads])
    check_written(k_cache, qk[:, heads:])
    check_written(v_cache, rows[:, heads + GROUPS :])


def test_columns_that_are_no_heads():
    table = rope_table(32, DIM, 100.0, CPU, torch.float64)
    for columns in (2 * GROUPS * DIM + 1, (2 * GROUPS - 1) * DIM):
        with pytest.raises(ValueError, match=f"{columns}"):
            draft_kv_store(
                torch.ones(5, columns).double(),
                ROWS,
                table,
                LayerKV(*caches((GROUPS, DIM), (GROUPS, DIM))),
            )
