import pytest
import torch
from compare import compare

from eaglerun.kernels.noise import ACCEPT, TOKEN, gumbel, gumbel_argmax, uniform

SEEDS = [0, 1, -5, 2**62, -(2**63)]


def keys(rows, device):
    seed = torch.tensor((SEEDS * 40)[:rows], dtype=torch.int64, device=device)
    return seed, torch.randint(0, 1 << 40, (rows,), device=device)


@pytest.mark.parametrize("rows", [0, 1, 5, 129])
def test_uniform_is_exact(rows, device):
    u = compare(uniform, *keys(rows, device), ACCEPT, tolerance=0.0)
    assert ((u > 0) & (u < 1)).all()


@pytest.mark.parametrize("rows, size", [(0, 3), (1, 1), (5, 2049)])
def test_gumbel(rows, size, device):
    compare(gumbel, *keys(rows, device), TOKEN, size, tolerance=1e-14)


@pytest.mark.parametrize("rows, vocab", [(0, 3), (1, 1), (5, 4099)])
def test_the_fused_draw_is_the_draw(rows, vocab, device):
    scores = torch.randn(rows, vocab, device=device)
    scores[:, 1::3] = -torch.inf
    compare(gumbel_argmax, scores, *keys(rows, device), TOKEN, tolerance=1e-14)


def test_a_draw_of_what_is_not_a_number_is_an_id_and_says_so(device):
    scores = torch.randn(3, 4099, device=device)
    scores[0] = torch.nan
    scores[1, 4000] = torch.nan
    seed, position = keys(3, device)
    best = gumbel_argmax.kernel(scores, seed, position, TOKEN)
    assert best.ids[:2].tolist() == [0, 4000]
    assert best.values.isfinite().tolist() == [False, False, True]
    assert torch.equal(best.ids, gumbel_argmax.reference(scores, seed, position, TOKEN).ids)


def test_a_seed_repeated_by_its_stride(device):
    seed, position = torch.tensor([7], device=device).expand(5), torch.arange(10, device=device)
    scores = torch.randn(5, 300, device=device)
    compare(gumbel_argmax, scores, seed, position[::2], TOKEN, tolerance=1e-14)
    compare(uniform, seed, position[::2], ACCEPT, tolerance=0.0)
    compare(gumbel, seed, position[::2], ACCEPT, 9, tolerance=1e-14)


def test_raises(device):
    seed, position = keys(3, device)
    with pytest.raises(ValueError, match="uniform"):
        uniform.kernel(seed, position[:2], 0)
    with pytest.raises(ValueError, match="gumbel_argmax"):
        gumbel_argmax.kernel(torch.randn(2, 9, device=device), seed, position, 0)
