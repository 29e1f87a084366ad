"""Watching Triton compile: what takes the time of a first start, and of a step that comes first."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(slots=True)
class Compiles:
    """Kernels so far, and the seconds that Triton says they took. ``loaded``: found in its cache
    on disk, and so not compiled. Putting a kernel's code onto the device is in neither time."""

    num_compiled: int = 0
    compile_s: float = 0.0
    num_loaded: int = 0
    load_s: float = 0.0

    def add(self, seconds: float, cache_hit: bool) -> None:
        if cache_hit:
            self.num_loaded += 1
            self.load_s += seconds
        else:
            self.num_compiled += 1
            self.compile_s += seconds

    def listen(self) -> None:
        """Count from here on, beside whoever listens. Triton calls its listener for a kernel that
        this process does not hold yet, and so in no step that launches known ones."""
        if not INSTALLED:
            return
        before = triton.knobs.compilation.listener

        def listen(*, times: Any, cache_hit: bool, **about: Any) -> None:
            self.add(times.total / 1e6, cache_hit)
            if before is not None:
                before(times=times, cache_hit=cache_hit, **about)

        triton.knobs.compilation.listener = listen


_of_process: Compiles | None = None


def compiles() -> Compiles:
    """The counts of this process, which has one Triton. They begin with the first call."""
    global _of_process
    if _of_process is None:
        _of_process = Compiles()
        _of_process.listen()
    return _of_process
