"""The engine as the server sees it: submit a request, follow its events, ask how it is."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from eaglerun.messages import Event, Request


class Events(AsyncIterator[Event], Protocol):
    """The events of one request, of all its sequences, until each has ended.

    ``aclose`` before the end aborts the request.
    """

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A look at the engine.

    ready            it has loaded and takes requests
    alive            its process lives
    last_step_age_s  since the last step; while requests run, a large value means it hangs
    """

    ready: bool
    alive: bool
    last_step_age_s: float
    num_running: int
    num_waiting: int
    model_name: str
    max_model_len: int
    num_draft_tokens: int
    config_toml: str


class EngineClient(Protocol):
    """What the routes need of the engine."""

    async def submit(self, request: Request) -> Events:
        """Queue a request.

        Raises  CapacityError when the queue is full, RequestError for a request that can never
        run; in both cases nothing is queued.
        """
        ...

    def status(self) -> EngineStatus: ...
