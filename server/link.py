"""The Unix socket between the two processes: one connection, frames of msgspec bytes both ways.

It is a pair of sockets of which the engine's process inherits one end, so it has no name that
another could connect to or that would be left behind. No thread and no queue stands between a frame
and its reader: every token passes here, and a hand-over to another thread costs more time than all
else that is done with it.
"""

import asyncio
import contextlib
import logging
import select
import socket
import struct
from collections.abc import Callable
from typing import cast

import msgspec

from eaglerun.server import wire

log = logging.getLogger(__name__)

# A frame is its length, in so many bytes with the lowest first, and then that many bytes.
LENGTH_BYTES = 4
READ_BYTES = 1 << 18
# Far more than a step or a request can be; a longer frame is none of ours.
MAX_FRAME_BYTES = 1 << 29
# How long the last frames of an engine that has ended may take.
LAST_FRAMES_S = 1.0
# An HTTP process that takes nothing for so long hangs; while it only is behind, the engine waits.
SEND_TIMEOUT_S = 300.0
# What decoding raises; text that is no UTF-8 has an error of its own.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError)


class Hangup(Exception):
    """The process at the other end has ended, or hangs, which the message says then."""


class BadFrame(Exception):
    """What came is not a frame that the other end would send."""


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "little") + content


def length_of(head: bytes | bytearray) -> int:
    """What a frame's first bytes say. BadFrame if that is too long."""
    length = int.from_bytes(head, "little")
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {length} bytes, allowed {MAX_FRAME_BYTES}")
    return length


def read_frame(link: socket.socket) -> bytearray | None:
    """The next frame's content; None at the other end's end. For a socket that blocks."""
    head = read_exactly(link, LENGTH_BYTES)
    return None if head is None else read_exactly(link, length_of(head))


def read_exactly(link: socket.socket, size: int) -> bytearray | None:
    """So many bytes; None at the other end's end. For a socket that blocks."""
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
        """The content of the next whole frame, if there is one. BadFrame for one too long."""
        start = self._at + LENGTH_BYTES
        if start > len(self._bytes):
            return None
        end = start + length_of(self._bytes[self._at : start])
        if end > len(self._bytes):
            return None
        self._at = end
        return self._bytes[start:end]


class EngineLink(asyncio.Protocol):
    """The HTTP process's end: sends commands without ever waiting; reports are handed over.

    ``on_report`` is called with one report in a turn of the event loop, so that the streams can
    write what one brought before the next comes; meanwhile the engine waits.
    """

    def __init__(self, on_report: Callable[[wire.Report], None]) -> None:
        self._on_report = on_report
        self._frames = Frames()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._ended = asyncio.Event()

    async def connect(self) -> socket.socket:
        """The engine's end: for its process to inherit, then to be closed here."""
        ours, theirs = socket.socketpair()
        await self._loop.create_unix_connection(lambda: self, sock=ours)
        return theirs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one in all but name.
        self._transport = cast(asyncio.Transport, transport)

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
        if self._transport is not None:
            self._transport.close()

    def _hand_over(self) -> None:
        try:
            content = self._frames.take()
            report = None if content is None else wire.decode_report(content)
        except (BadFrame, *UNDECODABLE) as error:
            # There is no telling where the next one begins. The engine ends without its link.
            log.error("bad frame from the engine process, which is left: %s", error)
            if self._transport is not None:
                self._transport.abort()
            return
        if report is not None:
            self._on_report(report)
        if self._transport is None or self._transport.is_closing():
            return
        if report is not None and self._frames:
            self._transport.pause_reading()
            self._loop.call_soon(self._hand_over)
        else:
            self._transport.resume_reading()


class HttpLink:
    """The engine's end, an open file. Raises Hangup where the HTTP process has ended or hangs,
    BadFrame for what is not a command."""

    def __init__(self, file: int) -> None:
        self._frames = Frames()
        self._socket = socket.socket(fileno=file)
        limit = struct.pack("@ll", int(SEND_TIMEOUT_S), int(SEND_TIMEOUT_S % 1 * 1e6))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, report: wire.Report) -> None:
        """Waits while the HTTP process is behind by what the socket holds."""
        try:
            self._socket.sendall(frame(wire.encode(report)))
        except BlockingIOError:
            raise Hangup(f"it took nothing for {SEND_TIMEOUT_S:g} s") from None
        except ConnectionError:
            raise Hangup from None

    def receive(self, wait_s: float | None) -> wire.Command | None:
        """The next command, waited for so long, None: for ever. None if none came."""
        while (content := self._frames.take()) is None:
            if wait_s:
                select.select([self._socket], [], [], wait_s)
            try:
                data = self._socket.recv(READ_BYTES, 0 if wait_s is None else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except ConnectionError:
                raise Hangup from None
            if not data:
                raise Hangup
            self._frames.add(data)
        try:
            return wire.decode_command(content)
        except UNDECODABLE as error:
            raise BadFrame(str(error)) from None

    def close(self) -> None:
        self._socket.close()
