"""The engine's process and its client: every request ends once, whoever dies or leaves."""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import FOREVER, text_of

from eaglerun.config import Config, resolve
from eaglerun.errors import CapacityError, ConfigError, EngineError, RequestError
from eaglerun.messages import Event, Failed, Finished, FinishReason, Request, SamplingParams, Tokens
from eaglerun.server import wire
from eaglerun.server.client import Events
from eaglerun.server.engine_process import BROKEN_LINK, HTTP_ENDED
from eaglerun.server.hung import RANK_FAILED
from eaglerun.server.link import Frames, frame
from eaglerun.server.metrics import RequestMetrics
from eaglerun.server.process_client import ProcessClient

ENGINE = (sys.executable, str(Path(__file__).parents[1] / "scripted_engine.py"))
LIMIT_S = 15


def make_client(*flags: str, **values: object) -> ProcessClient:
    config = resolve({"draft": "d", **values}, environ={})
    return ProcessClient(config, (*ENGINE, *flags), RequestMetrics(), lambda stage: None)


@asynccontextmanager
async def running(*flags: str, **values: object) -> AsyncIterator[ProcessClient]:
    client = make_client(*flags, **values)
    async with asyncio.timeout(4 * LIMIT_S):
        try:
            await client.start()
            yield client
        finally:
            await client.close()


def request(name: str, max_tokens: int | None = 12, n: int = 1, prompt: int = 5) -> Request:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return Request(name, tuple(range(1, prompt + 1)), params)


def endless(name: str, **more: int) -> Request:
    return request(name, max_tokens=FOREVER, **more)


async def collect(events: Events) -> list[Event]:
    return [event async for event in events]


def ends(events: list[Event]) -> list[str]:
    return [
        f"{event.index} {event.reason}" if isinstance(event, Finished) else "failed"
        for event in events
        if not isinstance(event, Tokens)
    ]


async def until(condition: object, timeout_s: float = LIMIT_S) -> None:
    """Wait until ``condition()`` holds, letting the loop run."""
    assert callable(condition)
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0)


def test_answers_arrive_whole_and_once():
    async def main() -> None:
        async with running() as client:
            answers = [request(f"r{i}", 5 + i, n=1 + i % 3, prompt=3 + i) for i in range(20)]
            got = await asyncio.gather(
                *(collect(events) for events in [await client.submit(r) for r in answers])
            )
            for asked, events in zip(answers, got, strict=True):
                n = asked.sampling.n
                assert sorted(ends(events)) == [f"{i} length" for i in range(n)]
                for i in range(n):
                    texts = [e.text for e in events if isinstance(e, Tokens) and e.index == i]
                    expected = text_of(asked.prompt_ids, i, asked.sampling.max_tokens or 0)
                    assert "".join(texts) == expected
            totals = client.totals
            assert totals.emitted_tokens == sum((5 + i) * (1 + i % 3) for i in range(20))
            assert totals.finished == {"length": sum(1 + i % 3 for i in range(20))}
            assert totals.num_running == totals.num_waiting == 0
            assert client.speculation() == totals.speculation
            assert 0 < totals.speculation.accepted < totals.speculation.drafted

    asyncio.run(main())


def test_the_link_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nobody else can connect to it, and nothing of it can be left behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def main() -> None:
        async with running() as client:
            assert client.status().alive and list(tmp_path.iterdir()) == []

    asyncio.run(main())


class Garbage:
    """An engine's process, of which only the link is true: it sends ``content`` when ready."""

    SCRIPT = """
import sys, time
from eaglerun.server import wire
from eaglerun.server.link import HttpLink
start = wire.decode_start(sys.stdin.buffer.readline())
link = HttpLink(start.link)
link.send(wire.Ready("m", 10, 0, None))
link._socket.sendall(bytes.fromhex(sys.argv[1]))
while link._socket.recv(1 << 16):
    pass
sys.exit(7)
"""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (frame(b"garbage"), "bad frame from the engine process"),
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes, allowed 536870912"),
        (frame(b"\x81\xa4type\xa5other"), "bad frame"),
        (frame(b"\x81\xa4type\xa5\xff\xff\xff\xff\xff"), "bad frame"),
    ],
)
def test_a_bad_frame_of_the_engine_ends_the_link(
    content: bytes, words: str, caplog: pytest.LogCaptureFixture
):
    async def main() -> None:
        command = (sys.executable, "-c", Garbage.SCRIPT, content.hex())
        client = ProcessClient(Config(), command, RequestMetrics(), lambda stage: None)
        async with asyncio.timeout(LIMIT_S):
            await client.start()
            assert await client.ended == 7
            assert not client.status().alive
            await client.close()

    asyncio.run(main())
    assert words in caplog.text and "Traceback" not in caplog.text


def run_engine(start: bytes, *frames: bytes) -> "subprocess.CompletedProcess[bytes]":
    """The engine's process with an end of a link, to which ``frames`` are written."""
    ours, theirs = socket.socketpair()
    file = theirs.fileno()
    line = wire.encode_start(wire.Start(Config(), file)) if start == b"start" else start
    with ours, theirs:
        with subprocess.Popen(ENGINE, stdin=-1, stdout=-1, stderr=-1, pass_fds=(file,)) as process:
            for one in frames:
                ours.sendall(one)
            if frames == (b"",):
                ours.close()
            if start == b"start":
                assert process.stdin is not None and process.stderr is not None
                process.stdin.write(line)
                process.stdin.flush()
                said = process.stderr.read()
                return subprocess.CompletedProcess(ENGINE, process.wait(LIMIT_S), b"", said)
            _, said = process.communicate(line, LIMIT_S)
            return subprocess.CompletedProcess(ENGINE, process.returncode, b"", said)


@pytest.mark.parametrize("content", [frame(b"garbage"), b"\xff\xff\xff\xff"])
def test_a_bad_frame_of_the_http_process_ends_the_engine(content: bytes):
    done = run_engine(b"start", content)
    assert done.returncode == BROKEN_LINK
    assert b"bad frame from the HTTP process" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("start", [b"", b'{"config":', b"start"])
def test_an_engine_whose_http_process_ended_while_it_loaded_says_nothing(start: bytes):
    done = run_engine(start, b"")
    assert done.returncode == HTTP_ENDED
    assert done.stderr == b""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=20), st.data())
def test_frames_survive_any_split(contents: list[bytes], data: st.DataObject):
    whole = b"".join(map(frame, contents))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=10)))
    frames, found = Frames(), []
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        frames.add(whole[begin:end])
        while (content := frames.take()) is not None:
            found.append(bytes(content))
    assert found == contents and not frames


def test_refusals_name_the_field_and_leave_nothing():
    async def main() -> None:
        async with running() as client:
            empty = Request("r", ())
            with pytest.raises(RequestError, match="prompt: is empty"):
                await client.submit(empty)
            events = await client.submit(endless("twice"))
            with pytest.raises(RequestError, match="already running"):
                await client.submit(endless("twice"))
            await events.aclose()
            assert await collect(events) == []
            await client.drain(LIMIT_S)
            with pytest.raises(CapacityError, match="shutting down"):
                await client.submit(request("late"))
            assert client.totals.finished == {"abort": 1}

    asyncio.run(main())


def test_leaving_aborts_within_two_steps():
    async def main() -> None:
        async with running("--max-num-seqs", "2") as client:
            left = [await client.submit(endless(f"r{i}", n=2)) for i in range(3)]
            first = await anext(left[0])
            assert isinstance(first, Tokens)
            for events in left:
                await events.aclose()
                await events.aclose()
            await client.drain(LIMIT_S)
            assert client.totals.finished == {"abort": 6}

    asyncio.run(main())


def test_a_caller_that_is_cancelled_leaves_no_request():
    async def main() -> None:
        async with running() as client:
            task = asyncio.create_task(client.submit(endless("r")))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            reader = asyncio.create_task(collect(await client.submit(endless("s"))))
            await until(lambda: client.totals.steps > 0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            assert client.status().num_running == 1
            await client.close()
            assert not client._open

    asyncio.run(main())


def test_what_waits_is_counted_by_answers():
    async def main() -> None:
        async with running("--max-num-seqs", "2", max_queued_requests=8) as client:
            first = await client.submit(endless("first", n=2))
            await anext(first)
            await until(lambda: client._num_waiting == 0)
            lone = await client.submit(endless("lone", n=16))
            with pytest.raises(CapacityError, match="waiting"):
                await client.submit(request("another"))
            await lone.aclose()
            await until(lambda: client._num_waiting == 0)
            await client.submit(endless("five", n=5))
            await client.submit(endless("three", n=3))
            with pytest.raises(CapacityError, match="waiting"):
                await client.submit(request("one"))
            # Places for two: as many answers begin, and so many more may wait.
            await first.aclose()
            await until(lambda: client._num_waiting == 6)
            await client.submit(endless("two", n=2))
            with pytest.raises(CapacityError, match="waiting"):
                await client.submit(request("one"))

    asyncio.run(main())


def test_nothing_hangs_when_work_comes_after_a_pause():
    async def main() -> None:
        async with running("--hang-at", "0", hung_after=0.2) as client:
            await asyncio.sleep(0.3)
            assert not client.status().hung
            await client.submit(request("r"))
            assert not client.status().hung
            await until(lambda: client.status().hung)
            os.kill(client.pid, signal.SIGKILL)

    asyncio.run(main())


def test_queue_limits_answer_at_once():
    async def main() -> None:
        settings = {"max_queued_requests": 3, "max_queued_tokens": 100}
        async with running("--max-num-seqs", "1", **settings) as client:
            long = await client.submit(endless("long", prompt=1000))
            await anext(long)
            waiting = [await client.submit(endless(f"w{i}", prompt=40)) for i in range(2)]
            begin = time.perf_counter()
            with pytest.raises(CapacityError, match="waiting"):
                await client.submit(request("too many tokens", prompt=40))
            waiting.append(await client.submit(request("small", prompt=1)))
            with pytest.raises(CapacityError, match="waiting"):
                await client.submit(request("too many requests", prompt=1))
            assert time.perf_counter() - begin < 1.0
            assert client._metrics.refused["queue full"] == 2
            # The first to leave makes room.
            await waiting[0].aclose()
            await until(lambda: client.totals.finished == {"abort": 1})
            await (await client.submit(request("fits", prompt=1))).aclose()

    asyncio.run(main())


def test_queue_timeout_refuses_what_waits_too_long():
    async def main() -> None:
        async with running("--max-num-seqs", "1", queue_timeout=0.2) as client:
            runs = await client.submit(endless("runs"))
            await anext(runs)
            waits = await client.submit(endless("waits"))
            with pytest.raises(CapacityError, match="within 0.2 s"):
                await collect(waits)
            assert client._metrics.refused["queue timeout"] == 1
            assert isinstance(await anext(runs), Tokens)

    asyncio.run(main())


def test_a_killed_engine_fails_every_stream():
    async def main() -> None:
        async with running("--max-num-seqs", "8") as client:
            streams = [await client.submit(endless(f"r{i}", n=1 + i % 2)) for i in range(20)]
            readers = [asyncio.create_task(collect(events)) for events in streams]
            await until(lambda: client.totals.steps > 10)
            begin = time.perf_counter()
            os.kill(client.pid, signal.SIGKILL)
            for got in await asyncio.gather(*readers):
                assert ends(got) == ["failed"]
                assert isinstance(got[-1], Failed) and got[-1].message == "the engine died"
            assert await client.ended == -signal.SIGKILL
            assert time.perf_counter() - begin < LIMIT_S
            status = client.status()
            assert not status.alive and not status.ready and not status.hung
            with pytest.raises(EngineError, match="not ready"):
                await client.submit(request("late"))

    asyncio.run(main())


def test_an_engine_that_raises_fails_every_stream(capfd: pytest.CaptureFixture[str]):
    async def main() -> None:
        async with running("--raise-at", "5") as client:
            got = await collect(await client.submit(endless("r")))
            assert ends(got) == ["failed"] and got[-1] == Failed("r", "the engine failed")
            assert await client.ended == 1

    asyncio.run(main())
    assert "ZeroDivisionError: a step that cannot be" in capfd.readouterr().err


def test_an_engine_whose_device_hangs_ends(capfd: pytest.CaptureFixture[str]):
    async def main() -> None:
        async with running("--lose-rank-at", "5") as client:
            got = await collect(await client.submit(endless("r")))
            assert ends(got) == ["failed"] and got[-1] == Failed("r", "the engine failed")
            assert await asyncio.wait_for(client.ended, LIMIT_S) == RANK_FAILED

    asyncio.run(main())
    assert "RankFailed: step 5 is not done" in capfd.readouterr().err


def test_closing_fails_what_is_open():
    async def main() -> None:
        async with running() as client:
            stream = await client.submit(endless("r"))
            await anext(stream)
            await client.drain(0.01)
            await client.close()
            got = await collect(stream)
            assert ends(got) == ["failed"] and got[-1] == Failed("r", "the server was shut down")
            assert await client.ended == 0

    asyncio.run(main())


def test_draining_lets_answers_end():
    async def main() -> None:
        async with running() as client:
            reader = asyncio.create_task(collect(await client.submit(request("r", 5000))))
            await client.drain(LIMIT_S)
            assert ends(await reader) == ["0 length"]

    asyncio.run(main())


def test_a_hung_engine_is_noticed_and_ended():
    async def main() -> None:
        async with running("--hang-at", "5", hung_after=0.2, queue_timeout=0.3) as client:
            assert not client.status().hung
            stream = await client.submit(endless("r"))
            await until(lambda: client.status().hung)
            assert client.status().alive
            with pytest.raises(CapacityError):
                # It has no verdict either.
                await client.submit(request("s"))
            os.kill(client.pid, signal.SIGKILL)
            assert ends(await collect(stream)) == ["failed"]

    asyncio.run(main())


def test_refusal_to_start_is_told():
    async def main(*flags: str) -> None:
        async with running(*flags):
            pytest.fail("it started")

    with pytest.raises(ConfigError, match="no such model"):
        asyncio.run(main("--refuse", "no such model"))
    with pytest.raises(EngineError, match="ended, code 9"):
        asyncio.run(main("--die"))


def test_a_device_that_hangs_at_the_start_is_told(capfd: pytest.CaptureFixture[str]):
    async def main() -> None:
        client = make_client("--lose-rank", "step 1 is not done after 300 s")
        try:
            with pytest.raises(ConfigError, match="^step 1 is not done after 300 s$"):
                await client.start()
            assert await asyncio.wait_for(client.ended, LIMIT_S) == RANK_FAILED
        finally:
            await client.close()

    asyncio.run(main())
    logged = capfd.readouterr().err
    assert "the engine cannot start" in logged and "RankFailed: step 1 is not done" in logged


KILL_YOURSELF = """
import asyncio, os, signal, sys
from eaglerun.config import Config
from eaglerun.messages import Request
from eaglerun.server.metrics import RequestMetrics
from eaglerun.server.process_client import ProcessClient

async def main():
    client = ProcessClient(Config(), sys.argv[1:], RequestMetrics(), print)
    await client.start()
    await client.submit(Request("r", (1, 2)))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_the_engine_ends_with_the_http_process():
    """kill -9 of the process that started it, in the middle of a step that never returns."""
    command = [sys.executable, "-c", KILL_YOURSELF, *ENGINE, "--hang-at", "0"]
    # Its output ends when the engine, which inherits it, has ended too.
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == -signal.SIGKILL


def test_many_streams_with_random_leavers():
    """256 at once: what stays is whole, what leaves is aborted, nothing remains."""

    async def one(client: ProcessClient, i: int, chance: random.Random) -> str:
        asked = request(f"r{i}", max_tokens=40 + chance.randrange(400), prompt=2 + i % 50)
        leave_after = chance.choice([None, None, 0, 1, chance.randrange(100)])
        events = await client.submit(asked)
        text, got = "", 0
        while leave_after is None or got < leave_after:
            event = await anext(events, None)
            if event is None:
                assert text == text_of(asked.prompt_ids, 0, asked.sampling.max_tokens or 0)
                return "length"
            got += 1
            for each in (event, *events.take_ready()):
                text += each.text if isinstance(each, Tokens) else ""
        await events.aclose()
        return "abort"

    async def main() -> None:
        chance = random.Random(4)
        async with running("--max-num-seqs", "100") as client:
            num_files = len(os.listdir("/proc/self/fd"))
            for turn in range(3):
                ended = await asyncio.gather(
                    *(one(client, 1000 * turn + i, chance) for i in range(256))
                )
                await client._idle.wait()
                assert ended.count("abort") > 50 and ended.count("length") > 50
            finished = client.totals.finished
            assert sum(finished.values()) == 3 * 256
            # An answer may also end by itself before its reader's wish to leave arrives.
            assert 0 < finished[FinishReason.ABORT] <= 3 * 256
            assert not client._open and not client._verdicts
            assert client._num_waiting == client._num_waiting_tokens == 0
            assert len(os.listdir("/proc/self/fd")) == num_files

    asyncio.run(main())
