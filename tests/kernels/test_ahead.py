"""Programs that are compiled by other processes, for a device that is not here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eaglerun.kernels import ahead
from eaglerun.kernels.ahead import Compilers, Program
from eaglerun.kernels.language import INSTALLED, jit

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")

# The specialization of one small kernel, as recording() finds it.
SMALL = Path(__file__).parent / "small_program.py"


@pytest.fixture(scope="module")
def small() -> Program:
    """Recorded by a process of its own, which chooses a target."""
    done = subprocess.run(
        [sys.executable, str(SMALL)],
        env=ahead.compiler_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return Program(*json.loads(done.stdout))


def compiled(directory: Path, *programs: Program) -> tuple[list[str], list[tuple[str, bool]]]:
    told: list[tuple[str, bool]] = []
    compilers = Compilers("sm_90", directory, 1, lambda *what: told.append(what))
    for program in programs:
        compilers.add(program)
    return compilers.finish(), told


def test_programs_are_compiled_into_the_directory(small: Program, tmp_path: Path):
    assert small[:2] == ("eaglerun.kernels.draft_inputs", "_kv_slots_kernel")
    failed, told = compiled(tmp_path, small, small)
    assert failed == []
    # The second time it is found.
    assert told == [("_kv_slots_kernel", True), ("_kv_slots_kernel", False)]
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_what_does_not_compile_is_told_and_the_others_are_compiled(small: Program, tmp_path: Path):
    wrong = json.loads(small.data) | {"constant_vals": []}
    missing = Program(small.module, "_no_such_kernel", small.data)
    failed, told = compiled(
        tmp_path, missing, Program(*small[:2], json.dumps(wrong | {"name": "x"})), small
    )
    assert len(failed) == 2 and len(told) == 3
    assert failed[0].startswith("_no_such_kernel: AttributeError")
    assert failed[1].startswith("_kv_slots_kernel: RuntimeError")
    assert len(list(tmp_path.rglob("*.cubin"))) == 1


def test_a_compiler_that_ends_is_told(
    small: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ahead.sys, "executable", "/bin/true")
    failed, _ = compiled(tmp_path, small, small)
    assert failed == [
        "_kv_slots_kernel: the process that compiles it ended",
        "_kv_slots_kernel: no compiler is left",
    ]


def test_a_tensor_without_memory_has_the_alignment_of_its_place():
    base = torch.empty(8, dtype=torch.int64, device="meta")
    assert [ahead._placed(base[i:]).data_ptr() % 16 for i in range(3)] == [0, 8, 0]
    assert ahead._placed(5) == 5


def test_only_arguments_that_a_kernel_has_can_vary():
    def kernel(x_ptr, rows):
        pass

    with pytest.raises(ValueError, match=r"kernel has no argument pairs"):
        jit(varying=("rows", "pairs"))(kernel)
