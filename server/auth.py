"""The guard before every route: request ids, API keys, rate limits, sizes of what is sent.

A plain ASGI middleware, so that a streamed answer passes through it chunk by chunk at the cost of
one call each.
"""

import asyncio
import hmac
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eaglerun.errors import CapacityError
from eaglerun.server.bodies import HELD, LIMITS
from eaglerun.server.failures import (
    REQUEST_ID,
    ApiError,
    as_api_error,
    error_response,
    new_id,
    overloaded,
)
from eaglerun.server.http_limits import network_of
from eaglerun.server.identity import CLIENT, Client
from eaglerun.server.settings import Limits, RateLimit, Settings

# Clients whose buckets are remembered; the one seen longest ago is forgotten first.
MAX_BUCKETS = 4096
# Wrong keys from one address. Past this rate no further key of that address is looked at, but for
# those that were right there before.
WRONG_KEYS = RateLimit(requests_per_second=0.5, burst=20)

_OUR_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
_CLOSE = {"connection": "close"}


class Guard:
    """Refuses before anything is parsed; what passes carries its request id in the scope.

    The id is the client's X-Request-Id where that is a plain word, else a new one; the answer's
    header repeats it. A POST to one of ``queued_paths`` is refused where ``check_room`` raises
    CapacityError.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        *,
        check_room: Callable[[], None],
        queued_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._settings = settings
        self._check_room = check_room
        self._queued_paths = queued_paths
        self._keys = tuple(_digest(key) for key in settings.api_keys)
        self._priority_keys = frozenset(_digest(key) for key in settings.priority_keys)
        self._all_prioritise = "all" in settings.priority_keys
        rate = settings.rate_limit
        self._buckets = None if rate is None else Buckets(rate, clock)
        self._held = HeldBytes(settings.limits.max_held_bytes)
        self._wrong_keys = Buckets(WRONG_KEYS, clock)
        # Digests of right keys by the addresses they came from, the latest last.
        self._seen: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        id_ = given if _OUR_ID.fullmatch(given) else new_id()
        scope[REQUEST_ID] = id_
        scope[LIMITS] = self._settings.limits
        id_header = (b"x-request-id", id_.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), id_header]
            await send(message)

        try:
            self._check(scope, headers)
        except (ApiError, CapacityError) as error:
            await error_response(as_api_error(error, {}), id_)(scope, receive, send_with_id)
            return
        body = scope[HELD] = LimitedBody(receive, self._settings.limits, self._held)
        try:
            await self._app(scope, body.receive, send_with_id)
        finally:
            body.release()

    def _check(self, scope: Scope, headers: Headers) -> None:
        limits = self._settings.limits
        host = headers.get("host")
        if host is not None and host not in self._settings.hosts:
            raise ApiError(
                403,
                "this server does not answer to the host in the Host header; its operator may "
                "allow it (--allowed-hosts)",
                code="host_not_allowed",
            )
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > limits.max_header_bytes:
            raise ApiError(431, f"the headers exceed {limits.max_header_bytes} bytes")
        address, digest = self._client(scope, headers)
        CLIENT.set(self._identity(digest))
        if self._buckets is not None and scope["method"] == "POST":
            wait = self._buckets.take(address if digest is None else digest.hex())
            if wait > 0:
                raise ApiError(
                    429,
                    "too many requests for this key",
                    code="rate_limit_exceeded",
                    headers=_retry_after(wait),
                )
        length = headers.get("content-length", "")
        if length.isdecimal() and len(length) < 20 and int(length) > limits.max_body_bytes:
            raise _too_large(limits)
        if scope["method"] == "POST" and scope["path"] in self._queued_paths:
            self._check_room()

    def _client(self, scope: Scope, headers: Headers) -> tuple[str, bytes | None]:
        """Who asks: an address, and the digest of a valid key where one is wanted. ApiError without
        a valid key."""
        address = network_of(str((scope.get("client") or ("",))[0]))
        if not self._keys or scope["path"] in self._settings.open_paths:
            return address, None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip())
        if (address, digest) not in self._seen:
            self._check_key(address, scheme.lower(), digest)
        return address, digest

    def _identity(self, digest: bytes | None) -> Client:
        if digest is None:
            return Client("", self._all_prioritise)
        salt = digest.hex() if self._settings.prefix_cache_by_key else ""
        return Client(salt, self._all_prioritise or digest in self._priority_keys)

    def _check_key(self, address: str, scheme: str, digest: bytes) -> None:
        wait = self._wrong_keys.wait(address)
        if wait > 0:
            raise ApiError(
                429,
                "too many wrong API keys came from this address",
                code="rate_limit_exceeded",
                headers=_retry_after(wait),
            )
        # Every key is compared, so that the time taken tells nothing about which one was close.
        matches = [hmac.compare_digest(digest, known) for known in self._keys]
        if scheme != "bearer" or not any(matches):
            self._wrong_keys.take(address)
            raise ApiError(
                401,
                "this server wants an API key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        self._seen[address, digest] = None
        if len(self._seen) > MAX_BUCKETS:
            self._seen.popitem(last=False)


class Buckets:
    """Token buckets by client: ``burst`` at once, then so many a second."""

    def __init__(self, rate: RateLimit, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take one token; else the seconds until there is one."""
        tokens, now = self._tokens(client)
        wait = self._wait(tokens)
        self._buckets.pop(client, None)
        self._buckets[client] = (tokens if wait else tokens - 1, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return wait

    def wait(self, client: str) -> float:
        """The seconds until there is a token."""
        return self._wait(self._tokens(client)[0])

    def _tokens(self, client: str) -> tuple[float, float]:
        """What the client has, and the time now."""
        now = self._clock()
        tokens, seen = self._buckets.get(client, (float(self._rate.burst), now))
        tokens += (now - seen) * self._rate.requests_per_second
        return min(self._rate.burst, tokens), now

    def _wait(self, tokens: float) -> float:
        return 0.0 if tokens >= 1 else (1 - tokens) / self._rate.requests_per_second


class HeldBytes:
    """Bytes of all bodies that are here and not yet prepared."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.now = 0

    def take(self, size: int) -> bool:
        """Whether there is room for so many more; one body alone always has it."""
        if self.now and self.now + size > self._limit:
            return False
        self.now += size
        return True


class LimitedBody:
    """A request's body as it arrives, up to a size and a time."""

    def __init__(self, receive: Receive, limits: Limits, held: HeldBytes) -> None:
        self._receive = receive
        self._limits = limits
        self._held = held
        self._num_held = 0
        self._size = 0
        self._deadline: float | None = None
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + self._limits.max_body_seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the body did not arrive in time", headers=_CLOSE) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._size += size
            self._complete = not message.get("more_body", False)
            if self._size > self._limits.max_body_bytes:
                raise _too_large(self._limits)
            if not self._held.take(size):
                raise overloaded("too many large bodies are arriving", _CLOSE)
            self._num_held += size
        return message

    def release(self) -> None:
        """The body is needed no more."""
        self._held.now -= self._num_held
        self._num_held = 0


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body exceeds {limits.max_body_bytes} bytes", headers=_CLOSE)


def _retry_after(wait_s: float) -> dict[str, str]:
    return {"retry-after": str(int(wait_s) + 1)}


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
