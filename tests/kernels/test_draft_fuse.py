import pytest
import torch
from compare import compare

from eaglerun.kernels.draft_fuse import dual_rmsnorm_cat, group_rmsnorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(0, 8), (1, 6144), (5, 65)])
def test_both(rows, width, dtype, device):
    aux = torch.randn(3, rows + 2, width, device=device).to(dtype)[:, :rows]
    weight = torch.randn(3, width, device=device).to(dtype)
    compare(group_rmsnorm, aux.transpose(0, 1), weight, 1e-6)
    compare(dual_rmsnorm_cat, aux[0], aux[1], weight[0], weight[1], 1e-6)


def test_raises(device):
    x, w = torch.randn(4, 3, 64, device=device), torch.randn(3, 64, device=device)
    with pytest.raises(ValueError, match="group_rmsnorm"):
        group_rmsnorm.kernel(x, w[0], 1e-6)
    with pytest.raises(ValueError, match="dual_rmsnorm_cat"):
        dual_rmsnorm_cat.kernel(x[:, 0], x[:2, 0], w[0], w[0], 1e-6)
