"""Events of the engine to one HTTP answer: server-sent events as they come, or one JSON body.

What the bytes are is a Writer's business (chat_answer, completion_answer, responses_answer); this
module runs the requests, watches the client, and ends both sides in every case.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eaglerun.errors import CapacityError, EngineError, RequestError
from eaglerun.messages import Event, Failed, Finished, FinishReason, Request, Tokens
from eaglerun.server.client import EngineClient, Events
from eaglerun.server.failures import (
    RETRY_AFTER,
    ApiError,
    as_api_error,
    error_object,
    request_id,
)

log = logging.getLogger(__name__)

NOT_FINITE = "the model's numbers for this request are not finite (NaN or Inf); it was ended"
DONE = b"data: [DONE]\n\n"
# In the scope: the HTTP server's own send. The layers above it look at the first message of an
# answer only, so that the others need not pass through them.
BODY_SEND = "eaglerun.body_send"

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def sse(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


class Writer(Protocol):
    """Makes the bytes of one answer out of its events; b"" where there is nothing to send yet.

    ``streams``: the bytes are server-sent events; else ``end`` returns the one JSON body.
    """

    streams: bool

    def tokens(self, event: Tokens) -> bytes: ...

    def finished(self, event: Finished) -> bytes: ...

    def end(self) -> bytes: ...

    def failed(self, error: dict[str, Any]) -> bytes:
        """The end of a stream that broke off; ``error`` is the error body."""
        ...


class Answer(Response):
    """Runs ``requests``, all of one HTTP request, and answers with what ``writer`` makes of them.

    The status line leaves with the first bytes of the answer, so that a request that fails before
    them has a status of its own. A client that goes away aborts the requests. ``names`` are the
    route's names of fields that the engine calls otherwise.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Request],
        writer: Writer,
        names: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._client = client
        self.requests = requests
        self._writer = writer
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = _Reply(send, scope.get(BODY_SEND, send), self._writer.streams)
        async with DisconnectWatch(receive) as watch:
            try:
                # A task of its own: else every event's waking would walk down through the frames
                # of all that awaits this call, the routes and the middleware.
                await asyncio.create_task(self._run(reply, watch))
            except (ApiError, RequestError, CapacityError, EngineError) as error:
                known = as_api_error(error, self._names)
                if not reply.started:
                    raise known from error
                id_ = request_id(scope)
                log.warning("request %s broke off: %s", id_, error)
                watch.stop()
                await reply.send(self._writer.failed(error_object(known, id_)), last=True)

    async def _run(self, reply: "_Reply", watch: "DisconnectWatch") -> None:
        writer = self._writer
        left = sum(request.sampling.n for request in self.requests)
        events = await self._submit()
        try:
            async for event in events:
                chunk = b""
                try:
                    for arrived in (event, *events.take_ready()):
                        chunk += self._bytes(arrived)
                        left -= type(arrived) is Finished
                except ApiError:
                    # What came before the failure was said.
                    if chunk:
                        await reply.send(chunk, last=False)
                    raise
                if not left:
                    watch.stop()
                    await reply.send(chunk + writer.end(), last=True)
                    return
                if chunk:
                    await reply.send(chunk, last=False)
        finally:
            await events.aclose()
        raise EngineError("the engine's events ended before the request did")

    def _bytes(self, event: Event) -> bytes:
        if type(event) is Tokens:
            return self._writer.tokens(event)
        if type(event) is Finished:
            if event.reason is FinishReason.ERROR:
                raise ApiError(500, NOT_FINITE, code="not_finite")
            return self._writer.finished(event)
        assert type(event) is Failed
        raise ApiError(503, event.message, headers=RETRY_AFTER)

    async def _submit(self) -> Events:
        if len(self.requests) == 1:
            return await self._client.submit(self.requests[0])
        # All or none: a part that was taken and aborted would keep others out meanwhile.
        self._client.check_room(
            sum(request.sampling.n for request in self.requests),
            sum(len(request.prompt_ids) for request in self.requests),
        )
        tasks = [asyncio.create_task(self._client.submit(request)) for request in self.requests]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(end, BaseException):
                    await end.aclose()
            raise
        return Merged([task.result() for task in tasks])


class _Reply:
    """The answer's side of the connection. ``send_body`` takes what follows the first message."""

    def __init__(self, send: Send, send_body: Send, streams: bool) -> None:
        self._send = send
        self._send_body = send_body
        self._streams = streams
        self.started = False

    async def send(self, chunk: bytes, last: bool) -> None:
        if not self.started:
            self.started = True
            headers = _STREAM_HEADERS
            if not self._streams:
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(chunk)),
                ]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send_body({"type": "http.response.body", "body": chunk, "more_body": not last})


class DisconnectWatch:
    """Cancels the body of its ``async with`` when the client goes away, and then goes on after it.

    The request's body must have been read. ``stop`` comes before the last bytes are sent: servers
    also call a completed answer a disconnect.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False

    async def __aenter__(self) -> "DisconnectWatch":
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.stop()
        return self._gone and kind is asyncio.CancelledError and self._task.uncancel() == 0

    def stop(self) -> None:
        self._watcher.cancel()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()


class Merged:
    """The events of several requests as they come. ``aclose`` aborts all that are open."""

    def __init__(self, several: Sequence[Events]) -> None:
        self._several = several
        # A request's task stands in the queue behind its last event.
        self._arrived: asyncio.Queue[Event | asyncio.Task[None]] = asyncio.Queue()
        self._ended: asyncio.Task[None] | None = None
        self._tasks = [asyncio.create_task(self._pump(events)) for events in several]
        self._num_open = len(several)

    def __aiter__(self) -> "Merged":
        return self

    async def __anext__(self) -> Event:
        while self._num_open:
            arrived = self._ended or await self._arrived.get()
            if not isinstance(arrived, asyncio.Task):
                return arrived
            self._ended = None
            self._num_open -= 1
            # Raises what that request's events raised.
            await arrived
        raise StopAsyncIteration

    def take_ready(self) -> list[Event]:
        ready: list[Event] = []
        while self._ended is None and not self._arrived.empty():
            arrived = self._arrived.get_nowait()
            if isinstance(arrived, asyncio.Task):
                self._ended = arrived
            else:
                ready.append(arrived)
        return ready

    async def aclose(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for events in self._several:
            await events.aclose()

    async def _pump(self, events: Events) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            async for event in events:
                self._arrived.put_nowait(event)
        finally:
            self._arrived.put_nowait(task)
