"""The fuzzer's targets over their seeds and a few mutations; the long run is by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "recipes" / "fuzz_server.py"
NAMES = "bodies nesting heads link output configs safetensors hosts".split()


@pytest.fixture(scope="module")
def fuzz_server():
    spec = importlib.util.spec_from_file_location("fuzz_server", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_strange_bytes(fuzz_server, tmp_path: Path, name: str):
    assert list(fuzz_server.KINDS) == NAMES
    assert fuzz_server.fuzz(name, 0.3, 1, tmp_path) > 5


def test_what_coverage_watches_exists(fuzz_server):
    """The long run imports these by name, which no other test does."""
    assert all(importlib.util.find_spec(name) for name in fuzz_server.WATCHED)
