import pytest
import torch
from compare import compare

from eaglerun.kernels.draft_inputs import (
    accepted_inputs,
    draft_inputs,
    kv_slots_of,
    newest_inputs,
    verify_inputs,
)
from eaglerun.kernels.rows import BySlot, Newest


def table(batch, device):
    return torch.randint(0, 50, (batch, 9), dtype=torch.int32, device=device)[:, 1:8]


@pytest.mark.parametrize("batch, rows", [(0, 1), (1, 1), (5, 1), (3, 200)])
def test_slots(batch, rows, device):
    positions = torch.randint(-1, 28, (batch, rows), device=device)
    compare(kv_slots_of, positions, table(batch, device), 4)


def test_known_slot(device):
    blocks = torch.tensor([[9, 4]], dtype=torch.int32, device=device)
    assert kv_slots_of.kernel(torch.tensor([[130]], device=device), blocks, 128).item() == 514


@pytest.mark.parametrize("batch, rows", [(0, 4), (1, 1), (7, 4), (33, 8)])
def test_verify_inputs(batch, rows, device):
    places = batch + 3
    slots = torch.randperm(places, device=device)[:batch]
    length = torch.randint(1, 20, (places,), device=device)
    last = torch.randint(0, 99, (places,), device=device)
    drafts = torch.randint(0, 99, (places, 9), device=device)[:, : rows + 1]
    num_drafts = torch.randint(-1, rows, (batch, 3), device=device)[:, 1]
    by_slot = BySlot(length, last, drafts, table(places, device))
    own = torch.full((batch, 7), 99, dtype=torch.int32, device=device)
    compare(verify_inputs, slots, num_drafts, by_slot, own, 4, rows)


def test_a_long_table_is_taken_whole(device):
    long = torch.arange(2 * 1100, dtype=torch.int32, device=device).view(2, 1100)
    slots, one = (
        torch.tensor([1, 0], device=device),
        torch.ones(2, dtype=torch.int64, device=device),
    )
    by_slot = BySlot(one, one, one[:, None], long)
    compare(verify_inputs, slots, one - 1, by_slot, torch.zeros_like(long), 4, 1)


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("pass_index", [0, 1, 2])
def test_draft_inputs(batch, pass_index, device):
    position = torch.randint(0, 20, (batch,), device=device)
    num_propose = torch.randint(0, 4, (batch, 3), device=device)[:, 2]
    compare(draft_inputs, position, pass_index, num_propose, table(batch, device), 4)


@pytest.mark.parametrize("batch", [0, 1, 33])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_accepted_inputs(batch, rows, device):
    emitted = torch.randint(0, 900, (batch, rows + 2), device=device)[:, 1 : 1 + rows]
    count = torch.randint(0, rows + 1, (batch, 1), device=device)
    emitted = emitted.where(torch.arange(rows, device=device) < count, -1)
    length = torch.randint(0, 12, (batch,), device=device)
    compare(accepted_inputs, emitted, length, table(batch, device), 4)


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (4, 72), (9, 1100)])
def test_newest_inputs(batch, rows, width, device):
    slots = torch.randperm(40, device=device)[:batch]
    accepted = torch.randint(0, rows, (batch, 3), device=device)[:, 1]
    num_propose = torch.randint(0, 3, (batch,), device=device)
    length, last = torch.randint(1, 900, (2, 40), device=device)
    by_slot = BySlot(length, last, last[:, None], table(40, device))
    hidden = torch.randn(batch * rows, width, device=device).bfloat16()
    # Nobody knows what the rows of padding hold.
    hidden.view(batch, rows, width)[num_propose == 0] = torch.nan
    newest = Newest(*(num_propose.clone() + 7 for _ in range(2)), hidden[:batch].clone())
    compare(newest_inputs, slots, accepted, num_propose, by_slot, hidden, newest)


def test_raises(device):
    positions = torch.zeros(2, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="kv_slots_of"):
        kv_slots_of.kernel(positions, table(2, device).long(), 4)
    with pytest.raises(ValueError, match="accepted_inputs"):
        accepted_inputs.kernel(positions, positions[:1, 0], table(2, device), 4)
    hidden = torch.zeros(3, 8, device=device)
    by_slot = BySlot(positions[:, 0], positions[:, 0], positions, table(2, device))
    newest = Newest(positions[:, 0], positions[:, 0], hidden[:2])
    with pytest.raises(ValueError, match="newest_inputs"):
        newest_inputs.kernel(*[positions[:, 0]] * 3, by_slot, hidden, newest)
    with pytest.raises(ValueError, match="newest_inputs"):
        newest_inputs.kernel(*[positions[:0, 0]] * 3, by_slot, hidden, newest)
    with pytest.raises(ValueError, match="verify_inputs"):
        verify_inputs.kernel(*[positions[:, 0]] * 2, by_slot, table(2, device), 4, 1)
