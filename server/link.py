"""The Unix socket between the two processes: one connection, frames of msgspec bytes both ways.

The HTTP process listens at a file with mode 0600 in a directory that only this user can enter, and
takes both away when the engine has connected. No thread and no queue stands between a frame and
its reader: every token passes here, and a hand-over to another thread costs more time than all
else that is done with it.
"""

import asyncio
import contextlib
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

from eaglerun.errors import ConfigError
from eaglerun.server import wire

# What the kernel takes as the path of a Unix socket.
MAX_PATH = 107
# A frame is its length, in so many bytes with the lowest first, and then that many bytes.
LENGTH_BYTES = 4
READ_BYTES = 1 << 18
# How long the last frames of an engine that has ended may take.
LAST_FRAMES_S = 1.0


class Hangup(Exception):
    """The process at the other end has ended."""


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def read_frame(link: socket.socket) -> bytearray | None:
    """The next frame's content; None at the other end's end. For a socket that blocks."""
    length = _read_exactly(link, LENGTH_BYTES)
    return None if length is None else _read_exactly(link, int.from_bytes(length, "little"))


def _read_exactly(link: socket.socket, size: int) -> bytearray | None:
    content = bytearray(size)
    view, at = memoryview(content), 0
    while at < size:
        got = link.recv_into(view[at:])
        if not got:
            return None
        at += got
    return content


class Frames:
    """Bytes as they arrive, taken out as whole frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._at = 0

    def __bool__(self) -> bool:
        """Whether there is any byte, be it of a frame that is not whole yet."""
        return self._at < len(self._bytes)

    def add(self, data: bytes) -> None:
        del self._bytes[: self._at]
        self._at = 0
        self._bytes += data

    def take(self) -> bytearray | None:
        """The content of the next whole frame, if there is one."""
        start = self._at + LENGTH_BYTES
        end = start + int.from_bytes(self._bytes[self._at : start], "little")
        if start > len(self._bytes) or end > len(self._bytes):
            return None
        self._at = end
        return self._bytes[start:end]


class EngineLink(asyncio.Protocol):
    """The HTTP process's end: sends commands without ever waiting; reports are handed over.

    ``on_report`` is called with one report in a turn of the event loop, so that the streams can
    write what one brought before the next comes; meanwhile the engine waits.
    """

    def __init__(self, on_report: Callable[[wire.Report], None]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="eaglerun-"))
        self.address = str(self.directory / "engine")
        self._on_report = on_report
        self._frames = Frames()
        self._loop = asyncio.get_running_loop()
        self._server: asyncio.Server | None = None
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()

    async def listen(self) -> None:
        """Make the socket. ConfigError where its path is too long for one."""
        if len(self.address) > MAX_PATH:
            self.close()
            raise ConfigError(
                f"{self.address} is too long for a socket: set TMPDIR to a shorter path"
            )
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.address)
        Path(self.address).chmod(0o600)
        self._server = await self._loop.create_unix_server(lambda: self, sock=listener)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one in all but name.
        self._transport = cast(asyncio.Transport, transport)
        self._stop_listening()

    def data_received(self, data: bytes) -> None:
        self._frames.add(data)
        self._hand_over()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._ended.set()

    def send(self, command: wire.Command) -> bool:
        """Whether there is an engine to take it."""
        if self._transport is None or self._transport.is_closing():
            return False
        self._transport.write(frame(wire.encode(command)))
        return True

    async def finish(self) -> None:
        """The engine has ended: hand over its last reports, and close."""
        if self._transport is not None:
            # Whatever else holds the other end, if anything does, is not waited for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_FRAMES_S):
                    await self._ended.wait()
        self.close()

    def close(self) -> None:
        self._stop_listening()
        if self._transport is not None:
            self._transport.close()

    def _hand_over(self) -> None:
        content = self._frames.take()
        if content is not None:
            self._on_report(wire.decode_report(content))
        if self._transport is None or self._transport.is_closing():
            return
        if content is not None and self._frames:
            self._transport.pause_reading()
            self._loop.call_soon(self._hand_over)
        else:
            self._transport.resume_reading()

    def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        shutil.rmtree(self.directory, ignore_errors=True)


class HttpLink:
    """The engine's end. Raises Hangup where the HTTP process has ended."""

    def __init__(self, address: str) -> None:
        self._frames = Frames()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)

    def send(self, report: wire.Report) -> None:
        """Waits while the HTTP process is behind by what the socket holds."""
        try:
            self._socket.sendall(frame(wire.encode(report)))
        except ConnectionError:
            raise Hangup from None

    def receive(self, wait: bool) -> wire.Command | None:
        """The next command; None if there is none and none is waited for."""
        while (content := self._frames.take()) is None:
            try:
                data = self._socket.recv(READ_BYTES, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionError:
                raise Hangup from None
            if not data:
                raise Hangup
            self._frames.add(data)
        return wire.decode_command(content)

    def close(self) -> None:
        self._socket.close()
