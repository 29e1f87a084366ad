"""What a streamed event costs the HTTP side, with an engine that emits as fast as it is told.

    python recipes/http_streams.py            both measurements, each in a server of its own

saturation  64 streams; every stream has its next event as soon as all have had one. Counted: SSE
            data lines by CPU second of the server's process. The scripted engine runs in it, and
            its own cost (measured alone) is taken off.
latency     64 streams of 50 events a second. From the moment the engine hands an event over to
            the moment the client has read its line; the same clock in both processes. Events come
            one by one (even), or those of all streams at once (together).

--profile writes the server's profile (pstats) of the saturation run to a file.
"""

import argparse
import asyncio
import cProfile
import gc
import json
import multiprocessing
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import uvicorn
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from eaglerun.messages import (
    Event,
    Finished,
    FinishReason,
    Request,
    SpeculationStats,
    Tokens,
)
from eaglerun.server.app import create_app
from eaglerun.server.chat import Chat
from eaglerun.server.client import EngineStatus
from eaglerun.server.settings import Settings
from eaglerun.server.template import ChatTemplate
from eaglerun.server.vocabulary import Vocabulary

NUM_STREAMS = 64
EVENTS_PER_STREAM = 2000
RATE = 50.0
LATENCY_SECONDS = 6.0


@dataclass
class Queue:
    """The events of one stream, as a client of a real engine hands them on."""

    id: str
    ready: deque[Event] = field(default_factory=deque)
    waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        self.ready.append(event)
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def __aiter__(self) -> "Queue":
        return self

    async def __anext__(self) -> Event:
        while not self.ready:
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        return self.ready.popleft()

    def take_ready(self) -> list[Event]:
        ready = list(self.ready)
        self.ready.clear()
        return ready

    async def aclose(self) -> None:
        self.ready.clear()


class Engine:
    """Starts to emit when all streams are there."""

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._queues: list[Queue] = []
        self._task: asyncio.Task[None] | None = None
        self.cpu_s = 0.0

    async def submit(self, request: Request) -> Queue:
        queue = Queue(request.request_id)
        self._queues.append(queue)
        if len(self._queues) == NUM_STREAMS:
            emit = {"saturation": self._flood, "even": self._even, "together": self._together}
            self._task = asyncio.create_task(emit[self._mode]())
        return queue

    def status(self) -> EngineStatus:
        return EngineStatus(True, True, False, 0.0, 0, 0, 0.0, "m", 4096, 3, "")

    def speculation(self) -> SpeculationStats:
        return SpeculationStats()

    async def _flood(self) -> None:
        gc.collect()
        start = time.process_time()
        for _ in range(EVENTS_PER_STREAM):
            for queue in self._queues:
                queue.put(Tokens(queue.id, 0, (5, 6, 7), " streaming", 2))
            while any(queue.ready for queue in self._queues):
                await asyncio.sleep(0)
        self._finish()
        await asyncio.sleep(0.5)
        self.cpu_s = time.process_time() - start

    async def _even(self) -> None:
        step = 1 / RATE / NUM_STREAMS
        start = time.perf_counter()
        for i in range(int(LATENCY_SECONDS * RATE) * NUM_STREAMS):
            await asyncio.sleep(max(0.0, start + i * step - time.perf_counter()))
            self._stamp(self._queues[i % NUM_STREAMS])
        self._finish()

    async def _together(self) -> None:
        start = time.perf_counter()
        for i in range(int(LATENCY_SECONDS * RATE)):
            await asyncio.sleep(max(0.0, start + i / RATE - time.perf_counter()))
            for queue in self._queues:
                self._stamp(queue)
        self._finish()

    def _stamp(self, queue: Queue) -> None:
        queue.put(Tokens(queue.id, 0, (5, 6, 7), f"@{time.perf_counter_ns()}@", 2))

    def _finish(self) -> None:
        for queue in self._queues:
            stats = SpeculationStats()
            queue.put(Finished(queue.id, 0, FinishReason.STOP, None, 1, 1, 0, 0, stats))


def serve(mode: str, ready: Connection, profile: Path | None) -> None:
    """A server process: sends its port, then (saturation) the CPU seconds of the flood."""
    engine = Engine(mode)
    settings = Settings(("m",), 0, "0")
    vocabulary = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken("</mm:think>", special=False)])
    template = ChatTemplate("{{ messages[0].content }}</mm:think>", {}, 1.0)
    app = create_app(engine, settings, Chat(Vocabulary(tokenizer), template, settings.limits))
    config = uvicorn.Config(app, port=0, log_level="warning", access_log=False)
    server = uvicorn.Server(config)

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.send(server.servers[0].sockets[0].getsockname()[1])
        while not ready.poll():
            await asyncio.sleep(0.1)
        ready.send(engine.cpu_s)
        server.should_exit = True
        await task

    profiler = cProfile.Profile()
    if profile is not None:
        profiler.enable()
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())
    if profile is not None:
        profiler.dump_stats(profile)


async def read(port: int, latencies: list[float]) -> int:
    """One client: counts data lines, and times those that carry a stamp."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": True})
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    count, rest = 0, b""
    while b"[DONE]" not in rest:
        data = await reader.read(1 << 16)
        now = time.perf_counter_ns()
        assert data, "the stream broke off"
        lines = (rest + data).split(b"\n\n")
        rest = lines.pop()
        for line in lines:
            count += b"data: {" in line
            if b'"@' in line:
                latencies.append((now - int(line.split(b"@")[1])) / 1e6)
            if b"[DONE]" in line:
                rest = line
    writer.close()
    return count


def measure(mode: str, profile: Path | None = None) -> tuple[int, float, list[float]]:
    """(data lines, server CPU seconds, latencies in ms) of one server."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(mode, theirs, profile))
    process.start()
    port = ours.recv()
    latencies: list[float] = []

    async def clients() -> list[int]:
        return await asyncio.gather(*(read(port, latencies) for _ in range(NUM_STREAMS)))

    gc.disable()
    counts = asyncio.run(clients())
    time.sleep(1)
    ours.send(None)
    cpu_s = ours.recv()
    process.join()
    return sum(counts), cpu_s, latencies


def engine_cost_s() -> float:
    """CPU seconds that making and queueing one event costs the scripted engine itself."""
    queue, count = Queue("chatcmpl-x"), 100_000
    start = time.process_time()
    for _ in range(count):
        queue.put(Tokens(queue.id, 0, (5, 6, 7), " streaming", 2))
    return (time.process_time() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    lines, cpu_s, _ = measure("saturation", args.profile)
    cost_us = (cpu_s / lines - engine_cost_s()) * 1e6
    print(
        f"saturation: {lines} data lines, {cost_us:.1f} us CPU each, "
        f"{1e6 / cost_us:,.0f} a second and core"
    )
    for mode in ("even", "together"):
        _, _, latencies = measure(mode)
        cuts = statistics.quantiles(latencies, n=100)
        print(
            f"latency, {mode}: {len(latencies)} events, p50 {cuts[49]:.3f} ms, "
            f"p90 {cuts[89]:.3f} ms, p99 {cuts[98]:.3f} ms"
        )


if __name__ == "__main__":
    main()
