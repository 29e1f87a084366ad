"""How much the HTTP process costs: events a second of its CPU, and the delay it adds.

python recipes/bench_server.py [--seconds 5] [--route chat|completions] [--profile FILE]

A scripted engine stands where the real one would; it and this client have processes of their own,
whose CPU time is not counted. An event is one SSE data line; lines are never merged. The added
delay is that from the engine to the client less that of the same events written straight into the
client's connections by a process without any server. The HTTP process has the machine's last core
to itself; all else runs on the others.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from served import children, serving, write_checkpoint  # noqa: E402

ROUTES = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Go."}]}),
    "completions": ("/v1/completions", {"prompt": [1, 2, 3]}),
}
STAMP = re.compile(rb'(?:"content":|"text":)"(\d{10,})"')
WARM_UP_S = 1.5
CORES = sorted(os.sched_getaffinity(0))
LAST_CORE = {CORES[-1]}
OTHER_CORES = set(CORES[:-1]) or LAST_CORE


@dataclass(frozen=True)
class Cost:
    """What the HTTP process did in a stretch of time."""

    seconds: float
    cpu_s: float
    events: int
    delays_us: list[float]


def cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def streams(url: str, route: str, count: int) -> Iterator[selectors.DefaultSelector]:
    """``count`` endless streams, begun one after the other."""
    host, port = url.rpartition("/")[2].split(":")
    path, body = ROUTES[route]
    content = json.dumps(body | {"stream": True, "max_tokens": 1 << 28}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    selector = selectors.DefaultSelector()
    for _ in range(count):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
    try:
        yield selector
    finally:
        for key in list(selector.get_map().values()):
            key.fileobj.close()
        selector.close()


def measure(selector: selectors.DefaultSelector, pid: int, seconds: float, timed: bool) -> Cost:
    """Read all streams for so long, after a warm-up. ``timed``: events hold when they were made."""
    events, delays, first = 0, [], None
    begin = time.perf_counter()
    while True:
        for key, _ in selector.select():
            data = key.fileobj.recv(1 << 20)
            now = time.perf_counter_ns()
            if not data:
                raise SystemExit("the server ended a stream")
            events += data.count(b"\n\n")
            if timed and first is not None:
                delays += [(now - int(stamp)) / 1e3 for stamp in STAMP.findall(data)]
        passed = time.perf_counter() - begin
        if first is None and passed > WARM_UP_S:
            first = (time.perf_counter(), cpu_s(pid), events)
        if first is not None and passed > WARM_UP_S + seconds:
            then, cpu, before = first
            spent = cpu_s(pid) - cpu
            return Cost(time.perf_counter() - then, spent, events - before, sorted(delays))


def pin(pid: int, cores: set[int]) -> None:
    """Keep a process, all its threads, on ``cores``."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(thread), cores)


def write_straight(listener: socket.socket, count: int, rate: int) -> None:
    """Stamped events, as many and as spread as the engine's, without a server between."""
    connections = [listener.accept()[0] for _ in range(count)]
    begin, period = time.perf_counter(), 1 / rate
    phases = sorted((0.618034 * i % 1, connection) for i, connection in enumerate(connections))
    with suppress(ConnectionError):
        for turn in itertools.count():
            for phase, connection in phases:
                time.sleep(max(0.0, begin + (turn + phase) * period - time.perf_counter()))
                connection.send(b'data: {"text":"%d"}\n\n' % time.perf_counter_ns())


def run_straight(flags: argparse.Namespace) -> Cost:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        source = multiprocessing.Process(
            target=write_straight, args=(listener, flags.streams, flags.rate)
        )
        source.start()
        assert source.pid is not None
        pin(source.pid, LAST_CORE)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with streams(url, flags.route, flags.streams) as selector:
            cost = measure(selector, source.pid, flags.seconds, timed=True)
        source.join()
    return cost


def run(flags: argparse.Namespace, count: int, engine: str, timed: bool) -> Cost:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = write_checkpoint(Path(directory))
        with serving(checkpoint, engine=engine) as (server, url):
            pid = server.process.pid
            pin(pid, LAST_CORE)
            for child in children(pid):
                pin(child, OTHER_CORES)
            with streams(url, flags.route, count) as selector:
                profiler = None
                if flags.profile and not timed:
                    profiler = profile(server.process.pid, flags)
                cost = measure(selector, server.process.pid, flags.seconds, timed)
                if profiler is not None:
                    profiler.wait()
            server.process.terminate()
            server.wait_for_end()
    return cost


def profile(pid: int, flags: argparse.Namespace) -> "subprocess.Popen[bytes]":
    """py-spy (not a dependency) samples the HTTP process and writes collapsed stacks."""
    command = ["py-spy", "record", "--pid", str(pid), "--duration", str(int(flags.seconds))]
    return subprocess.Popen([*command, "--rate", "500", "--format", "raw", "-o", flags.profile])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=int, default=50, help="events a second of each stream")
    parser.add_argument("--route", choices=ROUTES, default="chat")
    parser.add_argument("--profile", metavar="FILE", help="collapsed stacks, by py-spy")
    flags = parser.parse_args()
    pin(os.getpid(), OTHER_CORES)
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    full = run(flags, flags.streams, "--num-accepted 0", timed=False)
    print(
        f"saturation, {flags.streams} streams of {flags.route}: {full.events / full.seconds:,.0f} "
        f"events/s, HTTP process {100 * full.cpu_s / full.seconds:.0f} % of a core: "
        f"{full.events / full.cpu_s:,.0f} events/s per core, "
        f"{1e6 * full.cpu_s / full.events:.1f} us of CPU an event"
    )
    paced = run(flags, flags.streams, f"--num-accepted 0 --rate {flags.rate}", timed=True)
    print(
        f"{flags.streams} streams x {flags.rate} events/s: {paced.events / paced.seconds:,.0f} "
        f"events/s, HTTP process {100 * paced.cpu_s / paced.seconds:.0f} % of a core"
    )
    through, straight = (quantiles(cost.delays_us) for cost in (paced, run_straight(flags)))
    for name, q, p in zip(("p50", "p90", "p99"), through, straight, strict=True):
        print(
            f"{name} from engine to client {q:.3f} ms, without a server {p:.3f} ms: {q - p:.3f} ms"
        )


def quantiles(delays_us: list[float]) -> list[float]:
    """p50, p90, p99 in milliseconds."""
    return [delays_us[int(len(delays_us) * q)] / 1e3 for q in (0.5, 0.9, 0.99)]


if __name__ == "__main__":
    main()
