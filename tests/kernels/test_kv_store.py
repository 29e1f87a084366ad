import pytest
import torch
from compare import compare

from eaglerun.kernels.kv_store import draft_kv_store, kv_index_store, kv_store
from eaglerun.kernels.reference.rope import rope_table

# H, G, D, Di, rotary_dim: odd ones, and M3's.
SHAPES = [(8, 2, 32, 16, 16), (3, 3, 24, 12, 6), (17, 1, 16, 16, 16), (64, 4, 128, 128, 64)]


def rows_of(count, H, G, D, Di, rotary, dtype, device):
    columns = (H + 2 * G) * D + (G + 1) * Di
    qkv = torch.randn(count, columns + 5, device=device).to(dtype)[:, :columns]
    positions = torch.randint(0, 90, (count,), device=device)
    slots = torch.randperm(6 * 8, device=device)[:count]
    if count > 1:
        positions[1], slots[1] = -1, -1
    norms = [torch.randn(n, device=device).to(dtype) for n in (D, D, Di, Di)]
    table = rope_table(70, rotary, 1e4, device, torch.float32)
    k, v = (torch.full((6, 8, G, D), float("nan"), device=device).to(dtype) for _ in range(2))
    index_k = torch.full((6, 8, Di), float("nan"), device=device).to(dtype)
    return qkv, positions, slots, norms, table, k, v, index_k


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_stores(count, shape, dtype, device):
    H, G, D, Di, rotary = shape
    qkv, positions, slots, norms, table, k, v, index_k = rows_of(count, *shape, dtype, device)
    where = (positions, slots)
    compare(kv_index_store, qkv, *where, *norms, table, 1e-6, k, v, index_k, ulps=2)
    main = qkv[:, : (H + 2 * G) * D]
    compare(kv_store, main, *where, *norms[:2], table, 1e-6, k, v, ulps=2)


@pytest.mark.parametrize("heads, groups, dim", [(8, 2, 32), (0, 2, 32), (4, 4, 24), (0, 4, 128)])
def test_draft(heads, groups, dim, device):
    shape = (heads, groups, dim, 8, dim)
    qkv, positions, slots, _, table, k, v, _ = rows_of(5, *shape, torch.float32, device)
    main = qkv[:, : (heads + 2 * groups) * dim]
    compare(draft_kv_store, main, positions, slots, table, k, v)


def test_raises(device):
    qkv, positions, slots, norms, table, k, v, _ = rows_of(2, *SHAPES[0], torch.float32, device)
    for rows, cache in ((qkv[:, :40], k), (qkv[:, : 12 * 32], k.bfloat16())):
        with pytest.raises(ValueError, match="kv_store"):
            kv_store.kernel(rows, positions, slots, *norms[:2], table, 1e-6, cache, v)
