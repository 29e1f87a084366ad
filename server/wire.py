"""What the two processes say to each other: typed values, as msgspec bytes, never pickle.

Down (HTTP to engine): Start once, on the engine's standard input; then Submit, Abort, Stop.
Up: Loading, any number; then Ready or NotStarted; then Steps until the end.
"""

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path

import msgspec
from msgspec import Struct

from eaglerun.config import Config
from eaglerun.messages import Failed, Finished, Request, SpeculationStats, Tokens
from eaglerun.stats import Builds

# How old the Totals of a busy engine may become before the next ones.
TOTALS_EVERY_S = 0.25


class Start(Struct):
    """How the engine is to be set up, and the open file that is its end of the link."""

    config: Config
    link: int


class Submit(Struct, tag="submit"):
    request: Request


class Abort(Struct, tag="abort"):
    request_id: str


class Stop(Struct, tag="stop"):
    """End now; what is open fails with ``message``."""

    message: str


Command = Submit | Abort | Stop


class Loading(Struct, tag="loading"):
    """A line of the start-up progress."""

    stage: str


class NotStarted(Struct, tag="not_started"):
    """The engine could not start, for a reason that its user can mend."""

    message: str


class Ready(Struct, tag="ready"):
    """The engine takes requests. ``checkpoint``: the target's directory, with its tokenizer;
    ``builds``: kernels and graphs made by now."""

    model_name: str
    max_model_len: int
    num_draft_tokens: int
    checkpoint: str | None
    builds: Builds = Builds()

    @property
    def path(self) -> Path | None:
        return None if self.checkpoint is None else Path(self.checkpoint)


class Refused(Struct):
    """A request that can never run: the field and words of its RequestError."""

    request_id: str
    field: str
    message: str


class Totals(Struct, frozen=True):
    """Counts since the start (names as in EngineStats), and three gauges.

    step_s              time in steps
    target_s, draft_s   of that, in the two models
    builds              kernels and graphs made in served steps, those after Ready
    builds_at_start     those made before
    builds_idle         those made after Ready while there was nothing to do
    """

    steps: int = 0
    step_s: float = 0.0
    target_s: float = 0.0
    draft_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    emitted_tokens: int = 0
    trimmed_tokens: int = 0
    steps_discarded: int = 0
    preemptions: int = 0
    finished: dict[str, int] = {}
    speculation: SpeculationStats = SpeculationStats()
    by_context: dict[int, SpeculationStats] = {}
    builds: Builds = Builds()
    builds_at_start: Builds = Builds()
    builds_idle: Builds = Builds()
    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0

    def since(self, then: "Totals") -> "Totals":
        """What was counted after ``then``; gauges and the start's counts as they are now."""
        return Totals(
            steps=self.steps - then.steps,
            step_s=self.step_s - then.step_s,
            target_s=self.target_s - then.target_s,
            draft_s=self.draft_s - then.draft_s,
            prompt_tokens=self.prompt_tokens - then.prompt_tokens,
            cached_tokens=self.cached_tokens - then.cached_tokens,
            emitted_tokens=self.emitted_tokens - then.emitted_tokens,
            trimmed_tokens=self.trimmed_tokens - then.trimmed_tokens,
            steps_discarded=self.steps_discarded - then.steps_discarded,
            preemptions=self.preemptions - then.preemptions,
            finished={k: n - then.finished.get(k, 0) for k, n in self.finished.items()},
            speculation=less(self.speculation, then.speculation),
            by_context={
                bucket: less(stats, then.by_context.get(bucket, SpeculationStats()))
                for bucket, stats in self.by_context.items()
            },
            builds=self.builds.since(then.builds),
            builds_at_start=self.builds_at_start,
            builds_idle=self.builds_idle.since(then.builds_idle),
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_usage=self.kv_usage,
        )


class Step(Struct, tag="step", omit_defaults=True):
    """Everything of one engine step in one frame.

    Of each sequence, its Tokens come before its Finished. ``totals`` come at most every
    TOTALS_EVERY_S, and whenever the engine falls idle.
    """

    accepted: tuple[str, ...] = ()
    refused: tuple[Refused, ...] = ()
    tokens: tuple[Tokens, ...] = ()
    finished: tuple[Finished, ...] = ()
    failed: tuple[Failed, ...] = ()
    totals: Totals | None = None


Report = Loading | NotStarted | Ready | Step

_encoder = msgspec.msgpack.Encoder()
encode: Callable[[Command | Report], bytes] = _encoder.encode
decode_command: Callable[[bytes | bytearray], Command] = msgspec.msgpack.Decoder(Command).decode
decode_report: Callable[[bytes | bytearray], Report] = msgspec.msgpack.Decoder(Report).decode


def encode_start(start: Start) -> bytes:
    """One line."""
    return msgspec.json.encode(start) + b"\n"


def decode_start(line: bytes) -> Start:
    return msgspec.json.decode(line, type=Start)


def less(now: SpeculationStats, then: SpeculationStats) -> SpeculationStats:
    """Counts of ``now`` that are not in the earlier ``then``."""

    def each(new: tuple[int, ...], old: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - o for n, o in zip_longest(new, old, fillvalue=0))

    return SpeculationStats(
        steps=now.steps - then.steps,
        drafted=now.drafted - then.drafted,
        accepted=now.accepted - then.accepted,
        acceptance_histogram=each(now.acceptance_histogram, then.acceptance_histogram),
        judged_at=each(now.judged_at, then.judged_at),
        accepted_at=each(now.accepted_at, then.accepted_at),
    )
