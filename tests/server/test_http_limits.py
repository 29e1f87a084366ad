"""What a connection may hold: heads, trailers, time, places. The client here is a bare socket."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import uvicorn
from uvicorn.server import ServerState

from eaglerun.errors import ConfigError
from eaglerun.server.http_limits import (
    OTHER_FILES,
    Connections,
    HttpCounts,
    HttpLimits,
    LimitedProtocol,
    allow_files,
    network_of,
)

GET = b"GET /health HTTP/1.1\r\nhost: a\r\n"


@dataclass
class Door:
    """A server whose application answers with what it was asked."""

    port: int
    counts: HttpCounts
    tasks: set[asyncio.Task[None]]
    clients: list[asyncio.StreamWriter]

    async def connect(
        self, first: bytes = b""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.clients.append(writer)
        writer.write(first)
        return reader, writer

    async def ask(self, *pieces: bytes) -> bytes:
        """All that comes back until the server closes; a write after that is not its fault."""
        reader, writer = await self.connect()
        sending = asyncio.create_task(_send(writer, pieces))
        answer = await _read(reader)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        return answer


async def _send(writer: asyncio.StreamWriter, pieces: tuple[bytes, ...]) -> None:
    for piece in pieces:
        writer.write(piece)
        await writer.drain()


async def _read(reader: asyncio.StreamReader) -> bytes:
    found = b""
    try:
        while data := await reader.read(1 << 16):
            found += data
    except ConnectionError:
        pass
    return found


async def echo(scope, receive, send):
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/large":
        size = 64 << 20
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})
        return
    headers = [[name.decode(), value.decode("latin1")] for name, value in scope["headers"]]
    answer = json.dumps({"path": scope["path"], "headers": headers, "size": len(body)}).encode()
    length = (b"content-length", str(len(answer)).encode())
    await send({"type": "http.response.start", "status": 200, "headers": [length]})
    await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def door(
    is_trusted: Callable[[str], bool] = lambda _: False, **limits
) -> AsyncIterator[Door]:
    counts = HttpCounts()
    connections = Connections(HttpLimits(**limits), counts, is_trusted)
    config = uvicorn.Config(echo, interface="asgi3", http="httptools", log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: LimitedProtocol(config, state, {}, connections), "127.0.0.1", 0
    )
    try:
        yield (one := Door(server.sockets[0].getsockname()[1], counts, state.tasks, []))
    finally:
        for writer in one.clients:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


def run(load: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await load()

    asyncio.run(bounded())


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def endless(piece: bytes, total: int = 4 << 20) -> list[bytes]:
    return [piece] * (total // len(piece))


@pytest.mark.parametrize(
    ("begin", "piece", "status"),
    [
        (GET, b"x: y\r\n", 431),
        (GET, b"x" * 30_000 + b": y\r\n", 431),
        (GET + b"x: ", b"y" * 65_536, 431),
        (GET + b"x", b"y" * 65_536, 431),
        (b"GET /", b"y" * 65_536, 414),
        (b"", b"G" * 65_536, 400),
        (b"", b"\r\n" * 30_000, 431),
    ],
    ids=["lines", "large lines", "value", "name", "url", "method", "empty lines"],
)
def test_a_head_ends_or_is_refused(begin: bytes, piece: bytes, status: int):
    async def load() -> None:
        async with door() as server:
            answer = await server.ask(begin, *endless(piece))
            assert status_of(answer) == status
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
            assert server.counts.responses == {status: 1}

    run(load)


def test_a_value_is_never_held_beyond_the_limit():
    """What the parser has gathered of a value that does not end."""
    held = []

    class Watched(LimitedProtocol):
        def _refuse(self, error):
            held.append(self._head_bytes)
            super()._refuse(error)

    async def load() -> None:
        connections = Connections(HttpLimits(), HttpCounts(), lambda _: False)
        config = uvicorn.Config(echo, interface="asgi3", http="httptools", log_config=None)
        config.load()
        server = await asyncio.get_running_loop().create_server(
            lambda: Watched(config, ServerState(), {}, connections), "127.0.0.1", 0
        )
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await _send(writer, (GET + b"x: ",))
        for _ in range(100):
            writer.write(b"y" * 1000)
        await _read(reader)
        with suppress(ConnectionError):
            await writer.wait_closed()
        server.close()

    run(load)
    assert held == [32 * 1024]


def test_trailers_are_dropped_and_bounded():
    head = b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"

    async def load() -> None:
        async with door() as server:
            reader, writer = await server.connect(head + b"authorization: Bearer key\r\n\r\n")
            answer = await reader.readuntil(b"}")
            assert b"authorization" not in answer and b'"size": 5' in answer
            # The connection goes on after them.
            writer.write(GET + b"\r\n")
            assert b"200" in await reader.readuntil(b"}")
            for piece in (b"x: y\r\n", b"y" * 65_536):
                # Its application waits for the body's end, so there is nothing to answer with.
                assert await server.ask(head, *endless(piece)) == b""
            assert server.counts.responses == {431: 2}

    run(load)


def test_a_body_may_be_larger_than_a_head():
    size = 1 << 20
    head = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % size
    chunked = (
        b"POST /a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    )

    async def load() -> None:
        async with door() as server:
            assert b'"size": 1048576' in await server.ask(head, *endless(b"x" * 65_536, size))
            chunks = [b"10000\r\n" + b"x" * 65_536 + b"\r\n"] * 16
            assert b'"size": 1048576' in await server.ask(chunked, *chunks, b"0\r\n\r\n")

    run(load)


def test_many_requests_ahead():
    async def load() -> None:
        async with door() as server:
            few = await server.ask((GET + b"\r\n") * 6 + GET + b"connection: close\r\n\r\n")
            assert few.count(b"HTTP/1.1 200") == 7
            many = await server.ask((GET + b"\r\n") * 1000)
            assert many.count(b"HTTP/1.1 200") == 0

    run(load)


@pytest.mark.parametrize("head", [b"GET / HTTP/1.1\r\n\r\n", GET + b"host: b\r\n\r\n"])
def test_one_host(head: bytes):
    async def load() -> None:
        async with door() as server:
            answer = await server.ask(head)
            assert status_of(answer) == 400 and b"one Host header" in answer
            assert status_of(await server.ask(b"GET / HTTP/1.0\r\n\r\n")) == 200

    run(load)


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"", b""),
        (GET, b"HTTP/1.1 408"),
        (GET + b"\r\n", b"HTTP/1.1 408"),
        (GET + b"content-length: 1000000000\r\n\r\n", b""),
    ],
    ids=["empty", "half a head", "kept alive", "half a body"],
)
def test_heads_have_a_time(first: bytes, answer: bytes):
    async def load() -> None:
        async with door(header_seconds=0.05) as server:
            reader, writer = await server.connect(first)
            if first == GET + b"\r\n":
                await reader.readuntil(b"}")
                writer.write(b"G")
            if b"content-length" in first:
                # A body has the application's deadline.
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.2):
                        await _read(reader)
            else:
                assert (await _read(reader)).startswith(answer)
                assert server.counts.closed["slow"] == 1

    run(load)


def test_dripping_does_not_win_time():
    async def load() -> None:
        async with door(header_seconds=0.1) as server:
            reader, writer = await server.connect(GET)
            reading = asyncio.create_task(_read(reader))
            while not reading.done():
                writer.write(b"x")
                await asyncio.sleep(0.01)
            assert (await reading).startswith(b"HTTP/1.1 408")

    run(load)


def test_a_client_that_does_not_read_is_cut_off():
    async def load() -> None:
        async with door(write_seconds=0.1) as server:
            _, writer = await server.connect(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
            writer.transport.pause_reading()
            while server.counts.connections_open or not server.counts.connections_total:
                await asyncio.sleep(0.01)
            assert server.counts.closed["not reading"] == 1

    run(load)


def test_idle_connections_make_room():
    async def load() -> None:
        async with door(max_connections=4, max_per_address=100) as server:
            for _ in range(12):
                await server.connect(GET)
            answer = await server.ask(GET + b"connection: close\r\n\r\n")
            assert status_of(answer) == 200
            assert server.counts.closed["evicted"] >= 8
            assert server.counts.connections_open <= 4

    run(load)


@pytest.mark.parametrize("own", [True, False], ids=["of an address", "of all"])
def test_health_is_answered_when_every_place_is_taken(own: bool):
    limits = {"max_connections": 100 if own else 3, "max_per_address": 3 if own else 100}
    busy = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"
    close = b"host: a\r\nconnection: close\r\n\r\n"

    async def load() -> None:
        async with door(**limits) as server:
            taken = [await server.connect(busy) for _ in range(3)]
            while len(server.tasks) < 3:
                await asyncio.sleep(0)
            assert status_of(await server.ask(b"GET /health HTTP/1.1\r\n" + close)) == 200
            refused = await server.ask(b"GET /v1/models HTTP/1.1\r\n" + close)
            assert status_of(refused) == 503 and b"retry-after" in refused
            for _, writer in taken:
                writer.transport.abort()
            while server.counts.connections_open:
                await asyncio.sleep(0)
            assert status_of(await server.ask(b"GET /v1/models HTTP/1.1\r\n" + close)) == 200

    run(load)


def test_a_proxy_stands_for_many():
    busy = b"POST /a HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n"

    async def load() -> None:
        async with door(lambda address: address == "127.0.0.1", max_per_address=2) as server:
            for _ in range(5):
                await server.connect(busy)
            answer = await server.ask(b"GET /v1 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert status_of(answer) == 200

    run(load)


def test_networks():
    assert network_of("10.1.2.3") == "10.1.2.3"
    assert (
        network_of("2001:db8:1:2:3:4:5:6") == network_of("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    )
    assert network_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert network_of("fe80::1%eth0") == "fe80::/64"
    assert network_of("a unix socket") == "a unix socket"


def test_files_for_the_connections(monkeypatch: pytest.MonkeyPatch):
    files = [(1024, 1024)]
    monkeypatch.setattr("resource.getrlimit", lambda _: files[0])
    monkeypatch.setattr("resource.setrlimit", lambda _, new: files.insert(0, new))
    assert allow_files(None) == 1024 - OTHER_FILES
    assert allow_files(100) == 100
    with pytest.raises(ConfigError, match="max_connections = 1000: allowed up to 896"):
        allow_files(1000)
    files[0] = (1024, 1 << 20)
    assert allow_files(None) == 4096
    assert files[0] == (65_536, 1 << 20)
