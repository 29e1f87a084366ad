"""A server process around an engine of the tests, and a small HTTP client that sees every byte."""

import asyncio
import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_engine import TEMPLATE, TOKENIZER

SCRIPT = Path(__file__).parent / "scripted_serve.py"
LIMIT_S = 30


def write_checkpoint(directory: Path) -> Path:
    """What the HTTP side reads of a checkpoint: tokenizer and chat template."""
    TOKENIZER.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    config = {"bos_token": "]~!b[", "eos_token": "[e~["}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


class Server:
    """The process, its log so far, and where it answers."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.log: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        # Cleared: the log is not read.
        self.reads = threading.Event()
        self.reads.set()
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.reads.wait()
                self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: str) -> "re.Match[str]":
        """The next line of the log that matches."""
        while (line := self._lines.get(timeout=LIMIT_S)) is not None:
            self.log.append(line)
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in the log:\n{''.join(self.log)}")

    def wait_for_end(self) -> int:
        """The exit code, when the server and its engine, which shares its log, have ended."""
        while (line := self._lines.get(timeout=LIMIT_S)) is not None:
            self.log.append(line)
        return self.process.wait(LIMIT_S)

    def wait_until_ready(self) -> str:
        return self.wait_for(r"Ready: .* at (https?://\S+)")[1]


@contextmanager
def started(
    checkpoint: Path,
    *flags: str,
    engine: str = "",
    script: str = "scripted_engine.py",
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that starts, around ``script`` with the flags ``engine``; in the end it is killed
    if it still runs."""
    engine = f"{script} --checkpoint {checkpoint} {engine}"
    command = [sys.executable, str(SCRIPT), engine, "serve"]
    process = subprocess.Popen(
        [*command, "--http-port", "0", *flags], stderr=subprocess.PIPE, text=True, env=env
    )
    server = Server(process)
    try:
        yield server
    finally:
        process.kill()
        process.wait()
        server.reads.set()
        # Ends with the engine, which ends with the server.
        server.reader.join()


@contextmanager
def serving(checkpoint: Path, *flags: str, **more: Any) -> Iterator[tuple[Server, str]]:
    """A server that answers, and its URL."""
    with started(checkpoint, *flags, **more) as server:
        yield server, server.wait_until_ready()


@dataclass
class Reply:
    """An HTTP answer whose body is still to be read."""

    status: int
    headers: dict[str, str]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def json(self) -> Any:
        return json.loads(await self.body())

    async def events(self) -> AsyncIterator[Any]:
        """The data of server-sent events, "[DONE]" as it is, until the connection's end."""
        rest = b""
        async for chunk in self.chunks():
            *parts, rest = (rest + chunk).split(b"\n\n")
            for part in parts:
                data = part.removeprefix(b"data: ").decode()
                yield data if data == "[DONE]" else json.loads(data)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. IncompleteReadError where the connection breaks inside it."""
        if "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]


def children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_fork_of(pid: int, parent: int) -> bool:
    """Whether it runs the same command; the engine's process does not."""
    found = [Path(f"/proc/{one}/cmdline").read_bytes() for one in (pid, parent)]
    return found[0] == found[1]


def engine_of(server_pid: int) -> int:
    """The engine's process; the server's other child prepares prompts."""
    [engine] = [pid for pid in children(server_pid) if not is_fork_of(pid, server_pid)]
    return engine


class Http:
    """Requests, each on a connection of its own; all are closed at the end."""

    def __init__(self, url: str) -> None:
        self.host, _, port = url.rpartition("/")[2].rpartition(":")
        self.port = int(port)
        self.writers: list[asyncio.StreamWriter] = []

    async def ask(
        self, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """POST with a body (bytes: as they are), else GET."""
        reader, writer = await self.send(path, body, headers)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        found = dict(line.lower().split(": ", 1) for line in head[1:-1])
        return Reply(int(head[0].split()[1]), found, reader, writer)

    async def send(
        self, path: str, body: object = None, headers: Mapping[str, str] | None = None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request whose answer is not waited for."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        self.writers.append(writer)
        content = b"" if body is None else body
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", f"host: {self.host}"]
        lines += ["content-type: application/json", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        return reader, writer

    async def close(self) -> None:
        for writer in self.writers:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()


def drive(url: str, load: Callable[[Http], Awaitable[None]]) -> None:
    """Run ``load`` against a server, in bounded time."""

    async def main() -> None:
        http = Http(url)
        try:
            async with asyncio.timeout(2 * LIMIT_S):
                await load(http)
        finally:
            await http.close()

    asyncio.run(main())


def get(url: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET."""
    found: list[tuple[int, bytes]] = []

    async def load(http: Http) -> None:
        reply = await http.ask(path, None, headers)
        found.append((reply.status, await reply.body()))

    drive(url, load)
    return found[0]


def metric(text: str, name: str, **labels: str) -> float:
    """A value of a Prometheus page; 0.0 where there is none with these labels."""
    for line in text.splitlines():
        if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            return float(line.rpartition(" ")[2])
    return 0.0
