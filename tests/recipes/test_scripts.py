"""The recipes' scripts name commands, flags and presets that exist."""

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from eaglerun.bench import lossless
from eaglerun.bench.commands import PARTS
from eaglerun.server.cli import _parser
from eaglerun.server.flags import config_of, parse_flags

ROOT = Path(__file__).parents[2]


def commands(
    directory: Path, *parts: str, script: str = "m3-8l-h200", flags: str = "--num-steps 4"
) -> list[list[str]]:
    """What a script would run."""
    argv = ["bash", str(ROOT / "recipes" / f"{script}.sh"), str(directory), *parts]
    env = {"PATH": os.environ["PATH"], "EAGLERUN": "echo", "FLAGS": flags}
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("bench ", "lossless "))]
    return [shlex.split(line) for line in lines]


def test_every_command_of_the_h200_script_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    found = commands(tmp_path)
    measured = set()
    presets = []
    for argv in found:
        flags = parse_flags(_parser(argv), argv)
        config, preset = config_of(flags)
        measured |= set(flags.PARTS)
        presets.append(preset)
        assert flags.num_steps == 4 and flags.out.parent == tmp_path
        for path in (config.model.model, config.model.draft):
            assert preset is None or (ROOT / str(path) / "config.json").is_file()
    # What fp8 caches cost in accuracy is asked of the demo pair, which has something to lose.
    assert set(PARTS) - measured == {"caches"}
    assert presets == ["m3-8l-h200", "m3-8l-h200-mha", "m3-8l-h200", None, "m3-8l-h200"]
    assert (tmp_path / "run.log").is_file() and (tmp_path / "tables.md").is_file()


def test_parts_are_chosen_by_name(tmp_path: Path):
    apart, kernels = commands(tmp_path, "apart", "kernels")
    flags = parse_flags(_parser(apart), apart)
    assert not config_of(flags)[0].scheduling.overlap_kernels
    assert kernels[:2] == ["bench", "kernels"]
    for script in ("m3-8l-h200", "lossless-h200"):
        (argv,) = commands(tmp_path, "invariant", script=script, flags="")
        assert config_of(parse_flags(_parser(argv), argv))[0].scheduling.batch_invariant


def test_the_lossless_script_compares_as_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    checked = []
    for argv in commands(tmp_path, script="lossless-h200", flags=""):
        flags = parse_flags(_parser(argv), argv)
        config, _ = config_of(flags)
        options = lossless.options_of(config, flags)
        most = max(options.num_drafts)
        # What the check will ask of the engine is allowed.
        speculation = replace(
            config.speculation, num_draft_tokens=most, synthetic_acceptance_length=None
        )
        replace(config, speculation=speculation)
        checked.append((config.model.dtype, options.num_prompts, sorted(options.num_drafts)))
    assert checked == [("auto", 64, [0, 1, 3, 7]), ("float32", 1000, list(range(8)))]
    assert (tmp_path / "run.log").is_file()
