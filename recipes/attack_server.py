"""Attacks on a server of one's own: what each costs it, and whether that is bounded.

python recipes/attack_server.py [--short] [--only NAME ...] [--mib 64] [--overload-s 60]

Every server is started here, on loopback, around an engine of the tests, and ended here. Every
attack is bounded in count, time and bytes, and stops by itself; one that has taken MAX_RSS_MIB of
the server ends at once.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from scripted_engine import text_of  # noqa: E402
from served import Http, Server, drive, serving, write_checkpoint  # noqa: E402

MAX_RSS_MIB = 1024
ENDLESS = {"prompt": [1], "max_tokens": 1_000_000, "stream": True}
HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
GET = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
KEYS = {"EAGLERUN_API_KEY": "one,two"}
LOOPS = "{% set x=range(99999) %}{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"


@dataclass(frozen=True)
class Size:
    """How far an attack goes."""

    mib: int
    connections: int
    overload_s: float
    disconnects: int


@dataclass(frozen=True)
class Found:
    figure: str
    held: bool


# Looking at a server


def rss_mib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) >> 10
    return 0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def tree_mib(pid: int) -> int:
    """The server and all that it started; memory they share counts more than once."""
    with suppress(OSError):
        return rss_mib(pid) + sum(map(tree_mib, children(pid)))
    return 0


def _watch(port: int, body: bytes, pipe: Connection) -> None:
    """In a process of its own: the worst time between two events of a stream, and of /health."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
    connection.recv(1 << 16)
    pipe.send("ready")
    gaps, health, last, due = [0.0], [0.0], time.perf_counter(), 0.0
    while not pipe.poll():
        connection.settimeout(60)
        connection.recv(1 << 16)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now
        if now > due:
            with suppress(OSError):
                one = socket.create_connection(("127.0.0.1", port), 60)
                one.sendall(GET + b"connection: close\r\n\r\n")
                one.recv(1 << 12)
                one.close()
            last = time.perf_counter()
            health.append(last - now)
            due = last + 0.05
    pipe.send((max(gaps), max(health)))


class Watch:
    """Another client's stream while something happens; its events come 10 ms apart."""

    def __init__(self, url: str) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._pipe = ours
        port = int(url.rpartition(":")[2])
        body = json.dumps(ENDLESS).encode()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_watch, args=(port, body, theirs)
        )
        self._process.start()
        ours.recv()

    def stop(self) -> tuple[float, float]:
        """Milliseconds: the worst gap, the worst /health."""
        self._pipe.send("stop")
        gap, health = self._pipe.recv()
        self._process.join()
        return 1e3 * gap, 1e3 * health


@contextmanager
def attacked(
    *flags: str, engine: str = "--pause-ms 10 --num-accepted 0", **more: Any
) -> Iterator[tuple[Server, str, int]]:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_checkpoint(Path(directory))
        with serving(checkpoint, *flags, engine=engine, **more) as (server, url):
            yield server, url, server.process.pid


def pour(url: str, pid: int, begin: bytes, piece: bytes, mib: int) -> tuple[bytes, int, int]:
    """Send ``piece`` over and over until refused; the answer, MiB sent, MiB of memory taken."""
    before, sent, answer = rss_mib(pid), 0, b""
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 30) as connection:
        piece *= max(1, 65536 // len(piece))
        with suppress(OSError):
            connection.sendall(begin)
            while sent < mib << 20 and rss_mib(pid) - before < MAX_RSS_MIB:
                connection.sendall(piece)
                sent += len(piece)
        connection.settimeout(2)
        with suppress(OSError):
            answer = connection.recv(4096)
        taken = rss_mib(pid) - before
    return answer, sent >> 20, taken


def status(answer: bytes) -> str:
    return answer.split(b" ", 2)[1].decode() if answer.startswith(b"HTTP") else "closed"


# Attacks, each on a server of its own


def heads(size: Size) -> Found:
    """Header lines, one value, one URL, trailers: each without an end."""
    trailers = POST + b"transfer-encoding: chunked\r\n\r\n0\r\n"
    kinds = {
        "lines": (GET, b"x: y\r\n"),
        "a value": (GET + b"x: ", b"y"),
        "a URL": (b"GET /", b"y"),
        "trailers": (trailers, b"x: y\r\n"),
    }
    said, worst = [], 0
    with attacked() as (_, url, pid):
        watch = Watch(url)
        for name, (begin, piece) in kinds.items():
            answer, sent, taken = pour(url, pid, begin, piece, size.mib)
            worst = max(worst, taken)
            said.append(f"{name}: {status(answer)} after {sent} MiB, +{taken} MiB")
        gap, _ = watch.stop()
    return Found("; ".join(said) + f"; worst gap {gap:.0f} ms", worst < 32 and gap < 1000)


def slow_heads(size: Size) -> Found:
    """Connections that send nothing, or half a head, with 1,024 files as the soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    flags = ("--header-timeout", "3") if "--header-timeout" in known_flags() else ()
    try:
        with attacked(*flags) as (_, url, pid):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            port = int(url.rpartition(":")[2])
            idle = []
            for i in range(size.connections):
                with suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", port), 5)
                    idle.append(one)
                    one.sendall(b"" if i % 2 else GET)
            begin = time.perf_counter()
            answered = health(port)
            took = time.perf_counter() - begin
            time.sleep(4)
            left = len(os.listdir(f"/proc/{pid}/fd"))
            for one in idle:
                one.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    figure = f"{len(idle)} open: /health {answered} in {1e3 * took:.0f} ms; files 4 s later: {left}"
    return Found(figure, answered == "200" and left < 64)


def health(port: int, extra: bytes = b"") -> str:
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as one:
            one.sendall(GET + extra + b"connection: close\r\n\r\n")
            return status(one.recv(4096))
    except OSError as error:
        return type(error).__name__


def names(size: Size) -> Found:
    """Another Host, none, two; a forwarded address; wrong keys."""
    with attacked("--rate-limit", "0.001", "--rate-limit-burst", "1") as (_, url, _):
        port = int(url.rpartition(":")[2])
        asked = {
            "other Host": b"GET /health HTTP/1.1\r\nhost: evil.example\r\n",
            "no Host": b"GET /health HTTP/1.1\r\n",
            "two": GET + b"host: evil.example\r\n",
        }
        found = {}
        for name, head in asked.items():
            with socket.create_connection(("127.0.0.1", port), 5) as one:
                one.sendall(head + b"connection: close\r\n\r\n")
                found[name] = status(one.recv(4096))
        passed = 0
        for i in range(5):
            with socket.create_connection(("127.0.0.1", port), 5) as one:
                body = b'{"prompt": [1], "max_tokens": 1}'
                one.sendall(
                    POST
                    + b"x-forwarded-for: 1.1.1.%d\r\ncontent-length: %d\r\n\r\n" % (i, len(body))
                    + body
                )
                passed += status(one.recv(4096)) == "200"
    tried = []
    with attacked(env=os.environ | KEYS) as (_, url, _):

        async def load(http: Http) -> None:
            for i in range(60):
                reply = await http.ask("/v1/models", None, {"authorization": f"Bearer {i}"})
                tried.append(reply.status)

        drive(url, load)
    limited = tried.count(429)
    figure = ", ".join(f"{name} {found[name]}" for name in found)
    figure += (
        f"; 5 forwarded addresses passed a limit of 1: {passed}; 60 wrong keys: {limited} x 429"
    )
    return Found(figure, "200" not in found.values() and passed == 1 and limited > 30)


def bodies(size: Size) -> Found:
    """Bodies of up to 16 MB that are dear to parse or to check."""
    full = min(15 << 20, size.mib << 20)
    tool = b'{"type":"function","function":{"name":"f","parameters":{"a":[%s[]]}}}'
    attacks = {
        "lists in a tool": (
            "/v1/chat/completions",
            b'"tools":[' + tool % (b"[]," * (full // 3)) + b"]",
        ),
        "tools": ("/v1/chat/completions", b'"tools":[' + b"{}," * min(200_000, full // 3) + b"{}]"),
        "metadata": (
            "/v1/responses",
            b'"input":"x","metadata":{%s"":1}'
            % b"".join(b'"%d":1,' % i for i in range(min(500_000, full // 12))),
        ),
        "messages": (
            "/v1/chat/completions",
            b'"messages":[%s{}]' % (b'{"role":"user","content":"x"},' * min(400_000, full // 30)),
        ),
        "ids": ("/detokenize", b'"tokens":[' + b"7," * min(8_000_000, full // 2) + b"7]"),
        "text": ("/v1/completions", b'"max_tokens":1,"prompt":"' + b"ab " * (full // 6) + b'"'),
    }
    attacks["a million ids"] = (
        "/v1/completions",
        b'"max_tokens":1,"prompt":[' + b"7," * min(999_999, full // 2) + b"7]",
    )
    said, gaps, healths = [], [], []
    engine = "--pause-ms 10 --num-accepted 0 --max-model-len 1048576"
    with attacked(engine=engine) as (_, url, _):
        quiet = Watch(url)
        time.sleep(1)
        base, _ = quiet.stop()
        for name, (path, field) in attacks.items():
            content = (
                b"{"
                + field
                + (
                    b"}"
                    if b"messages" in field or "chat" not in path
                    else b',"messages":[{"role":"user","content":"x"}]}'
                )
            )
            watch = Watch(url)
            begin = time.perf_counter()
            answer: list[int] = []

            async def load(
                http: Http, path: str = path, content: bytes = content, answer: list[int] = answer
            ) -> None:
                answer.append((await http.ask(path, content)).status)

            drive(url, load)
            took = time.perf_counter() - begin
            gap, slowest = watch.stop()
            gaps.append(gap)
            healths.append(slowest)
            said.append(f"{name} {answer[0]} {took:.1f} s, gap {gap:.0f}, health {slowest:.0f} ms")
    figure = "; ".join(said) + f" (gap with no attack {base:.0f} ms)"
    # The goal on two quiet cores; on shared ones the base is added.
    return Found(figure, max(gaps) < 250 + base and max(healths) < 100 + base)


def preparation(size: Size) -> Found:
    """Four prompts of 8 MB; then a short one. Again, with clients that leave at once."""
    text = "word and more " * (min(size.mib, 8) * 72_000)
    waits, peaks = [], []
    engine = "--pause-ms 10 --num-accepted 0 --max-model-len 1048576"
    with attacked(engine=engine) as (_, url, pid):

        async def sample() -> None:
            while True:
                peaks.append(tree_mib(pid))
                await asyncio.sleep(0.1)

        async def load(http: Http) -> None:
            sampling = asyncio.create_task(sample())
            for leave in (False, True):
                body = {"prompt": text, "max_tokens": 1}
                long = [asyncio.create_task(http.ask("/v1/completions", body)) for _ in range(4)]
                await asyncio.sleep(0.5)
                if leave:
                    for task in long:
                        task.cancel()
                    for writer in http.writers:
                        writer.close()
                begin = time.perf_counter()
                await http.ask("/v1/chat/completions", HI)
                waits.append(time.perf_counter() - begin)
                await asyncio.gather(*long, return_exceptions=True)
            sampling.cancel()

        drive(url, load)
    figure = f'"Hi" waits {waits[0]:.2f} s, after they left {waits[1]:.2f} s; all processes '
    figure += f"{max(peaks, default=0)} MiB"
    return Found(figure, max(waits) < 1.5)


def admission(size: Size) -> Found:
    """64 prompts with n = 16 in a queue of 64; a priority of one's own."""
    found: list[int] = []
    with attacked("--max-queued-requests", "64", engine="--max-num-seqs 1 --pause-ms 5") as (
        _,
        url,
        _,
    ):

        async def load(http: Http) -> None:
            await http.ask("/v1/completions", ENDLESS)
            body = {"prompt": [[1]] * 64, "n": 16, "max_tokens": 1}
            with suppress(TimeoutError):
                async with asyncio.timeout(3):
                    found.append((await http.ask("/v1/completions", body)).status)
            if not found:
                found.append(0)
            for writer in http.writers[:1]:
                writer.close()
            found.append((await http.ask("/v1/chat/completions", HI | {"priority": -9})).status)

        drive(url, load)
    words = "refused" if found[0] == 400 else "taken"
    figure = f"1,024 answers {words}; priority: {found[1]}"
    return Found(figure, found == [400, 400])


def caches(size: Size) -> Found:
    """One key's prompt, asked again with another key."""
    prompt = [7 + i % 50 for i in range(80)]
    cached: list[int] = []
    flags = ("--num-kv-blocks", "100")
    with attacked(*flags, script="tiny_engine.py", engine="", env=os.environ | KEYS) as (_, url, _):

        async def load(http: Http) -> None:
            for key in ("one", "two", "one"):
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": prompt, "max_tokens": 1}
                usage = (await (await http.ask("/v1/completions", body, headers)).json())["usage"]
                cached.append(usage["prompt_tokens_details"]["cached_tokens"])

        drive(url, load)
    figure = f"of 80 tokens another key finds {cached[1]}, the same key {cached[2]}"
    return Found(figure, cached[1] == 0 < cached[2])


def echoes(size: Size) -> Found:
    """Errors and answers that repeat what was sent."""
    key = "k" * (min(size.mib, 8) << 20)
    sizes: list[int] = []
    with attacked() as (_, url, _):

        async def load(http: Http) -> None:
            for metadata in ({key: 1}, {str(i): "v" for i in range(100_000)}):
                body = {"input": "x", "metadata": metadata, "max_output_tokens": 1}
                sizes.append(len(await (await http.ask("/v1/responses", body)).body()))

        drive(url, load)
    figure = f"a key of {len(key) >> 20} MiB: {sizes[0]:,} bytes; 100,000 pairs: {sizes[1]:,} bytes"
    return Found(figure, max(sizes) < 4000)


def templates(size: Size) -> Found:
    """Three nested loops; the next chats; SIGTERM while it runs."""
    times: list[float] = []
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "template"
        file.write_text("{% if messages[0].content == 'loop' %}" + LOOPS + "{% endif %}hi")
        flags = ("--chat-template", str(file), "--shutdown-timeout", "0")
        with attacked(*flags) as (server, url, _):

            async def load(http: Http) -> None:
                for _ in range(2):
                    loop = {"messages": [{"role": "user", "content": "loop"}]}
                    await http.send("/v1/chat/completions", loop)
                begin = time.perf_counter()
                with suppress(TimeoutError):
                    async with asyncio.timeout(15):
                        await http.ask("/v1/chat/completions", HI)
                times.append(time.perf_counter() - begin)

            drive(url, load)
            begin = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            with suppress(Exception):
                server.process.wait(15)
            times.append(time.perf_counter() - begin)
    figure = (
        f"the next chat after {times[0]:.1f} s, the process ends {times[1]:.1f} s after SIGTERM"
    )
    return Found(figure, max(times) < 10)


def not_finite(size: Size) -> Found:
    """A prompt whose numbers are NaN."""
    said: list[str] = []
    flags = ("--num-kv-blocks", "100")
    with attacked(*flags, script="tiny_engine.py", engine="--poison 9") as (_, url, _):

        async def load(http: Http) -> None:
            for _ in range(3):
                reply = await http.ask("/v1/completions", {"prompt": [5, 9], "max_tokens": 4})
                said.append(str(reply.status))
            said.append(f"ready {(await http.ask('/health/ready')).status}")

        drive(url, load)
    return Found(", ".join(said), said == ["500"] * 3 + ["ready 503"])


def unread_log(size: Size) -> Found:
    """A log pipe that nobody reads, and 3,000 logged requests."""
    answered = 0
    with attacked("--log-requests") as (server, url, _):
        server.reads.clear()
        port = int(url.rpartition(":")[2])
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as one:
            for _ in range(3000):
                one.sendall(GET + b"\r\n")
                one.recv(4096)
                answered += 1
        server.reads.set()
    return Found(f"{answered} of 3,000 answered", answered == 3000)


def overload(size: Size) -> Found:
    """Ten times what it can do; 10 answers a second are."""
    accepted: list[float] = []
    rejected: list[float] = []
    hinted = 0
    memory = []
    flags = ("--max-queued-requests", "16")
    engine = "--max-num-seqs 4 --pause-ms 20 --num-accepted 0"
    with attacked(*flags, engine=engine) as (_, url, pid):

        async def one(http: Http) -> None:
            nonlocal hinted
            begin = time.perf_counter()
            reply = await http.ask("/v1/completions", {"prompt": [1, 2], "max_tokens": 20})
            await reply.body()
            (accepted if reply.status == 200 else rejected).append(time.perf_counter() - begin)
            hinted += reply.status == 503 and "retry-after" in reply.headers
            reply.writer.close()
            http.writers.remove(reply.writer)

        async def load(http: Http, rate: int, seconds: float) -> float:
            """The server's CPU seconds in a second of so many requests."""
            begin, used, tasks = time.perf_counter(), cpu_s(pid), set()
            for i in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, begin + i / rate - time.perf_counter()))
                task = asyncio.create_task(one(http))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                if rate == 100 and i % 100 == 99:
                    memory.append(rss_mib(pid))
            await asyncio.gather(*tasks)
            return (cpu_s(pid) - used) / (time.perf_counter() - begin)

        http = Http(url)

        async def main() -> float:
            async with asyncio.timeout(2 * size.overload_s + 60):
                # What it can do, which it goes on doing: the rest is the rejects'.
                usual = await load(http, 10, size.overload_s / 2)
                assert not rejected
                accepted.clear()
                begin = time.perf_counter()
                busy = await load(http, 100, size.overload_s)
                return (busy - usual) * (time.perf_counter() - begin)

        used = asyncio.run(main())
    ms = 1e3 * used / max(1, len(rejected))
    quick, slow = sorted(rejected), sorted(accepted)
    p99 = 1e3 * quick[int(0.99 * len(quick))]
    figure = (
        f"{len(accepted)} accepted, p99 {slow[int(0.99 * len(slow))]:.2f} s; {len(rejected)} "
        f"rejected, p50 {1e3 * statistics.median(quick):.1f}, p99 {p99:.1f} ms, Retry-After on "
        f"{hinted}; {ms:.2f} ms of CPU a reject; RSS {memory[0]} to {memory[-1]} MiB"
    )
    held = slow[-1] < 10 and hinted == len(rejected) and ms < 1 and memory[-1] - memory[0] < 16
    return Found(figure, held and (p99 < 10 or len(os.sched_getaffinity(0)) < 4))


def disconnects(size: Size) -> Found:
    """Clients that leave in every state, and neighbours whose bytes are compared."""
    wrong = 0
    with attacked(engine="--max-num-seqs 64 --pause-ms 1") as (server, url, pid):
        before = rss_mib(pid)

        async def neighbour(http: Http, number: int) -> None:
            nonlocal wrong
            while not done.is_set():
                prompt = [number + 1, 5]
                body = {"prompt": prompt, "max_tokens": 200, "stream": True}
                reply = await http.ask("/v1/completions", body)
                text = ""
                async for event in reply.events():
                    text += "" if event == "[DONE]" else event["choices"][0]["text"]
                wrong += text != text_of(tuple(prompt), 0, 200)
                reply.writer.close()

        async def leaver(http: Http, chance: random.Random) -> None:
            reader, writer = await asyncio.open_connection(http.host, http.port)
            body = json.dumps({"prompt": [3, 4], "max_tokens": 1 << 20, "stream": True}).encode()
            whole = POST + b"content-length: %d\r\n\r\n" % len(body) + body
            state = chance.randrange(5)
            writer.write((b"", whole[:20], whole[:-5], whole, whole)[state])
            if state == 4:
                await reader.read(300)
            await asyncio.sleep(chance.random() * 0.02)
            writer.transport.abort()

        async def load(http: Http) -> None:
            chance = random.Random(5)
            near = [asyncio.create_task(neighbour(http, i)) for i in range(8)]
            for _ in range(size.disconnects // 20):
                await asyncio.gather(*(leaver(http, chance) for _ in range(20)))
            done.set()
            await asyncio.gather(*near)
            for _ in range(100):
                text = (await (await http.ask("/metrics")).body()).decode()
                if 'num_requests_running{engine="0",model_name="scripted"} 0.0' in text:
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("something runs on")

        done = asyncio.Event()
        drive(url, load)
        grown = rss_mib(pid) - before
        server.process.terminate()
        server.wait_for_end()
        traces = sum("Traceback" in line for line in server.log)
    figure = f"{size.disconnects} left; answers of 8 neighbours that differ: {wrong}; "
    figure += f"+{grown} MiB; tracebacks: {traces}"
    return Found(figure, not wrong and not traces and grown < 32)


ATTACKS: dict[str, Callable[[Size], Found]] = {
    attack.__name__: attack
    for attack in (
        *(heads, slow_heads, names, bodies, preparation, admission, caches, echoes, templates),
        *(not_finite, unread_log, overload, disconnects),
    )
}


def known_flags() -> set[str]:
    """Those of the server that is there; an earlier one has fewer."""
    from eaglerun.config import options

    return {flag for option in options() for flag in option.flags}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="less of everything")
    parser.add_argument("--only", choices=ATTACKS, action="append")
    parser.add_argument("--mib", type=int, default=64, help="bytes of one attack, at most")
    parser.add_argument("--overload-s", type=float, default=60.0)
    flags = parser.parse_args()
    size = Size(flags.mib, 1100, flags.overload_s, 1000)
    if flags.short:
        size = Size(2, 60, 3.0, 200)
    held = True
    for name in flags.only or ATTACKS:
        found = ATTACKS[name](size)
        held &= found.held
        print(f"| {name} | {found.figure} | {'held' if found.held else 'NOT HELD'} |", flush=True)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
