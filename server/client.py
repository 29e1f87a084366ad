"""The engine as the server sees it: submit a request, follow its events, ask how it is."""

from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from eaglerun.messages import Event, Request, SpeculationStats


class Events(AsyncIterable[Event], Protocol):
    """The events of one request, of all its sequences, until each has ended.

    Every sequence ends in one Finished, or the whole request in one Failed (the engine died, or
    the server stops). Iterating raises CapacityError if the request waited longer for its turn
    than the queue's deadline; that too is its end.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...

    def take_ready(self) -> list[Event]:
        """What has arrived and was not iterated yet, without waiting; often empty.

        After one event was awaited, this takes those that came with it, so that a reader which
        fell behind catches up in one write. The end of the request shows in the next iteration.
        """
        ...

    async def aclose(self) -> None:
        """No more is wanted; before the end this aborts the request. Again: does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A look at the engine; numbers are at most 0.25 s old while it runs.

    ready            it has loaded and takes requests; False again while the server drains
    alive            its process lives
    draining         the server takes no more requests and ends
    stage            what it last did to load
    broken           answer after answer ends because the model's numbers are not finite
    hung             requests are open and no step came for longer than allowed
    last_step_age_s  since the last step (since it was ready, before the first)
    kv_usage         share of the KV blocks that running sequences hold, 0 to 1
    """

    ready: bool
    alive: bool
    hung: bool
    last_step_age_s: float
    num_running: int
    num_waiting: int
    kv_usage: float
    model_name: str
    max_model_len: int
    num_draft_tokens: int
    config_toml: str
    draining: bool = False
    stage: str = ""
    broken: bool = False


class EngineClient(Protocol):
    """What the routes need of the engine."""

    async def submit(self, request: Request) -> Events:
        """Queue a request; it is the engine's when this returns.

        Raises  CapacityError when the queue is full (at once, without asking the engine),
                RequestError for a request that can never run, EngineError when the engine is
                not ready or dead; in all cases nothing is queued.
        """
        ...

    def check_room(self, answers: int = 1, tokens: int = 1) -> None:
        """Ask whether so many answers, to prompts of so many tokens in all, may wait now.

        Raises  CapacityError when the queue has no room for them, RequestError for several
                that would fill more than the whole queue.
        """
        ...

    def status(self) -> EngineStatus: ...

    def speculation(self) -> SpeculationStats:
        """What speculation did in total since the engine started."""
        ...
