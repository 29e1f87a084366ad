import pytest
import torch
from compare import compare

from eaglerun.kernels.rmsnorm import add_gemma_rmsnorm, add_rmsnorm, gemma_rmsnorm, rmsnorm

SHAPES = [(0, 64), (1, 1), (3, 65), (7, 97), (2, 6144), (2, 3, 33)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [rmsnorm, gemma_rmsnorm])
def test_norm(op, shape, dtype, device):
    x, w = torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    compare(op, x.to(dtype), w.to(dtype), 1e-6)
    compare(op, x.to(dtype), w, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", [add_rmsnorm, add_gemma_rmsnorm])
def test_add_norm(op, shape, dtype, device):
    x, residual = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    w = torch.randn(shape[-1], device=device).to(dtype)
    # In the interpreter a rounded sum may be one step lower, and the norm with it.
    compare(op, x, residual, w, 1e-6, ulps=3)


def test_strided_rows(device):
    wide = torch.randn(5, 200, device=device)
    w = torch.randn(60, device=device)
    compare(rmsnorm, wide[:, 30:90], w, 1e-6)
    compare(add_rmsnorm, wide[:, 30:90], wide[::1, 100:160], w, 1e-6)
    groups = torch.randn(3, 9, 60, device=device)[:, 2:7].transpose(0, 1)
    compare(rmsnorm, groups, torch.randn(3, 60, device=device), 1e-6)


def test_a_row_stands_alone(device):
    x, w = torch.randn(9, 300, device=device), torch.randn(300, device=device)
    assert torch.equal(rmsnorm.kernel(x, w, 1e-6)[4:5], rmsnorm.kernel(x[4:5], w, 1e-6))


def test_raises(device):
    x, w = torch.randn(4, 64, device=device), torch.randn(64, device=device)
    for bad in (
        lambda: rmsnorm.kernel(x.double(), w, 1e-6),
        lambda: rmsnorm.kernel(x.t(), w[:4], 1e-6),
        lambda: rmsnorm.kernel(x, w[:32], 1e-6),
        lambda: add_rmsnorm.kernel(x, x[:2], w, 1e-6),
    ):
        with pytest.raises(ValueError, match="rmsnorm: no kernel"):
            bad()
