"""The watch on Triton's compiler tells each kernel, and leaves the compiler as it was."""

from types import SimpleNamespace

import pytest

from eaglerun.kernels.compiling import watching_compiler
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
