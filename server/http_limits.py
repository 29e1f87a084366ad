"""Limits on connections and on the bytes around a request, held while those bytes arrive.

uvicorn's protocol hands a request on when its headers are complete and sets no bound before that.
This subclass counts bytes, headers and time from a connection's first moment, keeps the number of
connections bounded, and leaves a few places for health probes when all others are taken.
"""

import asyncio
import logging
import resource
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Any

import httptools
import orjson
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from eaglerun.errors import ConfigError
from eaglerun.server.failures import RETRY_AFTER, ApiError, error_object, error_response, new_id

log = logging.getLogger(__name__)

# Files that are open besides connections: the listener, the engine's link, libraries.
OTHER_FILES = 128
MAX_FILES = 65_536
MAX_CONNECTIONS = 4096
PROBES = frozenset({"/health", "/health/ready"})
# Seconds between two log lines about a full server.
LOG_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """What a connection may hold.

    header_seconds   from a connection's start, or a request's first byte, to its whole head
    write_seconds    a client that takes no bytes of its answer for so long is cut off
    max_pipelined    requests sent ahead on one connection
    probe_places     connections above ``max_connections`` that are answered on PROBES only
    """

    max_header_bytes: int = 32 * 1024
    max_url_bytes: int = 8 * 1024
    max_headers: int = 100
    header_seconds: float = 10.0
    write_seconds: float = 60.0
    max_pipelined: int = 8
    max_connections: int = 896
    max_per_address: int = 448
    probe_places: int = 32


def allow_files(max_connections: int | None) -> int:
    """Raise this process's limit of open files, and say how many connections it then leaves.

    ConfigError where ``max_connections`` are more.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    room = (MAX_FILES if soft == resource.RLIM_INFINITY else soft) - OTHER_FILES
    if max_connections is None:
        return max(1, min(MAX_CONNECTIONS, room))
    if max_connections > room:
        raise ConfigError(
            f"max_connections = {max_connections}: allowed up to {max(room, 0)}, for this process "
            f"may open {soft} files (ulimit -n)"
        )
    return max_connections


@lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """The part of an address that one client has to itself: of IPv6 the first 64 bits."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if not isinstance(ip, IPv6Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return f"{IPv6Address(int(ip) >> 64 << 64)}/64"


@dataclass
class HttpCounts:
    """What happened at the door, for /metrics."""

    responses: dict[int, int] = field(default_factory=dict)
    connections_open: int = 0
    connections_total: int = 0
    closed: dict[str, int] = field(
        default_factory=lambda: {"evicted": 0, "refused": 0, "slow": 0, "not reading": 0}
    )

    def responded(self, status: int) -> None:
        self.responses[status] = self.responses.get(status, 0) + 1


class Connections:
    """All connections of a server. ``is_trusted`` names addresses that stand for many clients."""

    def __init__(
        self, limits: HttpLimits, counts: HttpCounts, is_trusted: Callable[[str], bool]
    ) -> None:
        self.limits = limits
        self.counts = counts
        self._is_trusted = is_trusted
        self._by_network: dict[str, int] = {}
        # By network, the longest idle first.
        self._idle: dict[str, dict[LimitedProtocol, None]] = {}
        self._log_due = 0.0

    def admit(self, one: "LimitedProtocol") -> bool | None:
        """Count one in; True: for any request, False: for probes only, None: not at all.

        A connection that waits for nothing but its client makes room for it, if one does.
        """
        limits, network = self.limits, one.network
        counts = self.counts
        counts.connections_total += 1
        counts.connections_open += 1
        held = self._by_network[network] = self._by_network.get(network, 0) + 1
        if held > limits.max_per_address and not self._is_trusted(one.address):
            free = self._evict(network, one)
        elif counts.connections_open > limits.max_connections:
            free = self._evict(self._widest(), one)
        else:
            return True
        if free:
            return True
        if counts.connections_open <= limits.max_connections + limits.probe_places:
            return False
        counts.closed["refused"] += 1
        return None

    def leave(self, one: "LimitedProtocol") -> None:
        self.busy(one)
        self.counts.connections_open -= 1
        left = self._by_network[one.network] - 1
        if left:
            self._by_network[one.network] = left
        else:
            del self._by_network[one.network]

    def idle(self, one: "LimitedProtocol") -> None:
        self._idle.setdefault(one.network, {})[one] = None

    def busy(self, one: "LimitedProtocol") -> None:
        idle = self._idle.get(one.network)
        if idle is not None:
            idle.pop(one, None)
            if not idle:
                del self._idle[one.network]

    def _widest(self) -> str | None:
        """The network with the most idle connections."""
        return max(self._idle, key=lambda network: len(self._idle[network]), default=None)

    def _evict(self, network: str | None, new: "LimitedProtocol") -> bool:
        idle = self._idle.get(network) if network is not None else None
        if now_due := new.loop.time() >= self._log_due:
            self._log_due = new.loop.time() + LOG_EVERY_S
        if now_due:
            log.warning(
                "connections are full: %d are open, %d of them from %s; --max-connections %d, "
                "--max-connections-per-address %d",
                self.counts.connections_open,
                self._by_network[new.network],
                new.network,
                self.limits.max_connections,
                self.limits.max_per_address,
            )
        if not idle:
            return False
        oldest = next(iter(idle))
        self.busy(oldest)
        self.counts.closed["evicted"] += 1
        oldest.transport.abort()
        return True


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.address = self.network = ""
        self._connections = connections
        self._limits = connections.limits
        self._admitted = False
        # Between requests too: what comes next is a head.
        self._in_head, self._head_bytes, self._num_headers = True, 0, 0
        self._in_trailers = False
        self._num_messages = 0
        self._refusal: ApiError | None = None
        self._ended = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # Connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.network = network_of(self.address)
        place = self._connections.admit(self)
        self._admitted = True
        if place is None:
            self._refuse(_full())
            return
        if not place:
            self.app = _probes_only(self.app)
        self._connections.idle(self)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended = True
        self._cancel_timers()
        self._unset_keepalive_if_required()
        if self._admitted:
            self._admitted = False
            self._connections.leave(self)
        super().connection_lost(exc)

    @property
    def _answers(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Bytes of the client

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._unset_keepalive_if_required()
        try:
            while data and not self._ended:
                data = self._feed(data)
        except httptools.HttpParserUpgrade:
            # There is no other protocol here; the request itself is answered.
            return
        except httptools.HttpParserError:
            self._refuse(self._refusal or ApiError(400, "this is not a valid HTTP request"))
            return
        if not self._ended and not self._answers and self._head_timer is None:
            self._expect_head()

    def _feed(self, data: bytes) -> bytes:
        """Parse as much as the limits allow before the next look at them; the rest."""
        counted = self._in_head or self._in_trailers
        if not counted:
            self.parser.feed_data(data)
            return b""
        room = self._limits.max_header_bytes - self._head_bytes
        piece, rest = data[:room], data[room:]
        before = (self._num_messages, self._in_head, self._in_trailers)
        self.parser.feed_data(piece)
        if before == (self._num_messages, self._in_head, self._in_trailers):
            self._head_bytes += len(piece)
            if self._head_bytes >= self._limits.max_header_bytes:
                self._refuse(self._headers_too_large())
        return rest

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self._limits.max_url_bytes:
            self._fail(ApiError(414, f"the URL exceeds {self._limits.max_url_bytes} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > self._limits.max_headers:
            self._fail(ApiError(431, f"more than {self._limits.max_headers} headers"))
        # Trailers are dropped: nothing here wants one, and a proxy does not look at them.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._cancel_head_timer()
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or not hosts and self.parser.get_http_version() != "1.0":
            self._fail(ApiError(400, f"one Host header is wanted, {hosts} came"))
        if len(self.pipeline) >= self._limits.max_pipelined:
            self._fail(ApiError(400, f"more than {self._limits.max_pipelined} requests ahead"))
        self._connections.busy(self)
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        # Of a chunk with content or of the last one, which trailers follow.
        self._in_trailers, self._head_bytes = True, 0

    def on_body(self, body: bytes) -> None:
        self._in_trailers = False
        super().on_body(body)

    def on_chunk_complete(self) -> None:
        self._in_trailers = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._num_messages += 1
        self._in_head, self._in_trailers, self._head_bytes = True, False, 0

    # Answers

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._ended:
            return
        if self.transport.is_closing():
            self._expect_reading()
        elif not self._answers:
            self._connections.idle(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._expect_reading()

    # Time

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_seconds, self._on_slow_head)

    def _on_slow_head(self) -> None:
        self._head_timer = None
        if self._answers:
            return
        self._connections.counts.closed["slow"] += 1
        if self._head_bytes:
            self._refuse(ApiError(408, "the headers did not arrive in time"))
        else:
            self._end()

    def _expect_reading(self) -> None:
        if self._write_timer is None and not self._ended:
            self._write_timer = self.loop.call_later(
                self._limits.write_seconds, self._on_not_reading
            )

    def _on_not_reading(self) -> None:
        self._connections.counts.closed["not reading"] += 1
        self.transport.abort()

    def _cancel_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cancel_timers(self) -> None:
        self._cancel_head_timer()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # Refusals

    def _fail(self, error: ApiError) -> None:
        """Stop the parser, from within one of its calls."""
        self._refusal = error
        raise error

    def _headers_too_large(self) -> ApiError:
        return ApiError(431, f"the headers exceed {self._limits.max_header_bytes} bytes")

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, where no other answer is on its way, and close."""
        if self._ended:
            return
        self._connections.counts.responded(error.status_code)
        log.debug("%s: refused with %d: %s", self.address, error.status_code, error.detail)
        if self._answers:
            self._ended = True
            self.transport.abort()
            return
        id_ = new_id()
        body = orjson.dumps(error_object(error, id_))
        lines = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "x-request-id": id_,
            "connection": "close",
        } | dict(error.headers or {})
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode()
        self.transport.write(STATUS_LINE[error.status_code] + head + b"\r\n" + body)
        self._end()

    def _end(self) -> None:
        """Close once what was written has left."""
        self._expect_reading()
        self._ended = True
        self._cancel_head_timer()
        self.transport.close()


def _full() -> ApiError:
    return ApiError(
        503, "too many connections are open; try again later", None, "overloaded", RETRY_AFTER
    )


def _probes_only(app: ASGIApp) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """``app`` for health probes; all else is told that the server is full."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await app(scope, receive, send)
        else:
            error = _full()
            error.headers = {**RETRY_AFTER, "connection": "close"}
            await error_response(error, new_id())(scope, receive, send)

    return answer
