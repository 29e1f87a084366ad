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
import logging
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
    ENDED,
    Compilers,
    Program,
    cache_directory,
    cache_settings,
    compiler_environment,
    load_programs,
    num_processors,
    use_cache_directory,
)
from eaglerun.kernels.compiling import compiles
from eaglerun.progress import steps_bar, tick
from eaglerun.run.programs import Launched, find_programs

log = logging.getLogger("eaglerun")

# The process that finds a configuration's programs and has them compiled.
COMMAND = (sys.executable, "-m", "eaglerun.ranks.kernels")


@dataclass(frozen=True, slots=True)
class Compiled:
    """``num_new``: how many were compiled for this start, and not by an earlier one."""

    programs: tuple[Program, ...]
    num_new: int


class KernelCache:
    """The programs of configurations, in a directory that survives restarts."""

    def __init__(self, directory: Path | None) -> None:
        """``directory`` None: Triton's own; another becomes it, for this process."""
        own = cache_directory()
        self.directory = own if directory is None else directory.expanduser().absolute()
        self._lists = self.directory / "eaglerun"
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
        """The list of a configuration; None where it is not there, or is none of our kernels."""
        try:
            told = json.loads(self.file(launched).read_text())
            programs = tuple(Program(*program) for program in told)
        except (OSError, ValueError, TypeError):
            return None
        ours = all(
            all(isinstance(part, str) for part in program)
            and program.module.startswith("eaglerun.kernels.")
            for program in programs
        )
        return programs if programs and ours else None

    def check_writable(self) -> None:
        """Raises  ConfigError where nothing can be kept in the directory."""
        try:
            self._lists.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._lists):
                pass
        except OSError as error:
            raise ConfigError(
                f"kernel_cache_dir = {str(self.directory)!r}: {error.strerror}; allowed a "
                "directory that can be written"
            ) from None

    def write(self, launched: Launched, programs: tuple[Program, ...]) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self._lists, delete=False) as half:
            json.dump(programs, half)
        Path(half.name).chmod(0o644)
        Path(half.name).replace(self.file(launched))

    def num_bytes(self) -> int:
        """The size of all that lies in the directory."""
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
            cache.check_writable()
            log.info("kernels: compiling them in %d processes", num_processors())
            self._process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=compiler_environment(cache.directory),
            )
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
                pickle.dump(launched, stdin)

    def finish(self, progress: bool | None) -> Compiled:
        """Wait for all. ConfigError where a kernel does not compile."""
        if self._found is not None:
            return Compiled(self._found, num_new=0)
        assert self._process is not None and self._process.stdout is not None
        failed: list[str] = [ENDED]
        num_new = 0
        with self._process.stdout as stdout, steps_bar(progress, "compiling", "kernels") as bar:
            for line in stdout:
                match json.loads(line):
                    case {"known": known, "done": name, "is_new": is_new}:
                        bar.total = known
                        tick(bar, name)
                        num_new += is_new
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
        return Compiled(found, num_new)

    def cancel(self) -> None:
        """Compile no further: there will be no engine."""
        if self._process is not None:
            with self._process as process:
                process.kill()


def load_all(programs: tuple[Program, ...], progress: bool | None) -> None:
    """Bring the programs onto the current device."""
    before = compiles().num_compiled
    with steps_bar(progress, "loading", "kernels", len(programs)) as bar:
        load_programs(programs, lambda name: tick(bar, name))
    if lost := compiles().num_compiled - before:
        log.warning("the kernel cache had lost %d kernels: they were compiled again", lost)


def compile_all(
    cache: KernelCache, launched: Launched, told: Callable[[int, str, bool], None]
) -> list[str]:
    """Find and compile all programs, and note their list; what did not compile, a line each. For a
    process of its own: it can launch nothing afterwards.

    ``told`` hears of each: how many are known by then, its kernel's name, and whether it was not
    compiled before.
    """
    cache.check_writable()
    programs: list[Program] = []
    compilers = Compilers(
        launched.arch,
        cache.directory,
        num_processors(),
        lambda name, is_new: told(len(programs), name, is_new),
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
    """Sources and versions on which a list depends, besides its configuration."""
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
    return f"{digest.hexdigest()} triton {triton} {cache_settings()} torch {torch.__version__}"


def _main() -> None:
    launched = pickle.load(sys.stdin.buffer)
    # Nobody else may write among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    failed = compile_all(
        KernelCache(None),
        launched,
        lambda known, name, is_new: tell(known=known, done=name, is_new=is_new),
    )
    tell(failed=failed)


if __name__ == "__main__":
    _main()
