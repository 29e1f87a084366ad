import pytest
import torch
from compare import close, compare

from eaglerun.kernels.kv_store import draft_kv_fill, draft_kv_store, kv_store
from eaglerun.kernels.launch import changed
from eaglerun.kernels.linear import product_parts
from eaglerun.kernels.reference.rope import rope_table
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows

# H, G, D, Di, rotary_dim: odd ones, and M3's.
SHAPES = [(8, 2, 32, 16, 16), (3, 3, 24, 12, 6), (17, 1, 16, 16, 16), (64, 4, 128, 128, 64)]


FP8 = torch.float8_e4m3fn


def places(positions, slots):
    """Rows of which a store reads where they stand and where they go."""
    none = positions.new_zeros(0, dtype=torch.int32)
    return Rows(positions, slots, none[:, None], none, 0)


def of_main_heads(norms, kv):
    """Of a layer without index keys."""
    return norms._replace(index_q=None, index_k=None), kv._replace(index_k=None)


def rows_of(count, H, G, D, Di, rotary, dtype, device, cache_dtype=None):
    cache_dtype = cache_dtype or dtype
    columns = (H + 2 * G) * D + (G + 1) * Di
    qkv = torch.randn(count, columns + 5, device=device).to(dtype)[:, :columns]
    positions = torch.randint(0, 90, (count,), device=device)
    slots = torch.randperm(6 * 8, device=device)[:count]
    if count > 1:
        positions[1], slots[1] = -1, -1
    q, k, index_q, index_k = (torch.randn(n, device=device).to(dtype) for n in (D, D, Di, Di))
    norms = HeadNorms(q, k, 1e-6, index_q, index_k)
    table = rope_table(70, rotary, 1e4, device, torch.float32)
    k, v = (torch.full((6, 8, G, D), float("nan"), device=device).to(cache_dtype) for _ in "kv")
    index_k = torch.full((6, 8, Di), float("nan"), device=device).to(cache_dtype)
    return qkv, places(positions, slots), norms, table, LayerKV(k, v, index_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [0, 1, 5])
def test_stores(count, shape, dtype, device):
    H, G, D, Di, rotary = shape
    qkv, where, norms, table, kv = rows_of(count, *shape, dtype, device)
    compare(kv_store, qkv, where, norms, table, kv, ulps=2)
    main, (norms, kv) = qkv[:, : (H + 2 * G) * D], of_main_heads(norms, kv)
    _, nothing = compare(kv_store, main, where, norms, table, kv, ulps=2)
    assert nothing is None


@pytest.mark.parametrize("heads, groups, dim", [(8, 2, 32), (0, 2, 32), (4, 4, 24), (0, 4, 128)])
def test_draft(heads, groups, dim, device):
    shape = (heads, groups, dim, 8, dim)
    qkv, where, _, table, kv = rows_of(5, *shape, torch.float32, device)
    main = qkv[:, : (heads + 2 * groups) * dim]
    compare(draft_kv_store, main, where, table, kv._replace(index_k=None))


def filling(count, width, dtype, device, biased=False, cache_dtype=None):
    groups, dim = 2, 32
    shape = (0, groups, dim, 8, dim)
    _, where, _, table, kv = rows_of(5, *shape, dtype, device, cache_dtype)
    positions, slots = (t.repeat(14)[:count] for t in where[:2])
    slots[5:] = -1
    x = torch.randn(count, width, device=device).to(dtype)
    weight = (torch.randn(9 + 2 * groups * dim, width, device=device) * width**-0.5).to(dtype)[9:]
    bias = torch.randn(len(weight), device=device).to(dtype) if biased else None
    return x, weight, bias, positions, slots, table, kv._replace(index_k=None)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "count, width, programs, parts",
    [(5, 512, 128, 4), (1, 640, 128, 5), (5, 768, 4, 2), (5, 512, 2, 1), (5, 100, 128, 1)]
    + [(70, 512, 128, 1), (0, 512, 128, 1)],
)
def test_draft_fill(count, width, programs, parts, biased, device):
    """Sums in parts: of one tile of the sum each, of several; whole: where there are programs
    enough, no whole tiles, many rows, none."""
    args = filling(count, width, torch.bfloat16, device, biased)
    with changed("linear_parts", PROGRAMS=programs):
        found = product_parts("", *args[:3])
        compare(draft_kv_fill, *args, ulps=2, floor=1)
    assert parts == (1 if found is None else len(found))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_draft_fill_of_other_dtypes(dtype, device):
    compare(draft_kv_fill, *filling(5, 512, dtype, device, biased=True), ulps=2, floor=1)


def test_draft_fill_of_an_fp8_cache(device):
    """In parts, what is stored is rounded once: the reference of fp32 rows does that too."""
    x, weight, *rest = filling(5, 512, torch.bfloat16, device, cache_dtype=FP8)
    kv = rest.pop()
    mine, theirs = (LayerKV(kv.k.clone(), kv.v.clone()) for _ in range(2))
    draft_kv_fill.kernel(x, weight, *rest, mine)
    draft_kv_fill.reference(x.float(), weight.float(), *rest, theirs)
    close(mine.k, theirs.k)
    close(mine.v, theirs.v)


def test_draft_fill_raises(device):
    x, weight, bias, *rest = filling(2, 512, torch.bfloat16, device, biased=True)
    kv = rest[-1]
    for wrong in (
        (x, weight.half(), bias, *rest),
        (x[:, :256], weight, bias, *rest),
        (x, weight[:, :256], bias, *rest),
        (x.t().contiguous().t(), weight, bias, *rest),
        (x, weight, bias[:64], *rest),
        (x, weight, bias.float(), *rest),
        (x, weight.repeat(2, 1), bias.repeat(2), *rest),
        (x, weight, bias, *rest[:-1], LayerKV(kv.k.float(), kv.v.float())),
    ):
        with pytest.raises(ValueError, match="draft_kv_fill"):
            draft_kv_fill.kernel(*wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[1], pytest.param(SHAPES[3], marks=pytest.mark.long)])
@pytest.mark.parametrize("cache_dtype", [FP8, torch.bfloat16])
def test_narrower_caches(cache_dtype, shape, dtype, device):
    H, G, D, _, _ = shape
    qkv, where, norms, table, kv = rows_of(5, *shape, dtype, device, cache_dtype)
    # Keys beyond fp8's range, both ways.
    norms = norms._replace(k=norms.k * 200)
    compare(kv_store, qkv, where, norms, table, kv, ulps=2)
    kv = kv._replace(index_k=kv.index_k.to(dtype))
    compare(kv_store, qkv, where, norms, table, kv, ulps=2)
    main, (norms, kv) = qkv[:, : (H + 2 * G) * D], of_main_heads(norms, kv)
    kv_store.kernel(main, where, norms, table, kv)
    if cache_dtype == FP8:
        assert kv.k.float().nan_to_num().abs().max() == 448


def test_every_bf16_value_rounds_to_the_nearest_fp8(device):
    """Ties to even, subnormals, saturation: as torch rounds what is clamped first."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    nan = values.isnan()
    values[nan] = torch.nan
    rows, nan, values = 16, nan.view(16, 16, 256).to(device), values.view(16, 16, 256).to(device)
    qkv = torch.stack((torch.zeros_like(values), values), dim=1).view(rows, -1)
    k, v = (torch.empty(rows, 1, 16, 256, dtype=FP8, device=device) for _ in "kv")
    slots = torch.arange(rows, device=device)
    table = rope_table(rows, 64, 1e4, device, torch.float32)
    draft_kv_store.kernel(qkv, places(slots, slots), table, LayerKV(k, v))
    expected = values.float().clamp(-448, 448).to(FP8)
    expected, v = expected.view(torch.uint8), v[:, 0].view(torch.uint8)
    assert torch.equal(v[~nan], expected[~nan])
    assert (v[nan] & 0x7F).eq(0x7F).all()
    assert k.float().eq(0).all()


def test_raises(device):
    qkv, where, norms, table, kv = rows_of(2, *SHAPES[0], torch.float32, device)
    plain, main = of_main_heads(norms, kv)
    for rows, layer, weights in (
        (qkv[:, :40], main, plain),
        (qkv[:, : 12 * 32], main._replace(k=main.k.half()), plain),
        (qkv[:, None, : 12 * 32], main, plain),
        (qkv, kv, plain),
    ):
        with pytest.raises(ValueError, match="kv_store"):
            kv_store.kernel(rows, where, weights, table, layer)
    with pytest.raises(ValueError, match="kv_store"):
        kv_store.reference(qkv, where, plain, table, kv)
