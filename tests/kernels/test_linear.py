import pytest
import torch
from compare import compare

from eaglerun.kernels.launch import linear_regime
from eaglerun.kernels.linear import linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, width, out",
    [(0, 8, 8), (1, 6144, 64), (5, 100, 97), (33, 256, 65), (65, 40, 24), (3, 64, 4100)],
)
def test_linear(rows, width, out, dtype, device):
    x = torch.randn(rows, width + 3, device=device).to(dtype)[:, :width]
    weight = (torch.randn(out + 9, width, device=device) * width**-0.5).to(dtype)[4 : out + 4]
    compare(linear, x, weight, ulps=2, floor=1)
    compare(linear, x, weight, torch.randn(out, device=device).to(dtype), ulps=2, floor=1)


def test_a_row_does_not_depend_on_its_neighbours(device):
    x = torch.randn(40, 256, device=device).bfloat16()
    weight = torch.randn(70, 256, device=device).bfloat16()
    whole = linear.kernel(x, weight)
    for n in (1, 17):
        assert torch.equal(linear.kernel(x[:n], weight), whole[:n])


def test_regimes():
    tile, round_of = 64, 132 * 64
    assert {linear_regime(n, round_of) for n in (1, 32, 64)} == {"narrow"}
    assert {linear_regime(n, m) for n in (1, 32) for m in (round_of + 1, 200064)} == {"few"}
    assert linear_regime(33, round_of + tile) == linear_regime(64, 2 * round_of) == "several"
    assert linear_regime(33, 2 * round_of + 1) == "broad"


def test_raises(device):
    x = torch.randn(2, 8, device=device)
    for weight in (torch.randn(8, 4, device=device), torch.randn(8, 8, device=device).t()):
        with pytest.raises(ValueError, match="linear"):
            linear.kernel(x, weight)
