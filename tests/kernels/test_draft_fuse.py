import pytest
import torch
from compare import compare

from eaglerun.kernels.draft_fuse import embed_dual_rmsnorm, group_rmsnorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, width", [(0, 8), (1, 6144), (5, 65)])
def test_both(rows, width, dtype, device):
    aux = torch.randn(3, rows + 2, width, device=device).to(dtype)[:, :rows]
    weight = torch.randn(3, width, device=device).to(dtype)
    compare(group_rmsnorm, aux.transpose(0, 1), weight, 1e-6)
    table = torch.randn(11, width + 1, device=device).to(dtype)[:, :width]
    ids = torch.randint(11, (rows, 2), device=device)[:, 1]
    compare(embed_dual_rmsnorm, ids, table, aux[1], weight[0], weight[1], 1e-6)


def test_raises(device):
    x, w = torch.randn(4, 3, 64, device=device), torch.randn(3, 64, device=device)
    with pytest.raises(ValueError, match="group_rmsnorm"):
        group_rmsnorm.kernel(x, w[0], 1e-6)
    ids = torch.zeros(4, dtype=torch.int64, device=device)
    for bad in ((ids[:2], x[:, 0]), (ids.int(), x[:, 0]), (ids, x[:, 0, :32])):
        with pytest.raises(ValueError, match="embed_dual_rmsnorm"):
            embed_dual_rmsnorm.kernel(bad[0], x[:, 1], bad[1], w[0], w[0], 1e-6)
    with pytest.raises(ValueError, match="embed_dual_rmsnorm"):
        embed_dual_rmsnorm.reference(ids[:2], x[:, 1], x[:, 0], w[0], w[0], 1e-6)
