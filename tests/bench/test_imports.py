"""A machine that only measures needs no web server's packages; jinja2 comes with torch."""

import subprocess
import sys

ABSENT = (
    "fastapi",
    "pydantic",
    "msgspec",
    "zmq",
    "orjson",
    "uvicorn",
    "prometheus_client",
)
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT}))
from eaglerun.server import cli
from eaglerun.bench import caches
sys.exit(cli.main(["bench", "kernels", "--only=x", "--device=cpu"]))
"""


def test_bench_runs_without_the_packages_of_a_server():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    # It gets as far as looking for a GPU.
    assert done.returncode in (0, 2) and "ModuleNotFoundError" not in done.stderr, done.stderr
    assert "kernels: begun" in done.stderr
