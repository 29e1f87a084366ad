"""eaglerun warm where there is no GPU: what is refused, and what the cache tells."""

from pathlib import Path

import pytest
import torch

from eaglerun.kernels.language import INSTALLED
from eaglerun.ranks import kernels
from eaglerun.server import cli, warm_command

pytestmark = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # It is the whole process's.
    monkeypatch.setattr(kernels, "use_cache_directory", lambda directory: None)
    return f"--kernel-cache-dir={tmp_path}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "arch: there is no GPU here; allowed sm_90, gfx942"),
        (["--arch=sm_80"], "arch = 'sm_80': allowed sm_90, gfx942"),
    ],
)
def test_without_a_known_architecture_it_is_refused(
    arguments: list[str],
    words: str,
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(warm_command, "choose_device", lambda wish: torch.device("cpu"))
    assert cli.main(["warm", cache, *arguments]) == cli.REFUSED
    assert words in capsys.readouterr().err


def test_a_second_time_nothing_is_compiled(
    cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def compile_all(cache, launched, told):
        told(1, "b", True)
        cache.check_writable()
        cache.write(launched, (kernels.Program("eaglerun.kernels.a", "b", "{}"),))
        return []

    monkeypatch.setattr(warm_command, "compile_all", compile_all)
    arguments = ["warm", cache, "--arch=gfx950", "--max-num-seqs=3"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("1 kernels for gfx950 compiled in ")
    monkeypatch.setattr(warm_command, "compile_all", None)
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("1 kernels for gfx950 were compiled before in ")


def test_kernels_that_do_not_compile_are_told(
    cache: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(warm_command, "compile_all", lambda cache, launched, told: ["b: cannot be"])
    assert cli.main(["warm", cache, "--arch=sm_90"]) == cli.REFUSED
    assert "1 kernels do not compile: b: cannot be" in capsys.readouterr().err
