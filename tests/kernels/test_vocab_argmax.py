import pytest
import torch
from compare import compare

from eaglerun.kernels.vocab_argmax import vocab_argmax


@pytest.mark.parametrize("rows, vocab", [(0, 5), (1, 1), (3, 4097), (5, 997), (2, 25008)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowest_of_many_equals(rows, vocab, dtype, device):
    logits = torch.randn(rows, vocab + 3, device=device).round(decimals=1).to(dtype)[:, :vocab]
    compare(vocab_argmax, logits)


def test_edges(device):
    inf, nan = float("inf"), float("nan")
    rows = [[-inf, -inf, -inf], [-0.0, 0.0, -1.0], [1.0, nan, inf], [-inf, -3e38, -3e38]]
    logits = torch.tensor(rows, device=device)
    best = vocab_argmax.kernel(logits)
    assert best.ids.tolist() == [0, 0, 1, 1]
    assert best.values[:2].tolist() == [-inf, 0.0] and best.values[2].isnan()
    compare(vocab_argmax, logits)


def test_equals_of_two_shards(device):
    logits = torch.full((1, 200064), -1.0, device=device)
    logits[0, [50020, 170000]] = 3.5
    best = vocab_argmax.kernel(logits)
    assert best.pairs.shape == (1, 2)
    assert (best.ids.item(), best.values.item()) == (50020, 3.5)


def test_raises(device):
    with pytest.raises(ValueError, match="vocab_argmax"):
        vocab_argmax.kernel(torch.randn(4, 8, device=device).t())
