import pytest
import torch
from compare import close, compare

from eaglerun.kernels import launch
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.rows import Experts, Routing
from eaglerun.kernels.swiglu_oai import swiglu_oai

ACTIVATION = (1.702, 7.0, 1.0)


def arguments(rows, experts, topk, hidden, width, dtype, device):
    x = torch.randn(rows, hidden, device=device).to(dtype)
    w13 = (torch.randn(experts, 2 * width, hidden, device=device) * hidden**-0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, width, device=device) * width**-0.5).to(dtype)
    order = torch.rand(rows, experts, device=device).argsort(dim=1)
    ids = order[:, :topk].int().contiguous()
    return [x, w13, w2, ids, torch.rand(rows, topk, device=device)]


def words(x, w13, w2, ids, weights, *shared):
    return x, Routing(ids, weights), Experts(w13, w2, *shared), *ACTIVATION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, experts, topk, hidden, width",
    [(0, 4, 2, 16, 16), (1, 5, 3, 40, 24), (3, 128, 4, 64, 32), (70, 3, 2, 48, 33)],
)
def test_gemm(rows, experts, topk, hidden, width, dtype, device):
    args = arguments(rows, experts, topk, hidden, width, dtype, device)
    compare(moe_gemm, *words(*args), ulps=2, floor=1)
    # Padding rows hold anything and read nothing; an expert in no id may hold anything too.
    args[3][-1:] = -1
    args[0][-1:] = float("nan")
    unused = [e for e in range(experts) if not (args[3] == e).any()]
    args[1][unused] = args[2][unused] = float("nan")
    compare(moe_gemm, *words(*args), ulps=2, floor=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, experts, topk, hidden, width, own",
    [(1, 5, 3, 40, 24, 24), (16, 16, 4, 64, 32, 32), (17, 16, 4, 64, 32, 32), (3, 8, 2, 48, 33, 7)],
)
def test_shared_expert(rows, experts, topk, hidden, width, own, dtype, device):
    """A tile of its own up to 16 rows, where its width is the others'; else a layer of its own."""
    args = arguments(rows, experts, topk, hidden, width, dtype, device)
    up = (torch.randn(2 * own, hidden, device=device) * hidden**-0.5).to(dtype)
    down = (torch.randn(hidden, own, device=device) * own**-0.5).to(dtype)
    args[3][-1:] = -1
    # In the interpreter a rounded value may be one step lower, and here three meet.
    out = compare(moe_gemm, *words(*args, up, down), ulps=3, floor=1)
    # A row without experts is the shared one's alone.
    layer = swiglu_oai.reference(torch.nn.functional.linear(args[0][-1:], up), *ACTIVATION)
    close(out[-1:], torch.nn.functional.linear(layer, down), ulps=3, floor=1)


@pytest.mark.parametrize("regime", ["few", "several", "some", "many"])
def test_every_regime(regime, monkeypatch, device):
    monkeypatch.setattr("eaglerun.kernels.moe_gemm.moe_regime", lambda *_: regime)
    # bf16 settings, which have a narrow last tile where there are many rows.
    compare(moe_gemm, *words(*arguments(61, 3, 2, 80, 40, torch.bfloat16, device)), ulps=2, floor=1)
    compare(moe_gemm, *words(*arguments(33, 5, 2, 80, 40, torch.float32, device)))
    # Rows that are no multiple of 16 bytes, and ones that are; tiles end in an unused expert's.
    for width in (33, 40):
        args = arguments(61, 4, 2, 80, width, torch.bfloat16, device)
        args[3] = args[3] % 3
        args[1][3], args[2][3] = float("nan"), float("nan")
        compare(moe_gemm, *words(*args), ulps=2, floor=1)


def test_one_expert_takes_every_row(device):
    args = arguments(37, 4, 1, 32, 16, torch.float32, device)
    args[3].fill_(2)
    compare(moe_gemm, *words(*args))


def test_a_row_does_not_depend_on_its_neighbours(device):
    args = arguments(21, 6, 2, 64, 32, torch.float32, device)
    whole = moe_gemm.kernel(*words(*args))
    some = [args[0][7:9].clone(), *args[1:3], args[3][7:9].clone(), args[4][7:9].clone()]
    assert torch.equal(moe_gemm.kernel(*words(*some)), whole[7:9])


def test_regimes_follow_the_rows_of_an_expert():
    found = [launch.moe_regime(rows * 4, 128) for rows in (1, 64, 65, 256, 257, 8192)]
    assert found == ["few", "few", "several", "several", "some", "many"]


def test_raises(device):
    args = arguments(3, 4, 2, 32, 16, torch.float32, device)
    for i, bad in ((3, args[3].long()), (4, args[4][:2]), (1, args[1].bfloat16())):
        with pytest.raises(ValueError, match="moe_gemm"):
            moe_gemm.kernel(*words(*args[:i], bad, *args[i + 1 :]))
    for up, down in ((args[1][0], None), (args[1][0], args[2][0].t()), (args[0], args[2][0])):
        with pytest.raises(ValueError, match="moe_gemm"):
            moe_gemm.kernel(*words(*args, up, down))
