"""The engine's process: take commands, step while there is work, report what happened.

Its life hangs on its standard input, which the HTTP process holds open: when that process ends,
however it ends, so does this one.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from eaglerun.config import Config
from eaglerun.errors import CapacityError, CheckpointError, ConfigError, RankFailed, RequestError
from eaglerun.messages import Event, Failed, Finished, Request, Tokens
from eaglerun.server import hung, wire
from eaglerun.server.link import BadFrame, Hangup, HttpLink
from eaglerun.server.logs import configure_logging, never_waiting
from eaglerun.server.wire import Totals
from eaglerun.stats import Builds, EngineStats

log = logging.getLogger(__name__)

BROKE = "the engine failed"
# An engine without work is idle after so long: in a conversation the next request comes sooner.
QUIET_S = 1.0
NOT_STARTED, HTTP_ENDED, BROKEN_LINK = 2, 3, 4


class ServedEngine(Protocol):
    """What this process drives; eaglerun.engine.Engine is one."""

    model_name: str
    max_model_len: int
    num_draft_tokens: int

    @property
    def stats(self) -> EngineStats: ...

    @property
    def builds(self) -> Builds: ...

    @property
    def idle_builds(self) -> Builds: ...

    @property
    def has_missed(self) -> bool: ...

    @property
    def has_work(self) -> bool: ...

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def kv_usage(self) -> float: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> bool: ...

    def step(self) -> list[Event]: ...

    def make_missed(self) -> None: ...

    def close(self, message: str = ...) -> list[Event]: ...


@dataclass(frozen=True, slots=True)
class Served:
    """An engine that is ready, and the directory of its target (None: made up)."""

    engine: ServedEngine
    checkpoint: Path | None


MakeEngine = Callable[[Config, Callable[[str], None]], Served]


def run(make_engine: MakeEngine) -> int:
    """The whole life of the process; the exit code.

    ``make_engine`` is given the config and a function that shows a line of progress. Its
    ConfigError, CheckpointError, CapacityError and RankFailed reach the user in the HTTP process.
    """
    # The HTTP process hears Ctrl-C and SIGTERM and decides; here they would cut requests short.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = sys.stdin.buffer.readline()
    if not line.endswith(b"\n"):
        # The HTTP process ended before it had said what to do.
        return HTTP_ENDED
    start = wire.decode_start(line)
    threading.Thread(target=_end_with_http_process, daemon=True).start()
    configure_logging(start.config.server.log_level, "EngineCore")
    with never_waiting():
        try:
            return _live(make_engine, start)
        except RankFailed:
            # Logged, and told to whoever waits: for the start, or for an answer.
            pass
    hung.leave()


def _live(make_engine: MakeEngine, start: wire.Start) -> int:
    link = HttpLink(start.link)
    try:
        try:
            served = make_engine(start.config, lambda stage: link.send(wire.Loading(stage)))
        except (ConfigError, CheckpointError, CapacityError) as error:
            link.send(wire.NotStarted(str(error)))
            return NOT_STARTED
        except RankFailed as error:
            log.exception("the engine cannot start")
            link.send(wire.NotStarted(str(error)))
            raise
        engine = served.engine
        link.send(
            wire.Ready(
                engine.model_name,
                engine.max_model_len,
                engine.num_draft_tokens,
                None if served.checkpoint is None else str(served.checkpoint),
                engine.builds,
            )
        )
        EngineLoop(engine, link).run()
        return 0
    except Hangup as error:
        if error.args:
            log.error("the HTTP process hangs, and the engine ends: %s", error)
        return HTTP_ENDED
    except BadFrame as error:
        log.error("bad frame from the HTTP process; the engine ends: %s", error)
        return BROKEN_LINK
    finally:
        link.close()


def _end_with_http_process() -> NoReturn:
    """Wait for the HTTP process to end; then nobody wants anything more, so leave at once.

    A thread, so that a step which never returns cannot keep the process.
    """
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(HTTP_ENDED)


class EngineLoop:
    """Alternates between commands and steps; waits for a command when there is nothing to do."""

    def __init__(self, engine: ServedEngine, link: HttpLink) -> None:
        self._engine = engine
        self._link = link
        # What the engine counted before anyone asked, by warming up, is not the users'.
        self._step_s = 0.0
        self._builds_at_start = engine.builds
        self._before = self._count()
        self._totals_due = 0.0
        self._stopped = False

    def run(self) -> None:
        """Until Stop. An error of the engine fails what is open and is raised again."""
        try:
            while not self._stopped:
                self._take_commands()
                if self._stopped:
                    break
                if self._engine.has_work:
                    self._step()
                elif self._engine.has_missed:
                    # Nobody has asked for anything for QUIET_S; whoever does now waits for this.
                    self._engine.make_missed()
                    self._send([], self._totals())
        except (Hangup, BadFrame):
            raise
        except Exception:
            log.exception("the engine failed; every open request fails")
            self._send(self._engine.close(BROKE), None)
            raise

    def _take_commands(self) -> None:
        """All commands that are there; the first is waited for if the engine is idle, and if
        it has something to make meanwhile, for QUIET_S."""
        wait_s: float | None = None
        if self._engine.has_work:
            wait_s = 0
        elif self._engine.has_missed:
            wait_s = QUIET_S
        command = self._link.receive(wait_s)
        accepted: list[str] = []
        refused: list[wire.Refused] = []
        while command is not None:
            match command:
                case wire.Submit(request):
                    try:
                        self._engine.submit(request)
                        accepted.append(request.request_id)
                    except RequestError as error:
                        refused.append(wire.Refused(request.request_id, error.field, error.message))
                case wire.Abort(request_id):
                    self._engine.abort(request_id)
                case wire.Stop(message):
                    self._stopped = True
                    self._send(self._engine.close(message), self._totals())
                    break
            command = self._link.receive(0)
        if accepted or refused:
            # Before the step, so that a client hears of a refusal at once.
            self._link.send(wire.Step(accepted=tuple(accepted), refused=tuple(refused)))

    def _step(self) -> None:
        begin = time.perf_counter()
        events = self._engine.step()
        now = time.perf_counter()
        self._step_s += now - begin
        due = now >= self._totals_due or not self._engine.has_work
        if due:
            self._totals_due = now + wire.TOTALS_EVERY_S
        if events or due:
            self._send(events, self._totals() if due else None)

    def _send(self, events: list[Event], totals: Totals | None) -> None:
        self._link.send(
            wire.Step(
                tokens=tuple([e for e in events if type(e) is Tokens]),
                finished=tuple([e for e in events if type(e) is Finished]),
                failed=tuple([e for e in events if type(e) is Failed]),
                totals=totals,
            )
        )

    def _totals(self) -> Totals:
        return self._count().since(self._before)

    def _count(self) -> Totals:
        engine, stats = self._engine, self._engine.stats
        return Totals(
            steps=stats.steps,
            step_s=self._step_s,
            target_s=stats.target_ms / 1e3,
            draft_s=stats.draft_ms / 1e3,
            prompt_tokens=stats.prompt_tokens,
            cached_tokens=stats.cached_tokens,
            emitted_tokens=stats.emitted_tokens,
            trimmed_tokens=stats.trimmed_tokens,
            steps_discarded=stats.steps_discarded,
            preemptions=stats.preemptions,
            finished=dict(stats.finished),
            speculation=stats.acceptance.stats(),
            by_context={bucket: c.stats() for bucket, c in stats.by_context.items()},
            builds=engine.builds.since(engine.idle_builds),
            builds_idle=engine.idle_builds,
            builds_at_start=self._builds_at_start,
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            kv_usage=engine.kv_usage,
        )
