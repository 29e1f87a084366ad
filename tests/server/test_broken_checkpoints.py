"""A checkpoint or a file that is not what it should be: exit 2 and one line that names it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served import started, write_checkpoint

from eaglerun.config import resolve
from eaglerun.errors import CheckpointError, ConfigError
from eaglerun.loader import DEMO
from eaglerun.server.chat import load_sampling
from eaglerun.server.cli import main
from eaglerun.server.prepare_jobs import Load
from eaglerun.server.prepare_process import Preparer
from eaglerun.server.serve import check_template_kwargs
from eaglerun.server.settings import Settings

HEADER = b'{"a\\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
HEADER_OF_TWO_LINES = len(HEADER).to_bytes(8, "little") + HEADER
INDEX = "model.safetensors.index.json"


def link_demo(directory: Path) -> Path:
    """The demo target, its files linked; what is written must be unlinked first."""
    for file in (DEMO / "target").iterdir():
        os.link(file, directory / file.name)
    return directory


def write(directory: Path, name: str, content: bytes) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).write_bytes(content)


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = json.loads((directory / name).read_bytes())
        target = found.get("text_config") or found
        target.update(values)
        write(directory, name, json.dumps(found).encode())

    return apply


def put(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: write(directory, name, content)


def alone(content: bytes) -> Callable[[Path], None]:
    """All weights are in one file."""

    def apply(directory: Path) -> None:
        for file in (directory / INDEX, *directory.glob("*.safetensors")):
            file.unlink()
        write(directory, "model.safetensors", content)

    return apply


def renamed(file: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        found = json.loads((directory / INDEX).read_bytes())
        found["weight_map"] = dict.fromkeys(found["weight_map"], file)
        write(directory, INDEX, json.dumps(found).encode())

    return apply


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line with which the command line refuses."""
    code = main(["generate", "--prompt", "x", "--max-tokens", "1", "--device", "cpu", *flags])
    said = [line for line in capsys.readouterr().err.splitlines() if "bundled pair" not in line]
    assert code == 2, said
    [line] = said
    assert line.startswith("eaglerun: ") and len(line) < 4000
    return line


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (put("tokenizer.json", b"{}"), "tokenizer.json is not a tokenizer"),
        (put("tokenizer.json", b"\xff\xfe"), "tokenizer.json is not a tokenizer"),
        (put("config.json", b"[" * 100_000), "nested too deeply"),
        (put("config.json", b"\xff"), "cannot be read as JSON"),
        (put("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"), "cannot be read as JSON"),
        (put("config.json", b'{"model_type": "' + b"x" * 100_000 + b'"}'), "a str of 100000 items"),
        (change("config.json", max_position_embeddings=10**9), "must be at most 16777216"),
        (change("config.json", num_hidden_layers=10**9), "must be at most 4096"),
        (change("config.json", hidden_size=1 << 27), "do not fit this machine"),
        (change("config.json", hidden_size=10**12), "must be at most 268435456"),
        (change("config.json", partial_rotary_factor=1e299), "must be at most 1024"),
        (put(INDEX, b"[" * 100_000), "nested too deeply"),
        (put(INDEX, b"[]"), "no object weight_map"),
        (put(INDEX, b'{"weight_map": {"x": 5}}'), "names no file of the checkpoint"),
        (renamed("../model.safetensors"), "names no file of the checkpoint"),
        (renamed("/etc/passwd"), "names no file of the checkpoint"),
        (renamed("a/../../b.safetensors"), "names no file of the checkpoint"),
        (renamed("none.safetensors"), "are missing"),
        (renamed("a\nb.safetensors"), "names no file of the checkpoint"),
        (
            alone(HEADER_OF_TWO_LINES),
            r"tensor a\nb F32 (0,) belongs to no parameter",
        ),
        (put("model-00002-of-00003.safetensors", b""), "cannot be read as safetensors"),
        (put("model-00002-of-00003.safetensors", b"\xff" * 64), "cannot be read as safetensors"),
        (put("model-00002-of-00003.safetensors", b"\x02\0\0\0\0\0\0\0{}"), "is missing"),
    ],
)
def test_a_broken_checkpoint_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    breaks: Callable[[Path], None],
    words: str,
):
    breaks(link_demo(tmp_path))
    assert words in refused(capsys, "--model", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff", "is not UTF-8"),
        (b"a = " + b"[" * 100_000, "nested too deeply"),
        (b"a = ", "is not TOML"),
    ],
)
def test_a_broken_settings_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
):
    file = tmp_path / "settings.toml"
    file.write_bytes(content)
    assert words in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8"),
        ("chat_template.jinja", b"{% if %}", "the chat template is broken in line 1"),
        ("chat_template.jinja", b"{{" + b"(" * 5000, "the chat template is broken"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is not JSON"),
        ("generation_config.json", b"\xff", "generation_config.json is not UTF-8"),
        ("generation_config.json", b'{"temperature": -1}', "generation_config.json"),
        ("generation_config.json", b'{"top_k": "x"}', "generation_config.json"),
    ],
)
def test_what_the_http_side_reads(tmp_path: Path, name: str, content: bytes, words: str):
    write(write_checkpoint(tmp_path), name, content)
    with pytest.raises(CheckpointError, match=words):
        load_sampling(tmp_path)
        Preparer.load(Load(str(tmp_path), None, Settings(("m",), 1, "0"), 512, 3))


@pytest.mark.parametrize("names", ["messages", "a b", "thinking_mode,tools"])
def test_names_that_are_not_the_templates(names: str):
    server = resolve({"chat_template_kwargs": names}, environ={}).server
    with pytest.raises(ConfigError, match="chat_template_kwargs = .*: expected names"):
        check_template_kwargs(server)


def test_a_server_that_cannot_be_is_one_line(tmp_path: Path):
    write(write_checkpoint(tmp_path), "chat_template.jinja", b"{{" + b"(" * 5000)
    with started(tmp_path) as server:
        assert server.wait_for_end() == 2
        assert server.log[-1].startswith("eaglerun: the chat template is broken")
        assert not any("Traceback" in line for line in server.log)
