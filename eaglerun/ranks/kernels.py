"""A rank's kernels, all of them, before its first step: listed and compiled by processes of their
own while the weights are loaded, kept on disk, and brought onto the device.

The list of a configuration's programs lies beside Triton's cache, in eaglerun/NAME.json, where NAME
stands for the version of eaglerun, to the byte, and of Triton and torch, the device, and all
settings that choose kernels. A start that finds its list there reads it and compiles nothing.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eaglerun.config import Config
from eaglerun.errors import ConfigError
from eaglerun.kernels.ahead import (
    Compilers,
    Program,
    cache_directory,
    compiler_environment,
    load_programs,
    use_cache_directory,
)
from eaglerun.progress import steps_bar
from eaglerun.run.programs import Launched, find_programs

# The process that finds a configuration's programs and has them compiled.
COMMAND = (sys.executable, "-m", "eaglerun.ranks.kernels")
# More would not compile faster: a few programs take most of the time.
MAX_PROCESSES = 32


@dataclass(frozen=True, slots=True)
class Compiled:
    """``known``: all was compiled by an earlier start."""

    programs: tuple[Program, ...]
    known: bool


class KernelCache:
    """The programs of configurations, in a directory that survives restarts."""

    def __init__(self, directory: Path | None) -> None:
        """``directory`` None: Triton's own; another becomes it, for this process.

        Raises  ConfigError where it cannot be written.
        """
        own = cache_directory()
        self.directory = own if directory is None else directory.expanduser().absolute()
        self._lists = self.directory / "eaglerun"
        try:
            self._lists.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._lists):
                pass
        except OSError as error:
            raise ConfigError(
                f"kernel_cache_dir = {str(self.directory)!r}: {error.strerror}; allowed a "
                "directory that can be written"
            ) from None
        if self.directory != own:
            use_cache_directory(self.directory)

    @classmethod
    def of(cls, config: Config) -> "KernelCache":
        directory = config.scheduling.kernel_cache_dir
        return cls(None if directory is None else Path(directory))

    def file(self, launched: Launched) -> Path:
        name = hashlib.sha256(f"{_versions()} {launched!r}".encode()).hexdigest()[:24]
        return self._lists / f"{name}.json"

    def read(self, launched: Launched) -> tuple[Program, ...] | None:
        """The list of a configuration; None where it is not there, or cannot be read."""
        try:
            told = json.loads(self.file(launched).read_text())
            return tuple(Program(*map(str, program)) for program in told)
        except (OSError, ValueError, TypeError):
            return None

    def write(self, launched: Launched, programs: tuple[Program, ...]) -> None:
        file = self.file(launched)
        half = file.with_suffix(f".{os.getpid()}")
        half.write_text(json.dumps(programs))
        half.replace(file)

    def num_bytes(self) -> int:
        """Of all that lies in the directory."""
        sizes = 0
        for folder, _, names in os.walk(self.directory):
            for name in names:
                with contextlib.suppress(OSError):
                    sizes += os.stat(os.path.join(folder, name)).st_size
        return sizes


class Compiling:
    """A configuration's programs on their way: begun at once, waited for by finish().

    Where the cache has no list of them, another process makes it and compiles them all.
    """

    def __init__(self, cache: KernelCache, launched: Launched) -> None:
        self.cache = cache
        self._launched = launched
        self._found = cache.read(launched)
        self._process: subprocess.Popen[bytes] | None = None
        if self._found is None:
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=compiler_environment(cache.directory),
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin, contextlib.suppress(BrokenPipeError):
                pickle.dump(launched, stdin)

    def finish(self, progress: bool | None) -> Compiled:
        """Wait for all. ConfigError where a kernel does not compile."""
        if self._found is not None:
            return Compiled(self._found, known=True)
        assert self._process is not None and self._process.stdout is not None
        failed: list[str] = ["the process that compiles them ended"]
        with self._process.stdout as stdout, steps_bar(progress, "compiling", "kernels") as bar:
            for line in stdout:
                match json.loads(line):
                    case {"known": known, "compiled": name}:
                        bar.total = known
                        bar.set_postfix_str(name, refresh=False)
                        bar.update()
                    case {"failed": failed}:
                        pass
        self._process.wait()
        found = self.cache.read(self._launched)
        if failed or found is None:
            told = "; ".join(failed[:3])
            raise ConfigError(
                f"warmup: {len(failed)} kernels do not compile: {told}; with warmup = 'none' they "
                "are compiled where a step needs them"
            )
        return Compiled(found, known=False)

    def cancel(self) -> None:
        """Compile no further; the weights could not be loaded."""
        if self._process is not None:
            with self._process as process:
                process.kill()


def load_all(programs: tuple[Program, ...], progress: bool | None) -> None:
    """Bring the programs onto the current device."""
    with steps_bar(progress, "loading", "kernels", len(programs)) as bar:

        def told(name: str) -> None:
            bar.set_postfix_str(name, refresh=False)
            bar.update()

        load_programs(programs, told)


def compile_all(
    cache: KernelCache, launched: Launched, told: Callable[[int, str], None]
) -> list[str]:
    """Find and compile all programs, and note their list; what did not compile, a line each. For a
    process of its own: it can launch nothing afterwards.

    ``told`` hears of each that is compiled: how many are known by then, and its kernel's name.
    """
    programs: list[Program] = []
    count = min(os.cpu_count() or 1, MAX_PROCESSES)
    compilers = Compilers(
        launched.arch, cache.directory, count, lambda name: told(len(programs), name)
    )

    def found(program: Program) -> None:
        programs.append(program)
        compilers.add(program)

    try:
        find_programs(launched, found)
    finally:
        failed = compilers.finish()
    if not failed:
        cache.write(launched, tuple(programs))
    return failed


@functools.cache
def _versions() -> str:
    """What a list depends on besides its configuration."""
    spec = importlib.util.find_spec("eaglerun")
    assert spec is not None and spec.submodule_search_locations is not None
    digest = hashlib.sha256()
    for package in ("eaglerun", "eaglerun.kernels"):
        found = importlib.util.find_spec(package)
        assert found is not None and found.submodule_search_locations is not None
        for folder in found.submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    triton = importlib.metadata.version("triton")
    return f"{digest.hexdigest()} triton {triton} torch {torch.__version__}"


def _main() -> None:
    launched = pickle.load(sys.stdin.buffer)
    # What others print goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    failed = compile_all(
        KernelCache(None), launched, lambda known, name: tell(known=known, compiled=name)
    )
    tell(failed=failed)


if __name__ == "__main__":
    _main()
