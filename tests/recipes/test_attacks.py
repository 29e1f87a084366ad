"""The attacks of the recipe in a short form: every one is held. The rest run in the long suite."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "attack_server.py"
QUICK = "heads disconnects".split()
LONG = (
    "slow_heads names bodies preparation admission caches echoes templates not_finite unread_log "
    "overload"
).split()


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]
)
def test_an_attack_is_held(name: str):
    command = [sys.executable, str(SCRIPT), "--short", "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_attack_is_here():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True)
    assert all(name in done.stdout for name in (*QUICK, *LONG))
    choices = done.stdout.split("--only {")[1].split("}")[0].replace("\n", "").split(",")
    assert sorted(choice.strip() for choice in choices) == sorted((*QUICK, *LONG))
