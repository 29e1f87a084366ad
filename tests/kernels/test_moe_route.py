import pytest
import torch
from compare import compare

from eaglerun.kernels.launch import route_regime
from eaglerun.kernels.moe_route import moe_route


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, experts, width", [(0, 8, 16), (1, 16, 6144), (2, 128, 64), (17, 6, 100), (70, 37, 61)]
)
def test_route(rows, experts, width, dtype, device):
    x = torch.randn(rows, width + 3, device=device).to(dtype)[:, :width]
    gate = torch.randn(experts, width, device=device) * width**-0.5
    bias = torch.randn(experts, device=device)
    positions = torch.arange(rows, device=device)
    positions[1:2] = -1
    count = torch.tensor([7], device=device)
    compare(moe_route, x, gate, bias, positions, 4, 2.0, count)
    compare(moe_route, x, gate, None, positions, 4, 2.0, None)


def test_equal_scores_take_the_lower_id_and_count_once(device):
    gate = torch.zeros(20, 32, device=device)
    x, positions = torch.randn(40, 32, device=device), torch.arange(40, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    ids, weights = moe_route.kernel(x, gate, None, positions, 4, 2.0, count)
    assert ids.tolist() == [[0, 1, 2, 3]] * 40
    assert weights.eq(0.5).all()
    assert count.item() == 4


def test_regimes():
    found = [route_regime(rows) for rows in (1, 64, 65, 512, 513)]
    assert found == ["few", "few", "some", "some", "many"]


def test_raises(device):
    x, gate = torch.randn(2, 16, device=device), torch.randn(3, 16, device=device)
    positions = torch.arange(2, device=device)
    with pytest.raises(ValueError, match="moe_route"):
        moe_route.kernel(x, gate, None, positions, 4, 2.0)
    with pytest.raises(ValueError, match="moe_route"):
        moe_route.kernel(x, gate.bfloat16(), None, positions, 2, 2.0)
