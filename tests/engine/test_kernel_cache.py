"""The list of a configuration's kernel programs on disk, and the process that fills it."""

import json
import sys
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

PROGRAMS = (Program("a", "b", "{}"), Program("a", "c", "{}"))


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


@pytest.mark.parametrize("text", ["", "[", "[1]", "[[1, 2]]", "null"])
def test_a_list_that_cannot_be_read_is_made_anew(cache: KernelCache, text: str):
    cache.file(launched()).write_text(text)
    assert cache.read(launched()) is None


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"^kernel_cache_dir = '.*file': Not a directory; allow"):
        KernelCache(file)


class Fake:
    """Stands for the compilers: compiles nothing."""

    failed: list[str]

    def __init__(self, arch: str, directory: Path, num_processes: int, told) -> None:
        assert arch == "sm_90" and num_processes >= 1
        self._told = told

    def add(self, program: Program) -> None:
        self._told(program.kernel)

    def finish(self) -> list[str]:
        return self.failed


@pytest.mark.parametrize("failed", [[], ["b: cannot be"]])
def test_only_a_whole_list_is_kept(
    cache: KernelCache, failed: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Fake, "failed", failed, raising=False)
    monkeypatch.setattr(kernels, "Compilers", Fake)
    monkeypatch.setattr(kernels, "find_programs", lambda launched, found: [*map(found, PROGRAMS)])
    told: list[tuple[int, str]] = []
    assert compile_all(cache, launched(), lambda *what: told.append(what)) == failed
    assert told == [(1, "b"), (2, "c")]
    assert cache.read(launched()) == (None if failed else PROGRAMS)


def process(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """What runs in place of the one that compiles. It is handed what is launched."""
    code = f"import json, pickle, sys; pickle.load(sys.stdin.buffer); {code}"
    monkeypatch.setattr(kernels, "COMMAND", (sys.executable, "-c", code))


def test_a_start_that_finds_its_list_starts_no_process(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernels, "COMMAND", ("no such program",))
    cache.write(launched(), PROGRAMS)
    compiling = Compiling(cache, launched())
    assert compiling.finish(False) == Compiled(PROGRAMS, known=True)
    compiling.cancel()


def test_a_start_waits_for_the_process_that_fills_the_list(
    cache: KernelCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    told = [{"known": 1, "compiled": "b"}, {"known": 2, "compiled": "c"}, {"failed": []}]
    file = str(cache.file(launched()))
    lines = "\n".join(map(json.dumps, told))
    process(monkeypatch, f"open({file!r}, 'w').write({json.dumps(PROGRAMS)!r}); print({lines!r})")
    assert Compiling(cache, launched()).finish(True) == Compiled(PROGRAMS, known=False)
    assert "compiling: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print(json.dumps({'failed': ['b: cannot be', 'c: nor']}))", "2 kernels.*: b: cannot be"),
        ("sys.exit(1)", "the process that compiles them ended"),
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
    process(monkeypatch, "sys.stdout.write('x'); sys.stdout.flush(); input()")
    compiling = Compiling(cache, launched())
    compiling.cancel()
    assert compiling._process is not None and compiling._process.returncode is not None
