"""Kernels run in Triton's interpreter on CPU tensors, or on the GPU where there is one.

Memory from torch.empty is poisoned: what a kernel leaves unwritten shows.
"""

from collections.abc import Iterator

import pytest
import torch

from eaglerun.kernels.language import INSTALLED, interpreting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INSTALLED:
        for item in items:
            if "kernels" in item.path.parts and "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="triton is not installed"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if interpreting() else "cuda")


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: spoil(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: spoil(new_empty(t, *a, **k)))
    torch.manual_seed(0)
    yield
