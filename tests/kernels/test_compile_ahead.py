"""Every kernel compiles for each device of the launch table, at M3's shapes, and fits there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eaglerun.kernels.language import INSTALLED
from eaglerun.kernels.launch import TABLE

SHARED_BYTES = {"sm_90": 227 << 10, "gfx942": 64 << 10, "gfx950": 160 << 10}
SCRIPT = Path(__file__).with_name("compile_ahead.py")


# The AMD devices take the same settings: the older is compiled for in the long suite.
DEVICES = [("sm_90", "gfx950"), pytest.param(("gfx942",), marks=pytest.mark.long)]


@pytest.fixture
def compilers(tmp_path_factory, request):
    """One process a device, side by side: this one may have defined the kernels for the
    interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = (str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", ""))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    environment["OMP_NUM_THREADS"] = "1"

    def start(arch):
        cache = str(tmp_path_factory.mktemp(arch))
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), arch],
            env=environment | {"TRITON_CACHE_DIR": cache},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    started = {arch: start(arch) for arch in request.param}
    yield started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.parametrize("compilers", DEVICES, indirect=True)
def test_compiles_and_fits(compilers):
    """One test for two, so that the devices' compilers run side by side."""
    for arch, process in compilers.items():
        out, err = process.communicate()
        assert process.returncode == 0, f"{arch}: {err[-2000:]}"
        programs = [json.loads(line) for line in out.splitlines()]
        assert len(programs) > 55
        too_big = [p for p in programs if p["shared_bytes"] > SHARED_BYTES[arch]]
        assert not too_big, arch
        spilling = [p for p in programs if p["scratch_bytes"]]
        assert not spilling, arch


def test_every_device_is_compiled_for():
    assert set(TABLE) == {"sm_90", "gfx950", "gfx942"}
