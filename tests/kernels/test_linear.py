import pytest
import torch
from compare import compare

from eaglerun.kernels.language import interpreting
from eaglerun.kernels.launch import changed
from eaglerun.kernels.linear import columns_of_a_program, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, width, out",
    [(0, 8, 8), (1, 6144, 64), (5, 100, 97), (33, 256, 65), (65, 40, 24), (3, 64, 4100)],
)
def test_linear(rows, width, out, dtype, device):
    x = torch.randn(rows, width + 3, device=device).to(dtype)[:, :width]
    weight = (torch.randn(out + 9, width, device=device) * width**-0.5).to(dtype)[4 : out + 4]
    compare(linear, x, weight, ulps=2, floor=1)
    compare(linear, x, weight, torch.randn(out, device=device).to(dtype), ulps=2, floor=1)


def test_a_row_does_not_depend_on_its_neighbours(device):
    x = torch.randn(40, 256, device=device).bfloat16()
    weight = torch.randn(70, 256, device=device).bfloat16()
    whole = linear.kernel(x, weight)
    for n in (1, 17):
        assert torch.equal(linear.kernel(x[:n], weight), whole[:n])


@pytest.mark.parametrize("out, width, programs", [(97, 128, 3), (200, 100, 4), (64, 128, 1)])
def test_columns_dealt_out_evenly(out, width, programs, device):
    x = torch.randn(5, width, device=device).bfloat16()
    weight, bias = torch.randn(out, width, device=device), torch.randn(out, device=device)
    args = (x, (weight * width**-0.5).bfloat16(), bias.bfloat16())
    whole = linear.kernel(*args)
    with changed("linear", PROGRAMS=programs):
        narrow = compare(linear, *args, ulps=2, floor=1)
    same = torch.equal if not interpreting() else torch.allclose  # numpy's products vary
    assert same(narrow, whole)


def test_how_many_columns_a_program_takes():
    assert columns_of_a_program(9856, 64, 0) == 64
    assert columns_of_a_program(9856, 64, 132) == 38  # 260 programs, two rounds
    assert columns_of_a_program(6144, 64, 132) == 47  # 131 programs, one round
    assert columns_of_a_program(200064, 64, 132) == 64  # rounds enough


def test_raises(device):
    x = torch.randn(2, 8, device=device)
    for weight in (torch.randn(8, 4, device=device), torch.randn(8, 8, device=device).t()):
        with pytest.raises(ValueError, match="linear"):
            linear.kernel(x, weight)
