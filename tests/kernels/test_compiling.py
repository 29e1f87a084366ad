"""The watch on Triton's compiler tells each kernel, and leaves the compiler as it was."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from eaglerun.kernels.compiling import Compiles, compiles, watching_compiler
from eaglerun.kernels.language import INSTALLED


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_kernels_are_told_and_others_still_listen(monkeypatch):
    import triton

    others, seen = [], []
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda src, **about: others.append(about)
    )
    before = triton.knobs.compilation.listener
    with watching_compiler(seen.append):
        triton.knobs.compilation.listener(src=SimpleNamespace(name="rope"), cache_hit=False)
    assert seen == ["rope"] and others == [{"cache_hit": False}]
    assert triton.knobs.compilation.listener is before


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_kernels_compiled_and_kernels_found_are_counted_apart(monkeypatch):
    import triton

    others, seen, counts = [], [], Compiles()
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **about: others.append(about))

    def made(microseconds: int, cache_hit: bool) -> None:
        times = SimpleNamespace(total=microseconds)
        triton.knobs.compilation.listener(
            src=SimpleNamespace(name="rope"), times=times, cache_hit=cache_hit
        )

    counts.listen()
    made(1_500_000, cache_hit=False)
    with watching_compiler(seen.append):
        made(500_000, cache_hit=False)
        made(2_000, cache_hit=True)
    assert counts == Compiles(num_compiled=2, compile_s=2.0, num_loaded=1, load_s=0.002)
    assert seen == ["rope", "rope"]
    assert [about["cache_hit"] for about in others] == [False, False, True]
    assert compiles() is compiles(), "one for the process, which listens once"


PROGRAM = """
import triton
from eaglerun.kernels.compiling import Compiles

@triton.jit
def nothing(x_ptr):
    pass

counts = Compiles()
counts.listen()
for _ in range(2):
    source = triton.compiler.ASTSource(nothing, {"x_ptr": "*fp32"}, {})
    triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
assert (counts.num_compiled, counts.num_loaded) == (1, 1), counts
assert counts.compile_s > counts.load_s > 0, counts
"""


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_triton_itself_tells_a_compilation_from_a_kernel_in_its_cache(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environ = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    done = subprocess.run([sys.executable, program], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
