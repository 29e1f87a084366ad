"""The client of an engine in a process of its own: starts it, talks to it, notices its end."""

import asyncio
import contextlib
import logging
from asyncio.subprocess import Process
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from eaglerun.config import Config
from eaglerun.errors import CapacityError, ConfigError, EngineError, RequestError
from eaglerun.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SpeculationStats,
    Tokens,
)
from eaglerun.server import wire
from eaglerun.server.client import EngineStatus
from eaglerun.server.link import EngineLink
from eaglerun.server.metrics import RequestMetrics
from eaglerun.server.wire import Totals

log = logging.getLogger(__name__)

# How long an engine that was told to stop may take before it is killed.
STOP_S = 5.0
DIED = "the engine died"
# So many answers in a row whose numbers are not finite make the server not ready, for so long.
BROKEN_AFTER, BROKEN_FOR_S = 3, 60.0


class RequestEvents:
    """Events of one request: the ProcessClient puts them in, a route takes them out."""

    def __init__(
        self,
        request: Request,
        now: float,
        abort: Callable[[str], None],
        deadline: asyncio.TimerHandle,
    ) -> None:
        self.request_id = request.request_id
        self.num_prompt_tokens = len(request.prompt_ids)
        self.submitted_s = now
        # By sequence: when its first and its last tokens came; 0.0: none did.
        self.first_s = [0.0] * request.sampling.n
        self.last_s = [0.0] * request.sampling.n
        self.num_open = request.sampling.n
        # Answers without their first token. ``waits``: none has it.
        self.num_waiting = request.sampling.n
        self.waits = True
        self.deadline = deadline
        self._abort = abort
        self._arrived: deque[Event] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._error: CapacityError | None = None
        self._wanted = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while not self._arrived:
            if self._error is not None:
                raise self._error
            if not self.num_open or not self._wanted:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._arrived.popleft()

    def take_ready(self) -> list[Event]:
        events = list(self._arrived)
        self._arrived.clear()
        return events

    async def aclose(self) -> None:
        self.abandon()

    def abandon(self, error: CapacityError | None = None) -> None:
        """Want no more events, and iterate to ``error``; an open request is aborted."""
        if self._wanted:
            self._wanted = False
            self._error = error
            self._arrived.clear()
            self._wake()
            if self.num_open:
                self._abort(self.request_id)

    def put(self, event: Event) -> None:
        if self._wanted:
            self._arrived.append(event)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait; an answer waits until its first token.

    max_answers  a lone request may have more
    max_tokens   prompt tokens of all requests none of whose answers has begun; a lone one may
                 have more
    timeout_s    how long a request may wait
    """

    max_answers: int
    max_tokens: int
    timeout_s: float


class ProcessClient:
    """EngineClient of an engine in a process of its own, from its start to its end.

    ``command`` starts the process; ``report`` is shown each line of its start-up progress.
    All of it belongs to the event loop that calls start().
    """

    def __init__(
        self,
        config: Config,
        command: Sequence[str],
        metrics: RequestMetrics,
        report: Callable[[str], None],
    ) -> None:
        server = config.server
        self.totals = Totals()
        self._config = config
        self._config_toml = config.to_toml()
        self._limits = QueueLimits(
            server.max_queued_requests, server.max_queued_tokens, server.queue_timeout
        )
        self._hung_after_s = server.hung_after
        self._command = command
        self._metrics = metrics
        self._report = report
        self._ready: wire.Ready | None = None
        self._process: Process | None = None
        self._alive = False
        self._draining = False
        self._stage = "starting"
        # Answers in a row that ended because their numbers were not finite, and when the last did.
        self._num_broken, self._broken_s = 0, 0.0
        # What open requests are told when the process ends; the last frames of one that was asked
        # to stop may be lost with it.
        self._end_message = DIED
        self._open: dict[str, RequestEvents] = {}
        self._verdicts: dict[str, asyncio.Future[wire.Refused | None]] = {}
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._last_step_s = 0.0

    # Start and end

    async def start(self) -> wire.Ready:
        """Start the process and wait until the engine is ready.

        Raises ConfigError where the engine says why it cannot start, EngineError if it dies.
        """
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[wire.Ready] = self._loop.create_future()
        self._link = EngineLink(self._on_report)
        with await self._link.connect() as theirs:
            file = theirs.fileno()
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command, stdin=asyncio.subprocess.PIPE, pass_fds=(file,)
                )
            except BaseException:
                self._link.close()
                raise
        self._process = process
        self._alive = True
        # Held open until this process ends; the engine ends with it.
        stdin = process.stdin
        assert stdin is not None
        stdin.write(wire.encode_start(wire.Start(self._config, file)))
        self.ended = asyncio.create_task(self._watch(process))
        ready = self._ready = await self._started
        self._last_step_s = self._loop.time()
        return ready

    async def _watch(self, process: Process) -> int:
        """Wait for the process to end, fail what is open then, and return its exit code."""
        code = await process.wait()
        await self._link.finish()
        self._alive = False
        self._ready = None
        if not self._started.done():
            self._started.set_exception(EngineError(f"the engine process ended, code {code}"))
        for verdict in self._verdicts.values():
            if not verdict.done():
                verdict.set_exception(EngineError(DIED))
        for request_id in list(self._open):
            self._on_failed(Failed(request_id, self._end_message))
        return code

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        assert self._process is not None
        return self._process.pid

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, and wait for the open ones to end, at most so long."""
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            log.warning("%d requests are open after %g s", len(self._open), timeout_s)

    async def close(self) -> None:
        """Fail what is open and end the process, by force if it does not end itself."""
        self._draining = True
        if self._process is None:
            return
        if self._alive and self._ready is not None:
            self._end_message = "the server was shut down"
            self._link.send(wire.Stop(self._end_message))
            try:
                async with asyncio.timeout(STOP_S):
                    await asyncio.shield(self.ended)
            except TimeoutError:
                log.error("the engine process does not end; it is killed")
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self.ended

    # Requests

    async def submit(self, request: Request) -> RequestEvents:
        """See EngineClient."""
        self._check(request)
        request_id = request.request_id
        if not self._link.send(wire.Submit(request)):
            raise EngineError(DIED)
        if not self._open:
            # While there was nothing to do no step was due.
            self._last_step_s = self._loop.time()
        deadline = self._loop.call_later(self._limits.timeout_s, self._on_deadline, request_id)
        events = RequestEvents(request, self._loop.time(), self._abort, deadline)
        verdict: asyncio.Future[wire.Refused | None] = self._loop.create_future()
        self._open[request_id] = events
        self._verdicts[request_id] = verdict
        self._num_waiting += events.num_waiting
        self._num_waiting_tokens += events.num_prompt_tokens
        self._idle.clear()
        try:
            refused = await verdict
        except BaseException:
            # Refused for waiting too long, dead, or no longer wanted by the caller.
            events.abandon()
            raise
        finally:
            del self._verdicts[request_id]
        if refused is not None:
            self._metrics.refused["invalid"] += 1
            raise RequestError(refused.field, refused.message)
        return events

    def _check(self, request: Request) -> None:
        """Refuse without asking the engine what cannot be taken now."""
        if self._draining:
            raise CapacityError("the server is shutting down")
        if self._ready is None:
            raise EngineError("the engine is not ready")
        if request.request_id in self._open:
            raise RequestError("request_id", f"{request.request_id!r} is already running")
        self._check_room(request.sampling.n, len(request.prompt_ids))

    def check_room(self, answers: int = 1, tokens: int = 1) -> None:
        """See EngineClient."""
        for what, number, limit in (
            ("answers", answers, self._limits.max_answers),
            ("tokens of prompts", tokens, self._limits.max_tokens),
        ):
            if number > limit:
                self._metrics.refused["invalid"] += 1
                message = f"asks for {number} {what} at once: at most {limit} may wait"
                raise RequestError("prompt", message)
        self._check_room(answers, tokens)

    def _check_room(self, answers: int, tokens: int) -> None:
        """CapacityError unless so many may wait too."""
        if self._num_waiting and (
            self._num_waiting + answers > self._limits.max_answers
            or self._num_waiting_tokens + tokens > self._limits.max_tokens
        ):
            self._metrics.refused["queue full"] += 1
            raise CapacityError("too many requests are waiting; try again later")

    def _abort(self, request_id: str) -> None:
        self._link.send(wire.Abort(request_id))

    def _on_deadline(self, request_id: str) -> None:
        self._metrics.refused["queue timeout"] += 1
        error = CapacityError(f"no room for the request within {self._limits.timeout_s:g} s")
        verdict = self._verdicts.get(request_id)
        if verdict is not None and not verdict.done():
            verdict.set_exception(error)
        self._open[request_id].abandon(error)

    # Reports

    def _on_report(self, report: wire.Report) -> None:
        match report:
            case wire.Step():
                self._on_step(report)
            case wire.Loading(stage):
                self._stage = stage
                self._report(stage)
            # Nobody waits for these any more if the server was told to stop meanwhile.
            case wire.NotStarted(message) if not self._started.done():
                self._started.set_exception(ConfigError(message))
            case wire.Ready() if not self._started.done():
                self.totals = Totals(builds_at_start=report.builds)
                self._started.set_result(report)

    def _on_step(self, step: wire.Step) -> None:
        now = self._last_step_s = self._loop.time()
        if step.totals is not None:
            self.totals = step.totals
        for request_id in step.accepted:
            self._on_verdict(request_id, None)
        for refused in step.refused:
            self._end(self._open[refused.request_id])
            self._on_verdict(refused.request_id, refused)
        for event in step.tokens:
            self._on_tokens(event, now)
        for finished in step.finished:
            self._on_finished(finished, now)
        for failed in step.failed:
            self._on_failed(failed)

    def _on_verdict(self, request_id: str, refused: wire.Refused | None) -> None:
        # None where the caller did not wait for it.
        verdict = self._verdicts.get(request_id)
        if verdict is not None and not verdict.done():
            verdict.set_result(refused)

    def _on_tokens(self, event: Tokens, now: float) -> None:
        events, index = self._open[event.request_id], event.index
        if events.waits:
            self._end_wait(events)
            self._metrics.first_token.add(now - events.submitted_s)
        if events.last_s[index]:
            self._metrics.gap.add(now - events.last_s[index])
        else:
            events.first_s[index] = now
            self._begin(events, 1)
        events.last_s[index] = now
        events.put(event)

    def _on_finished(self, event: Finished, now: float) -> None:
        events = self._open[event.request_id]
        events.num_open -= 1
        if not events.last_s[event.index]:
            self._begin(events, 1)
        events.put(event)
        if event.reason is FinishReason.ERROR:
            self._metrics.failed += 1
            self._num_broken += 1
            self._broken_s = now
        elif event.reason is not FinishReason.ABORT:
            self._num_broken = 0
            first_s = events.first_s[event.index]
            self._metrics.on_finished(event, events.submitted_s, first_s, now)
        if not events.num_open:
            self._end(events)

    def _on_failed(self, event: Failed) -> None:
        self._metrics.failed += 1
        events = self._open[event.request_id]
        self._end(events)
        events.put(event)

    def _end_wait(self, events: RequestEvents) -> None:
        events.waits = False
        events.deadline.cancel()
        self._num_waiting_tokens -= events.num_prompt_tokens

    def _begin(self, events: RequestEvents, answers: int) -> None:
        """So many answers of a request wait no longer."""
        events.num_waiting -= answers
        self._num_waiting -= answers

    def _end(self, events: RequestEvents) -> None:
        events.num_open = 0
        if events.waits:
            self._end_wait(events)
        self._begin(events, events.num_waiting)
        del self._open[events.request_id]
        if not self._open:
            self._idle.set()

    # Looks

    def status(self) -> EngineStatus:
        """See EngineClient."""
        age = self._loop.time() - self._last_step_s
        ready = self._ready or wire.Ready("", 0, 0, None)
        return EngineStatus(
            ready=self._ready is not None and not self._draining,
            alive=self._alive,
            draining=self._draining,
            stage=self._stage,
            broken=self._num_broken >= BROKEN_AFTER
            and self._loop.time() - self._broken_s < BROKEN_FOR_S,
            hung=bool(self._open) and age > self._hung_after_s,
            last_step_age_s=age,
            num_running=self.totals.num_running,
            num_waiting=self.totals.num_waiting,
            kv_usage=self.totals.kv_usage,
            model_name=ready.model_name,
            max_model_len=ready.max_model_len,
            num_draft_tokens=ready.num_draft_tokens,
            config_toml=self._config_toml,
        )

    def speculation(self) -> SpeculationStats:
        """See EngineClient."""
        return self.totals.speculation
