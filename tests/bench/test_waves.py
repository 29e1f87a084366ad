"""The wave test against servers of the tests: the real HTTP path, a few tokens."""

import asyncio
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from served import SCRIPT, serving, write_checkpoint

from eaglerun.bench import served as own_server
from eaglerun.bench.http_load import Client
from eaglerun.bench.waves import read_metrics
from eaglerun.errors import ConfigError, EaglerunError
from eaglerun.server import cli
from eaglerun.server.http_partner import ServerError

SMALL = ("--input-len=6", "--output-len=5", "--vocab-size=200", "--max-num-seqs=4")
ONE_AND_TWO = ("--concurrency=1", "--concurrency=2")


def around(monkeypatch: pytest.MonkeyPatch, engine: str, checkpoint: Path) -> None:
    """The server that is started has this engine."""
    engine = f"{engine} --checkpoint {shlex.quote(str(checkpoint))}"
    monkeypatch.setattr(own_server, "SERVE", (sys.executable, str(SCRIPT), engine, "serve"))


@pytest.mark.parametrize("warmup", ["none", "common"])
def test_captures_in_served_steps_are_seen_wave_by_wave(
    warmup: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # What the server is told holds, whatever these variables, which a flag overrules, say.
    monkeypatch.setenv("EAGLERUN_MAX_NUM_SEQS", "1")
    monkeypatch.setenv("EAGLERUN_API_KEY", "secret")
    around(monkeypatch, "tiny_engine.py --captures", write_checkpoint(tmp_path))
    out = tmp_path / "out"
    flags = [*SMALL, "--num-kv-blocks=100", "--log-level=error", f"--out={out}"]
    flags += [f"--warmup={warmup}", "--decode-batch-sizes=1,2,4"]
    assert cli.main(["bench", "waves", *ONE_AND_TWO, *flags]) == 0

    body = json.loads((out / "waves.json").read_text())
    rows = body["rows"]
    waves = [(r["concurrency"], r["wave"], r["num_requests"]) for r in rows]
    assert waves == [
        *((1, "1", 1), (1, "2", 1), (1, "3", 1), (1, "4c", 4)),
        *((2, "1", 2), (2, "2", 2), (2, "3", 2), (2, "4c", 8)),
    ]
    for r in rows:
        assert r["output_tokens"] == 5 * r["num_requests"]
        assert r["out_tok_s"] == pytest.approx(r["output_tokens"] / r["elapsed_s"])
        assert 0 < r["ttft_ms"][0] <= r["ttft_ms"][-1] <= 1e3 * r["elapsed_s"]
        assert r["itl_ms"] is None or 0 <= r["itl_ms"][0] <= r["itl_ms"][-1]
        assert 1 <= r["mean_acceptance_length"] <= 4
        assert (r["builds"]["graphs_captured"] > 0) == (r["builds"]["capture_s"] > 0)
        assert r["builds"]["kernels_compiled"] == r["builds"]["kernels_loaded"] == 0
    captured = [r["builds"]["graphs_captured"] for r in rows]
    if warmup == "none":
        # The first wave of two, and the first of four, have batches that nothing had before.
        assert captured[3] > 0 and sum(captured) > captured[3]
    else:
        assert sum(captured) == 0
    assert "max_num_seqs = 4" in body["settings"] and body["machine"]["python"]

    [start] = json.loads((out / "waves_start.json").read_text())["rows"]
    assert start["ready_s"] > 0 and start["builds"]["graphs_captured"] > 0
    table = capsys.readouterr().out
    assert table.endswith((out / "waves.md").read_text())
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if "|" in line]
    column = lines[3].index("captured")
    assert [int(line[column]) for line in lines[5:]] == captured
    log = (out / "waves_server.log").read_text()
    assert "Ready: " in log and "Stopping: open requests" in log


def test_a_running_server_is_measured_from_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    checkpoint = write_checkpoint(tmp_path)
    out = tmp_path / "out"
    flags = ("--output-len=5", "--input-len=9", "--vocab-size=200", f"--out={out}")
    with serving(checkpoint, "--api-key", "one,two") as (_, url):
        argv = ["bench", "waves", f"--url={url}/v1", "--concurrency=2", *flags]
        assert cli.main([*argv, "--api-key=two"]) == 0
        rows = json.loads((out / "waves.json").read_text())["rows"]
        [start] = json.loads((out / "waves_start.json").read_text())["rows"]
        assert start["ready_s"] is None and start["builds"]["graphs_captured"] == 0
        # One draft of three is accepted in each step: five tokens come in three arrivals.
        assert [r["mean_acceptance_length"] for r in rows] == [2.0] * 4
        assert [r["num_requests"] for r in rows] == [2, 2, 2, 8]
        for more, code, words in (
            ([], cli.REFUSED, "wants another API key"),
            (["--api-key=one", "--budget-s=0"], 0, "--budget-s 0 is spent: wave 4c at 8"),
            (["--api-key=one", "--output-len=2000000000"], cli.REFUSED, "longest sequence is 1073"),
        ):
            assert cli.main([*argv, *more]) == code
            assert words in capsys.readouterr().err


def failing(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = cli.main(["bench", "waves", *SMALL, *argv])
    said = capsys.readouterr().err
    assert "Traceback" not in said or "  File" in said.partition("Its last lines:")[2]
    return code, said


def test_a_server_that_breaks_off_says_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    around(monkeypatch, "scripted_engine.py --raise-at 4", write_checkpoint(tmp_path))
    code, said = failing(capsys, "--concurrency=1")
    assert code == cli.FAILED
    # Three steps of the first wave's answer, then the second's.
    assert "waves: conc 1, wave 1" in said and "broke off: the engine failed" in said
    assert re.search(
        r"it ended with code 1\. Its last lines:\n(.*\n)*.*a step that cannot be", said
    )


@pytest.mark.parametrize(
    ("engine", "flags", "words"),
    [
        ("--refuse no-such-thing", (), r"ended with code 2\. Its.*: no-such-thing"),
        ("--die", (), r"did not start; it ended with code 1\. Its last lines:"),
        ("", ("--start-timeout=0.01",), r"not ready after --start-timeout 0\.01 s"),
    ],
)
def test_a_server_that_does_not_start_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    flags: tuple[str, ...],
    words: str,
):
    around(monkeypatch, f"scripted_engine.py {engine}", write_checkpoint(tmp_path))
    code, said = failing(capsys, *flags)
    assert code == cli.FAILED and re.search(words, said, re.DOTALL), said


def test_a_server_whose_log_stays_open_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    held = tmp_path / "held"
    os.mkfifo(held)
    command = f"read line < {shlex.quote(str(held))} & echo gone >&2; exit 3"
    monkeypatch.setattr(own_server, "SERVE", ("sh", "-c", command))
    monkeypatch.setattr(own_server, "DEATH_S", 0.1)
    code, said = failing(capsys)
    # Now whoever holds the log ends too.
    held.write_text("")
    assert code == cli.FAILED
    assert said.endswith("did not start; it ended with code 3. Its last lines:\ngone\n")


def test_the_real_server_gets_a_tokenizer_for_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The target's directory has config.json alone; the demo's, for it is small."""
    target = tmp_path / "target"
    target.mkdir()
    demo = Path(cli.__file__).parents[1] / "configs/demo/target/config.json"
    (target / "config.json").write_text(demo.read_text())
    out = tmp_path / "out"
    flags = ("--draft=none", "--load-format=dummy", "--concurrency=1", f"--out={out}")
    argv = ("bench", "waves", str(target), "--input-len=6", "--output-len=5", *flags)
    assert cli.main(list(argv)) == 0
    assert "has no tokenizer.json: one with a word for each id" in capsys.readouterr().err
    rows = json.loads((out / "waves.json").read_text())["rows"]
    # Without a draft every token is an arrival of its own.
    assert len(rows) == 4 and all(len(r["itl_ms"]) == 3 for r in rows)
    assert str(target) in json.loads((out / "waves.json").read_text())["settings"]
    assert [file.name for file in target.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["latency,waves"], cli.REFUSED, "latency,waves: waves runs alone"),
        (["waves", "--num-drafts=2"], cli.REFUSED, "--num-drafts: a server is measured as it is"),
        (["waves", "--url=ftp://x"], cli.REFUSED, "--url ftp://x: expected an address like"),
        (["waves", "--start-timeout=-1"], cli.REFUSED, "--start-timeout -1: allowed 0 to"),
        (["waves", "--vocab-size=1"], cli.REFUSED, "argument --vocab-size: 1: allowed 2 or more"),
    ],
)
def test_bad_flags(argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", *argv]) == code
    assert words in capsys.readouterr().err


def test_nobody_at_the_url(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert cli.main(["bench", "waves", f"--url=http://127.0.0.1:{port}"]) == cli.FAILED
    assert f"no answer from http://127.0.0.1:{port}: " in capsys.readouterr().err


def asked(answer: bytes, pieces: int, ask: Callable[[Client], Awaitable[object]]) -> object:
    """What a client makes of an answer that comes in so many pieces."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if found := re.search(rb"content-length: (\d+)", head):
            await reader.readexactly(int(found[1]))
        size = -(-len(answer) // pieces)
        for at in range(0, len(answer), size):
            writer.write(answer[at : at + size])
            await writer.drain()
        writer.close()

    async def main() -> object:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await ask(Client(f"http://127.0.0.1:{port}"))

    return asyncio.run(main())


def chunked(*chunks: bytes) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


TEXT = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n'
HELD = b'data: {"choices":[{"text":""}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


async def one_answer(client: Client) -> object:
    [answer] = await client.wave([{"prompt": [1]}])
    return answer.num_tokens, len(answer.arrivals), all(gap >= 0 for gap in answer.gaps_ms)


@pytest.mark.parametrize("pieces", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("chunks", "num_arrivals"),
    [
        ((TEXT, HELD, TEXT + HELD, USAGE + DONE), 2),
        ((TEXT[:9], TEXT[9:] + TEXT, USAGE, DONE), 2),
        ((HELD, HELD, USAGE, DONE), 1),
    ],
    ids=["events", "split", "no text"],
)
def test_events_are_told_from_chunks_and_reads(
    chunks: tuple[bytes, ...], num_arrivals: int, pieces: int
):
    found = asked(chunked(*chunks, b""), pieces, one_answer)
    assert found == (7, num_arrivals, True)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (chunked(TEXT), ServerError, "closed the connection inside an answer"),
        (b"HTTP/1.1 200", ServerError, "closed the connection before it answered"),
        (chunked(TEXT, DONE), ServerError, "without saying how long it is"),
        (chunked(TEXT, b'data: {"error":{"message":"oh"}}\n\n', DONE), ServerError, "off: oh"),
        (
            b'HTTP/1.1 503 No\r\nContent-Length: 27\r\n\r\n{"error":{"message":"full"}}',
            ServerError,
            "/v1/completions answers 503: full",
        ),
        (b"HTTP/1.1 404 No\r\n\r\nnothing here", ServerError, "answers 404: nothing here"),
        (b"HTTP/1.1 401 No\r\n\r\n{}", ConfigError, "wants another API key"),
    ],
)
def test_answers_that_break_off_or_refuse(answer: bytes, kind: type[EaglerunError], words: str):
    with pytest.raises(kind, match=words):
        asked(answer, 1, one_answer)


def test_other_servers_tell_nothing_of_kernels():
    page = 'vllm:request_success_total{engine="0",finished_reason="length"} 4.0\n'
    told = read_metrics(page)
    assert told.served is None and told.at_start is None and told.answers == 0
