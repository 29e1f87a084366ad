"""Every kernel has a twin of the same name and signature, and a test of its own."""

import importlib
import inspect
from pathlib import Path

import pytest
import torch

from eaglerun.kernels import Op, paired, reference_kernels
from eaglerun.kernels.rmsnorm import rmsnorm

FOLDER = Path(__file__).resolve().parents[2] / "kernels"
PLUMBING = {"__init__", "ahead", "compiling", "language", "launch", "rows"}
NAMES = sorted({p.stem for p in FOLDER.glob("*.py")} - PLUMBING)


@pytest.mark.parametrize("name", NAMES)
def test_twins(name):
    kernels = importlib.import_module(f"eaglerun.kernels.{name}")
    references = importlib.import_module(f"eaglerun.kernels.reference.{name}")
    ops = {key: op for key, op in vars(kernels).items() if isinstance(op, Op)}
    own = {key: op for key, op in ops.items() if op.kernel.__module__ == kernels.__name__}
    assert own
    for key, op in own.items():
        assert op.reference is getattr(references, key)
        assert inspect.signature(op.kernel) == inspect.signature(op.reference)
        assert "Shapes" in op.__doc__ or "as " in op.__doc__, f"{key} states no contract"
        assert op.reference.__doc__ == f"See {kernels.__name__}.{key}.", "a contract stands once"
    assert (Path(__file__).parent / f"test_{name}.py").exists()


def test_a_cpu_tensor_takes_the_reference():
    x, w = torch.randn(2, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    assert torch.equal(rmsnorm(x, w, 1e-6), rmsnorm.reference(x, w, 1e-6))
    assert torch.equal(rmsnorm(x=x, weight=w, eps=1e-6), rmsnorm(x, w, 1e-6))


class OnDevice:
    is_cpu = False


def test_a_device_tensor_takes_the_kernel_unless_references_are_forced():
    def reference(x: object) -> str:
        return "reference"

    @paired(reference)
    def op(x: object) -> str:
        return "kernel"

    assert op(OnDevice()) == "kernel"
    with reference_kernels():
        with reference_kernels():
            assert op(OnDevice()) == "reference"
        assert op(OnDevice()) == "reference"
    assert op(OnDevice()) == "kernel"


def test_signatures_must_agree():
    def reference(x: object, y: int) -> str:
        return ""

    with pytest.raises(TypeError, match="different signatures"):

        @paired(reference)  # type: ignore[arg-type]
        def op(x: object) -> str:
            return ""
