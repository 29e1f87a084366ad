"""Watching Triton compile: what takes the time of a first start."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from eaglerun.kernels.language import INSTALLED

if INSTALLED:
    import triton


@contextlib.contextmanager
def watching_compiler(seen: Callable[[str], None]) -> Iterator[None]:
    """Call ``seen`` with a kernel's name each time one was compiled, or found in Triton's cache."""
    if not INSTALLED:
        yield
        return
    before = triton.knobs.compilation.listener

    def listen(*, src: Any, **about: Any) -> None:
        seen(src.name)
        if before is not None:
            before(src=src, **about)

    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        triton.knobs.compilation.listener = before
