import pytest
import torch
from compare import compare

from eaglerun.kernels.swiglu_oai import swiglu, swiglu_oai


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(0, 4), (1, 3072), (5, 1), (3, 1031)])
def test_both(rows, width, dtype, device):
    gate_up = (8 * torch.randn(rows, 2 * width + 6, device=device)).to(dtype)[:, 3:-3]
    compare(swiglu_oai, gate_up, 1.702, 7.0, 1.0)
    compare(swiglu, gate_up)


def test_known_values_and_nan(device):
    pairs = [(1.0, 1.0), (10.0, 9.0), (-3.0, 2.0), (0.5, -1.0), (-20.0, -9.0)]
    rows = torch.tensor(pairs, device=device)
    wanted = [1.6915915318656425, 55.99962502642654, -0.0542139291233579, 0.0, 1.976e-13]
    got = swiglu_oai.kernel(rows, 1.702, 7.0, 1.0).flatten().tolist()
    assert got == pytest.approx(wanted, rel=1e-4)
    broken = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")]], device=device)
    assert swiglu_oai.kernel(broken, 1.702, 7.0, 1.0).isnan().all()


def test_raises(device):
    with pytest.raises(ValueError, match="swiglu"):
        swiglu.kernel(torch.randn(2, 5, device=device))
