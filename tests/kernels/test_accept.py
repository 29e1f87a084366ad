import pytest
import torch
from compare import compare

from eaglerun.kernels.accept import accept


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


def test_raises(device):
    with pytest.raises(ValueError, match="accept"):
        accept.kernel(
            torch.zeros(2, 4, dtype=torch.int64, device=device),
            torch.zeros(2, 4, dtype=torch.bool, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
        )
