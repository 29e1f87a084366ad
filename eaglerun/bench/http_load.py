"""Streamed completions over HTTP, many at once, with the time at which every part of them came.

While a wave runs, what comes is kept with its time and not looked at, so that the client stays far
from being what is measured. It is parsed once all answers have ended.
"""

import asyncio
import json
import ssl
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from eaglerun.errors import ConfigError
from eaglerun.server.http_partner import ServerError, parsed_url, words_of

# The engine gives a step up after 300 s; a server that is silent for longer tells nothing more.
SILENCE_S = 330.0
# For what a server has ready.
PATIENCE_S = 10.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(slots=True)
class Recording:
    """One answer: its path, when its request was sent (seconds of time.perf_counter), and each read
    of its bytes with the time."""

    path: str
    sent: float
    reads: list[tuple[float, bytes]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer. ``arrivals``: when each event with text came; with drafts, one holds several
    tokens, and text that a tokenizer holds back comes with the next."""

    sent: float
    arrivals: tuple[float, ...]
    num_tokens: int

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals[0] - self.sent) * 1e3

    @property
    def gaps_ms(self) -> list[float]:
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(later - earlier) * 1e3 for earlier, later in pairs]


class Client:
    """Asks one server. Raises ServerError where it cannot be reached, refuses, or breaks off."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = parsed_url(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self.where = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._headers = f"host: {parts.netloc}\r\nconnection: close\r\n"
        if api_key is not None:
            self._headers += f"authorization: Bearer {api_key.partition(',')[0]}\r\n"

    async def get(self, path: str) -> str:
        """The body of a 200."""
        with self._errors():
            async with asyncio.timeout(PATIENCE_S) as alive:
                connection = await self._open()
                try:
                    request = self._request(path)
                    recording = await _record(connection, path, request, alive, PATIENCE_S)
                finally:
                    connection[1].close()
        return b"".join(piece for _, piece in self._body(recording)).decode()

    async def wave(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """Stream all of them from /v1/completions: all are connected, then all are sent."""
        path = "/v1/completions"
        requests = [self._request(path, body) for body in bodies]
        connections: list[Connection] = []
        try:
            with self._errors():
                async with asyncio.timeout(SILENCE_S) as alive:
                    for _ in requests:
                        connections.append(await self._open())
                    both = zip(connections, requests, strict=True)
                    found = await asyncio.gather(
                        *(_record(c, path, request, alive, SILENCE_S) for c, request in both)
                    )
        finally:
            for _, writer in connections:
                writer.close()
        return [self._answer(recording) for recording in found]

    async def _open(self) -> Connection:
        return await asyncio.open_connection(self._host, self._port, ssl=self._tls)

    def _request(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        if body is None:
            return f"GET {self._base}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()
        content = json.dumps(body).encode()
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._headers}"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        return head.encode() + content

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise ServerError(f"{self.where} sends nothing more") from error
        except OSError as error:
            words = error.strerror or str(error) or type(error).__name__
            raise ServerError(f"no answer from {self.where}: {words}") from error

    def _answer(self, recording: Recording) -> Answer:
        arrivals: list[float] = []
        told: list[float] = []
        num_tokens = None
        for when, event in self._events(recording):
            if "error" in event:
                raise ServerError(f"an answer of {self.where} broke off: {words_of(event)}")
            choices = event.get("choices") or ()
            if choices:
                told.append(when)
            if any(choice.get("text") for choice in choices):
                arrivals.append(when)
            if event.get("usage"):
                num_tokens = int(event["usage"]["completion_tokens"])
        if num_tokens is None or not told:
            raise ServerError(f"{self.where} ended an answer without saying how long it is")
        return Answer(recording.sent, tuple(arrivals or told[:1]), num_tokens)

    def _events(self, recording: Recording) -> Iterator[tuple[float, dict[str, Any]]]:
        """Server-sent events, each with the time at which its last byte came."""
        rest = b""
        for when, piece in self._body(recording):
            *events, rest = (rest + piece).split(b"\n\n")
            for data in (event.removeprefix(b"data:").strip() for event in events):
                if data == b"[DONE]":
                    return
                if data.startswith(b"{"):
                    yield when, json.loads(data)
        raise ServerError(f"{self.where} closed the connection inside an answer")

    def _body(self, recording: Recording) -> list[tuple[float, bytes]]:
        """The pieces of a 200's body, each with the time at which its last byte came."""
        ends, end = [], 0
        for _, data in recording.reads:
            end += len(data)
            ends.append(end)
        head, blank, body = b"".join(data for _, data in recording.reads).partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        status = lines[0].split(" ")[1:2]
        if not blank or not status:
            raise ServerError(f"{self.where} closed the connection before it answered")
        start = len(head) + len(blank)
        if "transfer-encoding: chunked" in (line.lower() for line in lines[1:]):
            pieces = list(_chunks(body))
        else:
            pieces = [(len(body), body)]
        if status != ["200"]:
            raise self._refusal(status[0], recording.path, b"".join(p for _, p in pieces))
        return [
            (recording.reads[bisect_left(ends, start + offset)][0], piece)
            for offset, piece in pieces
            if piece
        ]

    def _refusal(self, status: str, path: str, body: bytes) -> ServerError | ConfigError:
        try:
            words = words_of(json.loads(body))
        except ValueError:
            words = body.decode(errors="replace")[:200]
        if status == "401":
            return ConfigError(f"{self.where} wants another API key: --api-key KEY ({words})")
        return ServerError(f"{self.where}{path} answers {status}: {words}")


async def _record(
    connection: Connection, path: str, request: bytes, alive: asyncio.Timeout, silence_s: float
) -> Recording:
    reader, writer = connection
    now = asyncio.get_running_loop().time
    recording = Recording(path, time.perf_counter())
    writer.write(request)
    while data := await reader.read(1 << 16):
        recording.reads.append((time.perf_counter(), data))
        alive.reschedule(now() + silence_s)
    return recording


def _chunks(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The chunks of a body as far as they came whole, each with the offset of its end."""
    at = 0
    while (line := body.find(b"\r\n", at)) >= 0:
        size = int(body[at:line].partition(b";")[0], 16)
        end = line + 2 + size
        if not size or end > len(body):
            return
        yield end, body[line + 2 : end]
        at = end + 2
