"""Kernels before they are asked for: which programs launches need, compiled by other processes, and
brought onto the device.

A program is a kernel for one set of constants, argument types and alignments: what Triton compiles
once, and otherwise in the middle of a launch. Recording and compiling need no GPU. Triton's own
cache on disk holds the results, in files that are keyed by all that goes into them.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eaglerun.kernels.compiling import compiles
from eaglerun.kernels.language import INSTALLED

if INSTALLED:
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction


# More would not compile faster: a few programs take most of the time.
MAX_PROCESSES = 32
ENDED = "the process that compiles it ended"


class Program(NamedTuple):
    """A kernel by the name it is imported by, and what Triton calls its specialization data."""

    module: str
    kernel: str
    data: str


def target_of(arch: str) -> Any:
    """Triton's target for a row of the launch table: sm_90, gfx942, gfx950."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


class _NoDevice:
    """A Triton driver, as far as choosing and compiling a program asks for one."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


def choose_target(arch: str) -> None:
    """Compile for ``arch`` from here on, whatever devices there are; this process can launch
    nothing any more."""
    driver.set_active(_NoDevice(target_of(arch)))


class _Placed:
    """A tensor without memory, at the address that it would have in memory that begins at 0."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


def _placed(value: Any) -> Any:
    return _Placed(value) if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def recording(arch: str, found: Callable[[Program], None]) -> Iterator[None]:
    """Launch nothing while entered; ``found`` hears of each program that launches on meta tensors
    would need on ``arch``, once.

    For a process of its own: it can launch nothing any more.
    """

    def note(*, key: Any, fn: Any, compile: Any, **about: Any) -> bool:
        name = fn.jit_function.fn.__qualname__
        found(Program(fn.module, name, compile["specialization_data"]))
        # Known from here on: Triton asks only once for each.
        fn.jit_function.device_caches[0][0][key] = object()
        # Neither compile nor launch it.
        return True

    run = JITFunction.run

    def choose(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        run(kernel, *map(_placed, args), grid=grid, warmup=True, **kwargs)

    before = triton.knobs.runtime.jit_cache_hook
    choose_target(arch)
    triton.knobs.runtime.jit_cache_hook = note
    JITFunction.run = choose
    try:
        yield
    finally:
        JITFunction.run = run
        triton.knobs.runtime.jit_cache_hook = before


class Compilers:
    """Processes that compile programs into Triton's cache in ``directory``, each one at a time;
    what is there already is only looked up."""

    def __init__(
        self, arch: str, directory: Path, num_processes: int, told: Callable[[str, bool], None]
    ) -> None:
        """``told`` hears each kernel's name as it is done, and whether it was not there before."""
        self._arch = arch
        self._directory = directory
        self._told = told
        self._waiting: queue.SimpleQueue[Program | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._failed: list[str] = []
        self._threads = [threading.Thread(target=self._serve) for _ in range(num_processes)]
        for thread in self._threads:
            thread.start()

    def add(self, program: Program) -> None:
        self._waiting.put(program)

    def finish(self) -> list[str]:
        """Wait for all. Returns what did not compile, a line each."""
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        while not self._waiting.empty():
            if (program := self._waiting.get()) is not None:
                self._failed.append(f"{program.kernel}: no compiler is left")
        return self._failed

    def _serve(self) -> None:
        with _compiler(self._arch, self._directory) as process:
            assert process.stdin is not None and process.stdout is not None
            while (program := self._waiting.get()) is not None:
                answer = ""
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(program) + "\n")
                    process.stdin.flush()
                    answer = process.stdout.readline()
                error, is_new = json.loads(answer) if answer else (ENDED, False)
                with self._lock:
                    if error:
                        self._failed.append(f"{program.kernel}: {error}")
                    self._told(program.kernel, is_new)
                if not answer:
                    return


@contextlib.contextmanager
def _compiler(arch: str, directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process of _main. It must see no GPU, of which it would take memory."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "eaglerun.kernels.ahead", arch],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=compiler_environment(directory),
    )
    try:
        yield process
    finally:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        process.stdout.close()


def compiler_environment(directory: Path | None = None) -> dict[str, str]:
    """The environment of a process that compiles, into ``directory`` where one is given."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Imports find what they find here, and one compiler is one thread.
    kept |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    kept |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    if directory is not None:
        kept["TRITON_CACHE_DIR"] = str(directory)
    return kept


def _kernel_of(program: Program) -> Any:
    return getattr(importlib.import_module(program.module), program.kernel)


def load_programs(programs: Sequence[Program], told: Callable[[str], None]) -> None:
    """Bring all onto the current device, where launches then find them: from Triton's cache, or
    compiled here where that has lost one."""
    made = [_kernel_of(program).preload(program.data) for program in programs]
    # The code that hands a launch's arguments over is C, compiled for each kind of signature unless
    # the cache has it.
    with ThreadPoolExecutor(num_processors()) as pool:
        for _ in pool.map(lambda m: driver.active.launcher_cls(m.src, m.metadata), made):
            pass
    for program, kernel in zip(programs, made, strict=True):
        # Triton would do it at the first launch.
        kernel._init_handles()
        told(program.kernel)


def num_processors() -> int:
    """Those that this process may use, at most MAX_PROCESSES."""
    return min(len(os.sched_getaffinity(0)), MAX_PROCESSES)


def cache_directory() -> Path:
    """Triton's cache on disk."""
    return Path(triton.knobs.cache.dir)


def cache_settings() -> str:
    """The variables that Triton's cache is keyed by, beside sources and launches."""
    return repr(sorted(get_cache_invalidating_env_vars().items()))


def use_cache_directory(directory: Path) -> None:
    triton.knobs.cache.dir = str(directory)


def _main(arch: str) -> None:
    """Compile each program that comes in, a line of JSON; answer what went wrong, or null, and
    whether it was compiled and not found."""
    # Triton and ptxas may print; the answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    choose_target(arch)
    for line in sys.stdin:
        program = Program(*json.loads(line))
        error, before = None, compiles().num_compiled
        try:
            _kernel_of(program).preload(program.data)
        except Exception as failure:  # told to the start that asked, which ends with it
            error = f"{type(failure).__name__}: {str(failure).strip().splitlines()[-1:]}"
        is_new = compiles().num_compiled > before
        answers.write(json.dumps((error, is_new)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main(sys.argv[1])
