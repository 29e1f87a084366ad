"""The HTTP process's side of preparation: who waits for whom, what is given up, what is killed.

Long jobs have workers of their own, so that a short one never waits behind them. A job whose client
has gone, or which takes too long, ends with its worker.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeVar

from eaglerun.errors import CheckpointError, EngineError
from eaglerun.server import prepare_jobs as jobs
from eaglerun.server.chat import Chat
from eaglerun.server.failures import BROKEN, ApiError, overloaded
from eaglerun.server.link import LENGTH_BYTES, frame, length_of
from eaglerun.server.prepare_process import (
    KILL,
    LOAD_S,
    LOADED,
    SPAWN,
    run_source,
    too_costly,
)
from eaglerun.server.prepared import PREPARED, Prompt, Reduced
from eaglerun.server.settings import Limits
from eaglerun.server.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# A job up to this size is short: a few tens of milliseconds.
SHORT_BYTES = 64 << 10
# Past its own limits a worker gets so much longer to say so.
GRACE_S = 2.0
DIED = "the preparation process died"


class Source:
    """The process that was forked, from which workers are. Fork before there is a thread."""

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self._control = control
        self._lock = asyncio.Lock()
        self._ended = False

    @classmethod
    def fork(cls) -> "Source":
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            ours.close()
            run_source(theirs)
        theirs.close()
        ours.setblocking(False)
        return cls(pid, ours)

    async def load(self, load: jobs.Load) -> None:
        """CheckpointError where the checkpoint cannot be prepared for."""
        self._control.sendall(frame(jobs.encode_load(load)))
        try:
            async with asyncio.timeout(LOAD_S + GRACE_S):
                answer = await self._receive()
        except TimeoutError:
            raise CheckpointError(
                f"{load.path}: its chat template or tokenizer takes more than {LOAD_S:g} s to load"
            ) from None
        if not answer:
            raise CheckpointError(f"{load.path}: its chat template or tokenizer cannot be loaded")
        if answer != LOADED:
            raise CheckpointError(answer.decode())

    async def spawn(self) -> "Worker":
        ours, theirs = socket.socketpair()
        with theirs:
            async with self._lock:
                # Not given up half-way, or the next one would read this one's answer.
                pid = await asyncio.shield(asyncio.ensure_future(self._ask(theirs.fileno())))
        reader, writer = await asyncio.open_connection(sock=ours)
        return Worker(pid, reader, writer)

    async def _ask(self, file: int) -> int:
        try:
            socket.send_fds(self._control, [frame(SPAWN)], [file])
        except OSError:
            raise EngineError(DIED) from None
        answer = await self._receive()
        if not answer:
            raise EngineError(DIED)
        return int(answer)

    async def _receive(self) -> bytes:
        """The next answer; b"" at the process's end."""
        head = await self._read(LENGTH_BYTES)
        return await self._read(length_of(head)) if head else b""

    async def _read(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            got = await asyncio.get_running_loop().sock_recv(self._control, size - len(found))
            if not got:
                return b""
            found += got
        return found

    def kill(self, worker: "Worker") -> None:
        worker.writer.transport.abort()
        with suppress(OSError):
            self._control.sendall(frame(KILL + str(worker.pid).encode()))

    def watch(self) -> asyncio.Future[None]:
        """Done when the process ends of itself, in error (seen on Linux)."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        if sys.platform != "linux":
            return ended
        file = os.pidfd_open(self.pid)

        def on_end() -> None:
            loop.remove_reader(file)
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(file, on_end)
        return ended

    def end(self) -> None:
        """Kill it; its workers end with it. Nothing is waited for that could take long."""
        if not self._ended:
            self._ended = True
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
            self._control.close()


class Worker:
    """One process that does one job at a time."""

    def __init__(
        self, pid: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.pid = pid
        self.reader = reader
        self.writer = writer
        self.is_new = True

    async def do(self, content: bytes) -> bytes:
        self.writer.write(frame(content))
        await self.writer.drain()
        length = int.from_bytes(await self.reader.readexactly(LENGTH_BYTES), "little")
        result = await self.reader.readexactly(length)
        self.is_new = False
        return result


class Lane:
    """Jobs of one kind, in the order in which they came, on ``size`` workers."""

    def __init__(self, source: Source, size: int, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self._places = asyncio.Semaphore(size)
        self._free: list[Worker] = []

    async def do(self, content: bytes) -> bytes:
        async with self._places:
            while True:
                worker = self._free.pop() if self._free else await self._source.spawn()
                done = False
                try:
                    async with asyncio.timeout(self._limits.prepare_seconds + GRACE_S):
                        result = await worker.do(content)
                    done = True
                    return result
                except TimeoutError:
                    raise too_costly("time") from None
                except (asyncio.IncompleteReadError, ConnectionError):
                    # One that had done its work may have ended; a new one was killed by this job.
                    if worker.is_new:
                        log.warning("a preparation process died over its job")
                        raise too_costly("memory") from None
                finally:
                    if done:
                        self._free.append(worker)
                    else:
                        self._source.kill(worker)


class Preparation:
    """Jobs for the workers, as many and as large as may wait."""

    def __init__(self, source: Source, limits: Limits) -> None:
        cores = os.cpu_count() or 1
        self._limits = limits
        self._short = Lane(source, max(1, min(4, cores // 2)), limits)
        self._long = Lane(source, max(1, min(2, cores // 4)), limits)
        self._num_jobs = self._num_bytes = 0

    async def do(self, job: jobs.Job, kind: type[_T]) -> _T:
        """The result, which is of ``kind``; raises what it refuses."""
        content = jobs.encode(job)
        size, limits = len(content), self._limits
        if self._num_jobs >= limits.max_preparing or (
            self._num_bytes and self._num_bytes + size > limits.max_preparing_bytes
        ):
            raise overloaded("too many prompts are being prepared")
        self._num_jobs += 1
        self._num_bytes += size
        try:
            lane = self._short if size <= SHORT_BYTES else self._long
            result = jobs.decode_result(await lane.do(content))
        finally:
            self._num_jobs -= 1
            self._num_bytes -= size
        if isinstance(result, jobs.Refusal):
            raise result.error()
        if isinstance(result, jobs.Broken):
            raise ApiError(500, BROKEN)
        assert isinstance(result, kind)
        return result


class PreparedChat(Chat):
    """A Chat whose work is done by other processes."""

    def __init__(self, vocabulary: Vocabulary, preparation: Preparation, limits: Limits) -> None:
        super().__init__(vocabulary, None, limits)
        self._preparation = preparation

    async def _prepare_prompt(self, *conversation: Any) -> Prompt:
        prepared = PREPARED.get()
        if prepared is not None and prepared.prompt is not None:
            return prepared.prompt
        result = await self._preparation.do(jobs.Render(*conversation), jobs.Rendered)
        return result.prompt

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        job = jobs.Encode(texts, add_special_tokens)
        result = await self._preparation.do(job, jobs.Encoded)
        return result.ids

    async def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        job = jobs.Decode(ids, skip_special_tokens)
        result = await self._preparation.do(job, jobs.Decoded)
        return result.text

    async def prepare_body(self, path: str, content: bytes) -> Reduced | bytes | None:
        result = await self._preparation.do(jobs.Body(path, content), jobs.Answered)
        return result.reply if result.reduced is None else result.reduced
