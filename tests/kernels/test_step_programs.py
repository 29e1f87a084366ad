"""A kernel is one program for each set of its constants, however many rows a step holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaglerun.kernels.language import INSTALLED, jit

SCRIPT = Path(__file__).with_name("step_programs.py")


def programs_of_steps(*arguments: str) -> dict[str, list[dict[str, str]]]:
    """In a process of its own: this one may have defined the kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    programs: dict[str, list[dict[str, str]]] = json.loads(done.stdout)
    return programs


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("arguments", [(), pytest.param(("wide",), marks=pytest.mark.long)])
def test_no_number_of_rows_asks_for_another_program(arguments):
    found = programs_of_steps(*arguments)
    assert len({regime.split()[0] for regime in found}) > 25, "kernels that steps launch"
    several = []
    for regime, programs in found.items():
        first = programs[0]
        differ = {
            name: sorted({p[name] for p in programs})
            for name in first
            if len({p[name] for p in programs}) > 1
        }
        if differ:
            several.append(f"{regime.split()[0]}: {differ}")
    assert not several, "\n".join(several)


def test_only_arguments_that_a_kernel_has_can_vary():
    def kernel(x_ptr, rows):
        pass

    with pytest.raises(ValueError, match=r"kernel has no argument pairs"):
        jit(varying=("rows", "pairs"))(kernel)
