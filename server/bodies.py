"""Request bodies: counted before they are parsed, and parsed elsewhere where that takes long.

Parsing and checking hold the interpreter lock in one piece; every stream waits meanwhile. So only
a small body is parsed on the event loop; see eaglerun.server.prepare for the others.
"""

import asyncio
import re
import zlib
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from eaglerun.server.chat import Chat
from eaglerun.server.failures import ApiError
from eaglerun.server.prepared import PREPARED
from eaglerun.server.settings import Limits
from eaglerun.server.stream import DisconnectWatch

LIMITS, HELD = "eaglerun.limits", "eaglerun.held"
# A body up to this size and number of values is parsed on the event loop: about 5 ms at most.
SMALL_BYTES, SMALL_VALUES = 32 << 10, 2_000

# A string, to the end of the body where it is not closed.
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)'
_STRINGS = re.compile(_STRING, re.DOTALL)
_BRACKETS = re.compile(_STRING + rb"|[\[{\]}]", re.DOTALL)
_JSON_TYPE = re.compile(r"application/(?:[\w.+-]+\+)?json\s*(?:;|$)", re.ASCII | re.IGNORECASE)


def count_nodes(content: bytes) -> tuple[int, int]:
    """Values (at most so many, for what a string holds counts too) and lists and objects."""
    containers = content.count(b"[") + content.count(b"{")
    return content.count(b",") + containers + 1, containers


def check_nodes(content: bytes, limits: Limits) -> None:
    """ApiError for more values than a body may have; each becomes an object of Python."""
    values, containers = count_nodes(content)
    if values <= limits.max_values and containers <= limits.max_containers:
        return
    values, containers = count_nodes(_STRINGS.sub(b"", content))
    if values > limits.max_values:
        raise ApiError(400, f"the body has more than {limits.max_values} values")
    if containers > limits.max_containers:
        raise ApiError(400, f"the body has more than {limits.max_containers} lists and objects")


def is_nested(body: bytes, limit: int) -> bool:
    """Whether brackets and braces, outside strings, stand more than ``limit`` deep."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    depth = 0
    for match in _BRACKETS.finditer(body):
        char = match[0][:1]
        if char in b"[{":
            depth += 1
            if depth > limit:
                return True
        elif char in b"]}":
            depth -= 1
    return False


def unpacked(body: bytes, encoding: str, limit: int) -> bytes:
    """A body without its content encoding. ApiError for one that is broken, too large, unknown."""
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise ApiError(415, "content-encoding: only gzip and identity are supported")
    unzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        found = unzip.decompress(body, limit + 1)
    except zlib.error:
        raise ApiError(400, "the body is not what gzip makes") from None
    if len(found) > limit:
        raise ApiError(413, f"the body unpacks to more than {limit} bytes")
    if not unzip.eof or unzip.unused_data:
        raise ApiError(400, "the body is not what gzip makes")
    return found


class JsonRequest(Request):
    """A request whose JSON body is parsed by orjson, is not nested too deeply, not too large.

    A body may come compressed by gzip; the limit of its size holds for what it unpacks to.
    """

    _unpacked: bytes | None = None

    async def body(self) -> bytes:
        if self._unpacked is None:
            packed = await super().body()
            encoding = self.headers.get("content-encoding", "")
            limit = self.scope[LIMITS].max_body_bytes
            # zlib gives the interpreter lock back; a thread keeps the streams going.
            self._unpacked = (
                await asyncio.to_thread(unpacked, packed, encoding, limit) if encoding else packed
            )
        return self._unpacked

    async def json(self) -> object:
        body = await self.body()
        limits: Limits = self.scope[LIMITS]
        if is_nested(body, limits.max_nesting):
            raise ApiError(400, f"the body is nested deeper than {limits.max_nesting}")
        check_nodes(body, limits)
        return orjson.loads(body)

    def is_small(self, content: bytes) -> bool:
        """Whether the body takes next to no time here, or is not looked at anyway."""
        if len(content) <= SMALL_BYTES and count_nodes(content)[0] <= SMALL_VALUES:
            return True
        kind = self.headers.get("content-type", "")
        return self.method != "POST" or _JSON_TYPE.match(kind) is None


class ReducedRequest(JsonRequest):
    """A request whose body was checked and prepared elsewhere; a small one stands for it."""

    reduced = b""

    async def body(self) -> bytes:
        return self.reduced


def json_route(chat: Chat) -> type[APIRoute]:
    """Routes whose bodies are JSON. A client that goes away ends the work on its request."""

    class JsonRoute(APIRoute):
        """HEAD is answered where GET is."""

        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            match, child = super().matches(scope)
            if match is Match.PARTIAL and self._is_head(scope):
                match = Match.FULL
            return match, child

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            if self._is_head(scope):
                await self.app(scope, receive, send)
            else:
                await super().handle(scope, receive, send)

        def _is_head(self, scope: Scope) -> bool:
            return scope["method"] == "HEAD" and "GET" in (self.methods or ())

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def handle_json(request: Request) -> Response:
                json_request = JsonRequest(request.scope, request.receive)
                with suppress(ClientDisconnect):
                    try:
                        content = await json_request.body()
                        async with DisconnectWatch(request.receive):
                            if json_request.is_small(content):
                                return await handle(json_request)
                            return await _prepared(chat, json_request, content, handle)
                    finally:
                        request.scope[HELD].release()
                # Nobody reads this.
                return Response(status_code=499)

            return handle_json

    return JsonRoute


async def _prepared(
    chat: Chat,
    request: JsonRequest,
    content: bytes,
    handle: Callable[[Request], Coroutine[Any, Any, Response]],
) -> Response:
    found = await chat.prepare_body(request.scope["path"], content)
    if isinstance(found, bytes):
        return Response(found, media_type="application/json")
    if found is None:
        return await handle(request)
    reduced = ReducedRequest(request.scope, request.receive)
    reduced.reduced = found.body
    token = PREPARED.set(found)
    try:
        return await handle(reduced)
    finally:
        PREPARED.reset(token)
