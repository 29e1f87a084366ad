"""Every code block of README.md does what it shows.

A ``text`` block is what the ``python`` block before it prints, and lines without a ``$`` in a
``console`` block are what the command before them prints, with the bundled pair on a CPU. After a
new pair:

    EAGLERUN_WRITE_README=1 python -m pytest tests/server/test_readme.py

writes what is printed now in their place; look at it with git diff.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from served import Server

from eaglerun.server import cli
from eaglerun.server.flags import parse_flags

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
HERE = Path(__file__).resolve().relative_to(ROOT)
WRITE = "EAGLERUN_WRITE_README"
URL = "http://127.0.0.1:8000"
# Nothing here depends on a GPU, or on how often the engine tells of itself.
SETTINGS = {"EAGLERUN_DEVICE": "cpu", "EAGLERUN_LOG_STATS_EVERY": "0"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the number of its first line, and its text."""

    language: str
    line: int
    text: str


def blocks() -> list[Block]:
    lines = README.read_text().splitlines(keepends=True)
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    found = []
    for start, end in zip(fences[::2], fences[1::2], strict=True):
        text = "".join(lines[start + 1 : end])
        found.append(Block(lines[start][3:].strip(), start + 2, text))
    return found


BLOCKS = blocks()


def numbered(language: str) -> list[object]:
    """The numbers of the blocks of a language, named by their lines for pytest."""
    return [
        pytest.param(number, id=f"line {block.line}")
        for number, block in enumerate(BLOCKS)
        if block.language == language
    ]


def commands(block: Block) -> list[str]:
    """The commands of a shell block, each whole, without comments."""
    joined = block.text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch):
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The demo pair behind a server that this file's blocks share."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eaglerun", "serve", "--http-port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | SETTINGS,
    )
    server = Server(process)
    try:
        yield server.wait_until_ready()
    finally:
        process.terminate()
        process.wait()
        server.reader.join()


def check_output(number: int, printed: str) -> None:
    """Compare with the block of that number, or write it there."""
    block = BLOCKS[number]
    if printed == block.text:
        return
    if not os.environ.get(WRITE):
        raise AssertionError(
            f"README.md from line {block.line} on shows\n{block.text}\nand now comes\n{printed}\n"
            f"If that is right: {WRITE}=1 python -m pytest {HERE} writes it there."
        )
    # Lines may have moved since BLOCKS was read.
    lines = README.read_text().splitlines(keepends=True)
    start = blocks()[number].line - 1
    end = start + block.text.count("\n")
    README.write_text("".join([*lines[:start], printed, *lines[end:]]))


def test_every_block_is_run():
    """A language that no test below knows would be shown and never run."""
    assert {block.language for block in BLOCKS} == {"sh", "python", "text", "console"}
    for before, block in zip(BLOCKS, BLOCKS[1:], strict=False):
        assert block.language != "text" or before.language == "python"
    # The one indented line is a formula, no code.
    indented = re.findall(r"(?m)^    \S.*", re.sub(r"(?ms)^```.*?^```", "", README.read_text()))
    assert indented == [
        "    tokens emitted = prefill samples + decode rows + accepted drafts - trimmed"
    ]


@pytest.mark.parametrize("number", numbered("python"))
def test_python(number: int, url: str):
    printed = io.StringIO()
    code = BLOCKS[number].text.replace(URL, url)
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"README.md:{BLOCKS[number].line}", "exec"), {"__name__": "__main__"})
    assert BLOCKS[number + 1].language == "text", "what the block prints is not shown"
    check_output(number + 1, printed.getvalue())


@pytest.mark.parametrize("number", numbered("console"))
def test_console(number: int):
    printed = io.StringIO()
    for line in BLOCKS[number].text.splitlines():
        if line.startswith("$ "):
            printed.write(f"{line}\n")
            program, *argv = shlex.split(line[2:])
            assert program == "eaglerun"
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                assert cli.main(argv) == 0
    check_output(number, printed.getvalue())


@pytest.mark.parametrize("number", numbered("sh"))
def test_shell(number: int, url: str, tmp_path: Path):
    """curl runs; make tells what it would do; a command line is parsed, for MODEL is no model."""
    for command in commands(BLOCKS[number]):
        program, *argv = shlex.split(command, comments=True)
        match program:
            case "curl":
                check_curl(command.replace(URL, url), tmp_path)
            case "make":
                done = subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True)
                assert done.returncode == 0, done.stderr
            case "eaglerun":
                # Raises ConfigError for a command or a flag that is none.
                parse_flags(cli._parser(argv), argv)
            case _:
                raise AssertionError(f"README.md shows {command}, which nothing here runs")


def test_commands_in_the_text():
    shown = re.findall(r"`eaglerun ([^`\n]+)`", README.read_text())
    assert shown
    for line in shown:
        argv = [word for word in shlex.split(line) if word != "--help"]
        parse_flags(cli._parser(argv), argv)


# Stands behind the real one in PATH, for machines that have none.
CURL = f"""#!{sys.executable}
import sys, urllib.request
url, *flags = sys.argv[1:]
given = list(zip(flags[::2], flags[1::2], strict=True))
assert {{flag for flag, _ in given}} == {{"-H", "-d"}}, flags
headers = dict(value.split(": ") for flag, value in given if flag == "-H")
data = dict(given)["-d"].encode()
with urllib.request.urlopen(urllib.request.Request(url, data, headers)) as answer:
    sys.stdout.write(answer.read().decode())
"""


def check_curl(command: str, folder: Path) -> None:
    curl = folder / "curl"
    curl.write_text(CURL)
    curl.chmod(0o755)
    path = f"{os.environ['PATH']}{os.pathsep}{folder}"
    done = subprocess.run(
        command,
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert '"delta"' in done.stdout and done.stdout.rstrip().endswith("data: [DONE]")
    assert '"error"' not in done.stdout
