"""A command line whose device hangs: it says so, and ends although the interpreter cannot."""

import subprocess
import sys

import pytest

from eaglerun.server.hung import RANK_FAILED

LIMIT_S = 60
# The commands' own work needs models; what follows it is what counts here.
PROGRAM = """
import atexit, sys, threading
from eaglerun.errors import RankFailed
from eaglerun.server import cli, prompt_commands

def work(config, flags):
    print("what there was")
    atexit.register(threading.Event().wait)
    raise RankFailed("step 5 is not done after 300 s: the device hangs")

prompt_commands.generate = prompt_commands.chat = cli._measure = work
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "command",
    [
        ["generate"],
        ["chat"],
        pytest.param(["eval"], marks=pytest.mark.long),
        pytest.param(["bench", "latency"], marks=pytest.mark.long),
        pytest.param(["lossless"], marks=pytest.mark.long),
    ],
    ids=lambda command: command[0],
)
def test_a_command_line_whose_device_hangs_ends(command: list[str]):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *command], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert (done.returncode, done.stdout) == (RANK_FAILED, "what there was\n")
    assert done.stderr.endswith("eaglerun: step 5 is not done after 300 s: the device hangs\n")
