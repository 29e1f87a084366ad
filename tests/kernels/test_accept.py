import pytest
import torch
from compare import compare

from eaglerun.kernels.accept import accept, move_on, window


@pytest.mark.parametrize("batch, k", [(0, 3), (1, 0), (1, 1), (33, 3), (17, 7)])
def test_accept(batch, k, device):
    targets = torch.randint(0, 99, (batch, k + 1), device=device)
    matches = torch.rand(batch, k, device=device) < 0.7
    num_drafts = torch.randint(-1, k + 1, (batch, 3), device=device)[:, 1]
    compare(accept, targets, matches, num_drafts)


def test_known_rows(device):
    targets = torch.tensor([[5, 8, 1, 4], [5, 7, 9, 4]], device=device)
    matches = torch.tensor([[True, False, True], [True, True, True]], device=device)
    emitted, accepted = accept.kernel(targets, matches, torch.tensor([3, 3], device=device))
    assert emitted.tolist() == [[5, 8, -1, -1], [5, 7, 9, 4]]
    assert accepted.tolist() == [1, 3]


@pytest.mark.parametrize("batch, rows", [(0, 1), (1, 1), (17, 4)])
def test_move_on(batch, rows, device):
    """The last two of many sequences are padding: they share a slot and emit nothing."""
    slots = torch.randperm(batch + 3, device=device)[:batch]
    accepted = torch.randint(0, rows, (batch,), device=device)
    emitted = torch.randint(0, 99, (batch, rows), device=device)
    emitted[torch.arange(rows, device=device) > accepted[:, None]] = -1
    if batch > 2:
        slots[-2], emitted[-2:], accepted[-2:] = slots[-1], -1, 0
    state = [torch.randint(1, 50, (batch + 3,), device=device) for _ in range(3)]
    kept = torch.full((batch + 4, rows + 2), 7, device=device)
    compare(move_on, emitted, accepted, slots, *state, kept[:, 1:], kept[:, 0].clone())


@pytest.mark.parametrize("batch, count", [(0, 2), (1, 1), (5, 4)])
def test_window(batch, count, device):
    source = torch.randint(0, 99, (6, 20), device=device)[:, :11]
    slots = torch.randint(0, 6, (batch, 2), device=device)[:, 1]
    compare(window, source, slots, torch.randint(0, 14, (batch,), device=device), count)


def test_raises(device):
    with pytest.raises(ValueError, match="accept"):
        accept.kernel(
            torch.zeros(2, 4, dtype=torch.int64, device=device),
            torch.zeros(2, 4, dtype=torch.bool, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
