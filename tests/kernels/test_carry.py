import pytest
import torch
from compare import compare

from eaglerun.kernels.carry import store_carry


@pytest.mark.parametrize("width", [1, 40, 1031])
def test_last_places_alone_are_kept(width, device):
    hidden = torch.randn(7, width + 3, device=device)[:, :width]
    slots = torch.tensor([3, -1, 4, 7, 2, 11, 19], device=device)
    hidden[1] = float("nan")
    carry = torch.full((5, width), float("nan"), device=device)
    compare(store_carry, hidden, slots, carry, 4)
    compare(store_carry, hidden[:0], slots[:0], carry, 4)


def test_raises(device):
    with pytest.raises(ValueError, match="store_carry"):
        store_carry.kernel(
            torch.randn(2, 8, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.randn(4, 9, device=device),
            4,
        )
