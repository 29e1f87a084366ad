"""The kernel programs that are compiled before a server is ready are all that its steps launch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine.unforeseen import SETTINGS

SCRIPT = Path(__file__).parent / "unforeseen.py"
LONG = [pytest.param(name, marks=pytest.mark.long) for name in SETTINGS if name != "short"]


@pytest.mark.parametrize("name", ["short", *LONG])
def test_random_steps_launch_no_program_that_was_not_foreseen(name: str):
    """At MiniMax-M3's widths, for sm_90, on no device; a process of its own, for it launches
    nothing any more."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), name, "1", "40" if name == "short" else "200"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    foreseen, others = json.loads(done.stdout)
    assert foreseen > 50 and others == []
