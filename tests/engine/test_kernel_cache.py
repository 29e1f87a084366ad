"""The list of a configuration's kernel programs on disk, and the process that fills it."""

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import tiny_pair

from eaglerun.config import resolve
from eaglerun.errors import ConfigError
from eaglerun.kernels.ahead import Program
from eaglerun.ranks import kernels
from eaglerun.ranks.kernels import Compiled, Compiling, KernelCache, compile_all
from eaglerun.ranks.local import launched_by
from eaglerun.run.programs import Launched

PROGRAMS = (Program("eaglerun.kernels.a", "b", "{}"), Program("eaglerun.kernels.a", "c", "{}"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KernelCache:
    # It is the whole process's.
    monkeypatch.setattr(kernels, "use_cache_directory", lambda directory: None)
    return KernelCache(tmp_path)


def launched(**settings: object) -> Launched:
    models = tiny_pair()
    assert models.draft is not None
    config = resolve({"draft": "tiny", "max_model_len": 64, **settings}, environ={})
    specs = (models.target.spec, models.draft.spec)
    return launched_by(config, *specs, torch.bfloat16, "sm_90")


def test_a_list_is_found_by_all_that_chooses_kernels(cache: KernelCache):
    own = launched()
    assert cache.read(own) is None
    cache.check_writable()
    cache.write(own, PROGRAMS)
    assert cache.read(launched()) == PROGRAMS
    others = [
        launched(max_num_seqs=3),
        launched(overlap_kernels=False),
        replace(own, arch="gfx942"),
        replace(own, dtype=torch.float16),
        replace(own, draft=None),
    ]
    assert all(cache.read(other) is None for other in others)
    assert len({cache.file(other) for other in (own, *others)}) == 6
    assert cache.num_bytes() > 0 and cache.file(own).parent.parent == cache.directory


NOT_OURS = ['[["os", "b", "{}"]]', '[["eaglerun.kernels.a", "b", 1]]']


@pytest.mark.parametrize("text", ["", "[", "[1]", "[[1, 2]]", "null", "[]", "{}", *NOT_OURS])
def test_a_list_that_is_none_of_our_kernels_is_made_anew(cache: KernelCache, text: str):
    cache.check_writable()
    cache.file(launched()).write_text(text)
    assert cache.read(launched()) is None


def test_a_directory_that_cannot_be_written_is_refused_where_something_must_be_compiled(
    cache: KernelCache, tmp_path: Path
):
    file = tmp_path / "file"
    file.touch()
    message = r"^kernel_cache_dir = '.*file': Not a directory; allowed a directory that can be w"
    with pytest.raises(ConfigError, match=message):
        Compiling(KernelCache(file), launched())
    # One that an earlier start has filled is only read.
    cache.check_writable()
    cache.write(launched(), PROGRAMS)
    cache.check_writable = cache.write = None
    assert Compiling(cache, launched()).finish(False) == Compiled(PROGRAMS, num_new=0)


class Fake:
    """Stands for the compilers: compiles nothing."""

    failed: list[str]

    def __init__(
        self,
        arch: str,
        directory: Path,
        num_processes: int,
        told: Callable[[str, bool], None],
    ) -> None:
        assert arch == "sm_90" and num_processes >= 1
        self._told = told

    def add(self, program: Program) -> None:
        self._told(program.kernel, program.kernel == "b")

    def finish(self) -> list[str]:
        return self.failed


@pytest.mark.parametrize("failed", [[], ["b: cannot be"]])
def test_only_a_whole_list_is_kept(
    cache: KernelCache, failed: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Fake, "failed", failed, raising=False)
    monkeypatch.setattr(kernels, "Compilers", Fake)
    monkeypatch.setattr(kernels, "find_programs", lambda launched, found: [*map(found, PROGRAMS)])
    told: list[tuple[int, str, bool]] = []
    assert compile_all(cache, launched(), lambda *what: told.append(what)) == failed
    assert told == [(1, "b", True), (2, "c", False)]
    assert cache.read(launched()) == (None if failed else PROGRAMS)


def process(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Code runs in place of the process that compiles, after it has read what is launched."""
    code = f"import json, pickle, sys; pickle.load(sys.stdin.buffer); {code}"
    monkeypatch.setattr(kernels, "COMMAND", (sys.executable, "-c", code))


def test_a_start_that_finds_its_list_starts_no_process(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "COMMAND", ("no such program",))
    cache.check_writable()
    cache.write(launched(), PROGRAMS)
    compiling = Compiling(cache, launched())
    assert compiling.finish(False) == Compiled(PROGRAMS, num_new=0)
    compiling.cancel()


def test_a_start_waits_for_the_process_that_fills_the_list(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    told = [
        {"known": 1, "done": "b", "is_new": True},
        {"known": 2, "done": "c", "is_new": False},
        {"failed": []},
    ]
    file = str(cache.file(launched()))
    lines = "\n".join(map(json.dumps, told))
    process(monkeypatch, f"open({file!r}, 'w').write({json.dumps(PROGRAMS)!r}); print({lines!r})")
    assert Compiling(cache, launched()).finish(True) == Compiled(PROGRAMS, num_new=1)
    assert "compiling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(json.dumps({'failed': ['b: cannot be', 'c: nor']}))", "2 kernels.*: b: cannot be"),
        ("sys.exit(1)", "the process that compiles it ended"),
    ],
)
def test_kernels_that_do_not_compile_are_told_before_ready(
    code: str, words: str, cache: KernelCache, monkeypatch: pytest.MonkeyPatch
):
    process(monkeypatch, code)
    with pytest.raises(ConfigError, match=f"^warmup: .*{words}.*warmup = 'none'"):
        Compiling(cache, launched()).finish(False)


def test_a_process_that_is_no_longer_wanted_is_ended(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
):
    process(monkeypatch, "import signal; signal.pause()")
    compiling = Compiling(cache, launched())
    compiling.cancel()
    assert compiling._process is not None
    assert compiling._process.returncode == -signal.SIGKILL


def test_a_process_that_ends_at_once_is_told_and_no_broken_pipe(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "COMMAND", ("/bin/true",))
    for _ in range(5):
        with pytest.raises(ConfigError, match="the process that compiles it ended"):
            Compiling(cache, launched()).finish(False)
