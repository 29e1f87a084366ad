import pytest
import torch
from compare import compare

from eaglerun.kernels.accept import accept, move_on, window
from eaglerun.kernels.rows import Best, BySlot, Emitted


@pytest.mark.parametrize("batch, k", [(0, 3), (1, 0), (1, 1), (33, 3), (17, 7)])
def test_accept(batch, k, device):
    """Nothing is known of the values beyond a sequence's own rows."""
    best = Best(torch.randint(0, 99, (batch, k + 1, 2), device=device))
    matches = torch.rand(batch, k, device=device) < 0.7
    num_drafts = torch.randint(-1, k + 1, (batch, 3), device=device)[:, 1]
    best.values[torch.arange(k + 1, device=device) > num_drafts[:, None]] = torch.nan
    emitted = compare(accept, best.ids, best.values, matches, num_drafts)
    assert not emitted.broken.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_told_of_its_own_sequence(bad, device):
    """Also of a draft that does not stand; not of rows of padding."""
    values = torch.ones(4, 4, dtype=torch.float64, device=device)
    values[0, 0] = values[1, 3] = values[2, 2] = values[3, 0] = bad
    num_drafts = torch.tensor([0, 3, 1, -1], device=device)
    matches = torch.zeros(4, 3, dtype=torch.bool, device=device)
    emitted = compare(accept, values.long(), values, matches, num_drafts)
    assert emitted.broken.tolist() == [1, 1, 0, 0]


def test_known_rows(device):
    targets = torch.tensor([[5, 8, 1, 4], [5, 7, 9, 4]], device=device)
    matches = torch.tensor([[True, False, True], [True, True, True]], device=device)
    num_drafts = torch.tensor([3, 3], device=device)
    emitted = accept.kernel(targets, targets.double(), matches, num_drafts)
    assert emitted.tokens.tolist() == [[5, 8, -1, -1], [5, 7, 9, 4]]
    assert emitted.accepted.tolist() == [1, 3]


@pytest.mark.parametrize("batch, rows", [(0, 1), (1, 1), (17, 4)])
def test_move_on(batch, rows, device):
    """The last two of many sequences are padding: they share a slot and emit nothing."""
    slots = torch.randperm(batch + 3, device=device)[:batch]
    accepted = torch.randint(0, rows, (batch,), device=device)
    broken = torch.randint(0, 2, (batch,), device=device)
    tokens = torch.randint(0, 99, (batch, rows), device=device)
    tokens[torch.arange(rows, device=device) > accepted[:, None]] = -1
    if batch > 2:
        slots[-2], tokens[-2:], accepted[-2:] = slots[-1], -1, 0
    length, last_token, generated = torch.randint(1, 50, (3, batch + 3), device=device)
    drafts = torch.zeros(batch + 3, rows, dtype=torch.int64, device=device)
    by_slot = BySlot(length, last_token, drafts, drafts.int())
    kept = torch.full((batch + 4, rows + 4), 7, device=device)
    # Three copies, for the memory that a comparison copies is not one any more.
    kept = Emitted(kept.clone()[:, 2:], kept.clone()[:, 0], kept.clone()[:, 1])
    compare(move_on, slots, Emitted(tokens, accepted, broken), by_slot, generated, kept)


@pytest.mark.parametrize("batch, count", [(0, 2), (1, 1), (5, 4)])
def test_window(batch, count, device):
    source = torch.randint(0, 99, (6, 20), device=device)[:, :11]
    slots = torch.randint(0, 6, (batch, 2), device=device)[:, 1]
    compare(window, source, slots, torch.randint(0, 14, (batch,), device=device), count)


def test_raises(device):
    with pytest.raises(ValueError, match="accept"):
        accept.kernel(
            torch.zeros(2, 4, dtype=torch.int64, device=device),
            torch.zeros(2, 4, dtype=torch.float64, device=device),
            torch.zeros(2, 4, dtype=torch.bool, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
