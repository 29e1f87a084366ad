import pytest
import torch
from compare import compare
from paged import cut, paged, ragged

from eaglerun.kernels.attention_dense import (
    attention_dense,
    described,
)
from eaglerun.kernels.launch import attention_regime, changed
from eaglerun.kernels.rows import LayerKV

LENGTHS = (5, 0, 261, 67)


@pytest.mark.parametrize(
    "rows, block_size, heads, groups, dim",
    [
        (1, 4, 8, 2, 32),
        (4, 16, 8, 2, 32),
        (3, 128, 4, 4, 24),
        (1, 16, 3, 1, 8),
        (1, 128, 64, 4, 128),
    ],
)
def test_uniform(rows, block_size, heads, groups, dim, device):
    kv = paged(LENGTHS, block_size, (groups, dim), (groups, dim), device=device)
    where = kv.uniform(rows)
    where.positions[-1] = -1
    q = torch.randn(len(where.positions), heads + 1, dim, device=device)[:, 1:]
    out = compare(attention_dense, q, kv.layer, where, dim**-0.5)
    assert out[-1].eq(0).all()
    compare(attention_dense, q, kv.layer, where, dim**-0.5, 1, 7)


def test_bf16(device):
    kv = paged(LENGTHS, 16, (2, 32), (2, 32), dtype=torch.bfloat16, device=device)
    where = kv.uniform(3)
    q = torch.randn(len(where.positions), 8, 32, device=device).bfloat16()
    compare(attention_dense, q, kv.layer, where, 0.2, ulps=4, floor=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_narrower_caches(cache_dtype, dtype, device):
    kv = paged((67, 5), 16, (2, 32), (2, 32), dtype=cache_dtype, device=device)
    where = kv.uniform(2)
    q = torch.randn(len(where.positions), 8, 32, device=device).to(dtype)
    compare(attention_dense, q, kv.layer, where, 0.2, ulps=4, floor=0.1)
    q_lens = (3, 1)
    where = kv.ragged(q_lens, 1)
    q = torch.randn(len(where.positions), 8, 32, device=device).to(dtype)
    compare(attention_dense, q, kv.layer, where, 0.2, ulps=4, floor=0.1)


def test_no_row_and_no_key(device):
    kv = paged((7, 0), 4, (2, 16), (2, 16), device=device)
    q = torch.randn(2, 4, 16, device=device)
    nothing = torch.full((2,), -1, device=device)
    where = kv.uniform(1)._replace(positions=nothing)
    assert attention_dense.kernel(q, kv.layer, where, 0.2).eq(0).all()
    none = where._replace(positions=nothing[:0], kv_slots=nothing[:0])
    compare(attention_dense, q[:0], kv.layer, none, 0.2)
    # The only key of position 0 is one that the draft does not have.
    first = where._replace(positions=torch.zeros_like(nothing))
    compare(attention_dense, q, kv.layer, first, 0.2, 1)


@pytest.mark.parametrize("max_seq_len", [300, 20000])
def test_a_row_depends_on_its_own_keys_alone(max_seq_len, device):
    kv = paged((300, 299), 16, (2, 16), (2, 16), device=device)
    q, where = torch.randn(2, 4, 16, device=device), kv.uniform(1)
    short = attention_dense.kernel(q[:1], kv.layer, cut(where, slice(1), slice(1)), 0.2)
    longer = attention_dense.kernel(q, kv.layer, where._replace(max_seq_len=max_seq_len), 0.2)
    assert torch.equal(short[0], longer[0])


@pytest.mark.parametrize("block_size, heads, groups", [(4, 8, 2), (128, 3, 3), (16, 16, 1)])
def test_ragged(block_size, heads, groups, device):
    kv = paged(LENGTHS, block_size, (groups, 24), (groups, 24), device=device)
    q_lens = (2, 0, 71, 5)
    where = kv.ragged(q_lens, 3)
    q = torch.randn(len(where.positions), heads, 24, device=device)
    out = compare(attention_dense, q, kv.layer, where, 0.2)
    assert out[-3:].eq(0).all()
    compare(attention_dense, q, kv.layer, where, 0.2, 1, 9)


@pytest.mark.parametrize("groups, dim", [(2, 128), (1, 16), (3, 24)])
def test_tiles_copied_by_descriptor(groups, dim, device):
    """Keys and values through tensor descriptors, where they can be, are those by address."""
    shape = (groups, dim)
    kv = paged((300, 129), 128, shape, shape, dtype=torch.bfloat16, device=device)
    q_lens = (9, 2)
    where = kv.ragged(q_lens, 1)
    q = torch.randn(len(where.positions), 4 * groups, dim, device=device).bfloat16()
    outs = []
    for by_descriptor in (0, 1):
        with changed("attention_prefill", DESCRIBED=by_descriptor):
            out = compare(attention_dense, q, kv.layer, where, 0.2, ulps=4, floor=0.1)
        outs.append(out)
    assert torch.equal(*outs)


def test_what_a_descriptor_can_be_of(device):
    def can(dtype, groups, dim, offset=0, open_tiles=True, cache_dtype=torch.bfloat16):
        flat = torch.zeros(offset + 2 * 64 * groups * dim, device=device).to(cache_dtype)
        cache = flat[offset:].view(2, 64, groups, dim)
        launch = {"DESCRIBED": 1, "BLOCK_N": 64}
        q = torch.zeros(1, groups, dim, dtype=dtype, device=device)
        found = described(q, LayerKV(cache, cache), launch, open_tiles)
        assert launch["DESCRIBED"] == all(not isinstance(c, torch.Tensor) for c in found)
        return launch["DESCRIBED"]

    assert can(torch.bfloat16, 2, 16) and can(torch.bfloat16, 1, 256)
    assert not can(torch.bfloat16, 2, 24)
    assert not can(torch.bfloat16, 2, 8)
    assert not can(torch.bfloat16, 2, 16, offset=1)
    assert not can(torch.bfloat16, 2, 16, open_tiles=False)
    assert not can(torch.bfloat16, 2, 16, cache_dtype=torch.float8_e4m3fn)
    assert not can(torch.float32, 2, 16)


@pytest.mark.parametrize("dim", [16, 256])
def test_narrow_and_wide_heads_in_bf16(dim, device):
    """Tiles whose number of registers is limited are compiled for any head."""
    kv = paged((200, 31), 128, (1, dim), (1, dim), dtype=torch.bfloat16, device=device)
    where = kv.uniform(9)
    q = torch.randn(len(where.positions), 8, dim, device=device).bfloat16()
    compare(attention_dense, q, kv.layer, where, dim**-0.5, ulps=4, floor=0.1)
    where = kv.ragged((5, 1), 0)
    q = torch.randn(len(where.positions), 8, dim, device=device).bfloat16()
    compare(attention_dense, q, kv.layer, where, dim**-0.5, ulps=4, floor=0.1)


def test_regimes():
    assert [attention_regime(n) for n in (16, 32, 64, 128)] == [
        "decode", "verify", "verify", "verify_wide",
    ]  # fmt: skip


def test_raises(device):
    kv = paged((7, 3), 4, (2, 16), (2, 16), device=device)
    q, where = torch.randn(3, 4, 16, device=device), kv.uniform(1)
    half = [cache.half() for cache in kv.caches]
    for rows, caches in (
        (q, kv.caches),
        (q[:2, :3], kv.caches),
        (q[:2].double(), kv.caches),
        (q[:2], half),
        (q[:2], [kv.caches[0], half[1]]),
    ):
        with pytest.raises(ValueError, match="attention_dense"):
            attention_dense.kernel(rows, LayerKV(*caches), where, 0.2)
    with pytest.raises(ValueError, match="scale -0.2"):
        attention_dense.kernel(q[:2], kv.layer, where, -0.2)
    three = torch.zeros(3, dtype=torch.int64, device=device)
    odd = where._replace(positions=three, kv_slots=three)
    short = ragged(where, (1, 1))._replace(q_lens=(2,))
    for bad in (odd, short):
        with pytest.raises(ValueError, match="attention_dense.*rows.block_tables"):
            attention_dense.kernel(q[: len(bad.positions)], kv.layer, bad, 0.2)
