"""Capture and replay of the decode moves on a GPU.

A move is a function of fixed-address tensors that launches kernels and waits for nothing. Capturing
one waits for the device; from then on it is replayed. Either the first run of a key captures it,
or, where others would wait for that, it just runs, and is captured before the first step or while
there is nothing to do. On a CPU, or with enforce_eager, a move always just runs. What a move
returns are the same tensors at every replay, overwritten.
"""

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch

from eaglerun.errors import RankFailed
from eaglerun.plan.step import STEP_TIMEOUT_S
from eaglerun.progress import counter
from eaglerun.run.pending import reached

log = logging.getLogger("eaglerun")

T = TypeVar("T")


class Graphs:
    """Captured moves by key, in one memory pool.

    ``blank`` replaces a step's inputs by padding for as long as it is entered: a move runs once
    before it is recorded, to load modules and fill caches, and that run must touch no sequence.

    ``in_steps``: the first run of a key captures it; otherwise moves are captured inside
    capturing() alone. ``captures``: true where a first run captures now.

    Once the captured moves hold ``max_bytes``, others run uncaptured; ``num_refused`` counts how
    often that was where one would have been captured. From then on nothing is captured, so that no
    graph reads what an uncaptured move made.

    ``capture_s`` are the seconds that all captures took.

    ``progress`` draws a line for as long as a move is captured in a step.
    """

    def __init__(
        self,
        device: torch.device,
        enabled: bool,
        blank: Callable[[], AbstractContextManager[None]],
        max_bytes: int | None,
        progress: bool | None = False,
        in_steps: bool = True,
    ) -> None:
        self.in_steps = in_steps
        self.captures = in_steps
        self.enabled = enabled and device.type == "cuda"
        self.num_bytes = 0
        self.num_refused = 0
        self.capture_s = 0.0
        self.max_bytes = max_bytes
        self._blank = blank
        self._progress = progress
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        # An opaque handle, made at the first capture.
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._captured)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._captured

    @property
    def full(self) -> bool:
        """True once nothing more is captured."""
        return self.max_bytes is not None and self.num_bytes >= self.max_bytes

    def close(self) -> None:
        """Capture no more: the device has no memory for it."""
        self.max_bytes = self.num_bytes
        log.warning(
            "the device has no memory for more than %d graphs, %.2f GiB: other steps run "
            "uncaptured, slower",
            len(self),
            self.num_bytes / 2**30,
        )

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture the first run of a key while entered.

        Nothing runs while it is captured, and a move reads what those before it returned: so each
        is replayed at once, here too.
        """
        before, self.captures = self.captures, True
        try:
            yield
        finally:
            self.captures = before

    def run(self, key: Hashable, move: Callable[[], T], capture: bool = True) -> T:
        """Run ``move``; where ``capture`` allows it, through the graph of ``key``.

        A captured move must launch the same kernels for the same key whatever the step.
        """
        if not (self.enabled and capture):
            return move()
        found = self._captured.get(key)
        if found is None:
            if not self.captures:
                return move()
            if self.full:
                if not self.num_refused:
                    log.warning(
                        "%d graphs hold %.2f GiB, all that was set aside: %s and what else comes "
                        "runs uncaptured, slower",
                        len(self),
                        self.num_bytes / 2**30,
                        key,
                    )
                self.num_refused += 1
                return move()
            with counter(self._progress, "capturing", "graphs", len(self), leave=False) as line:
                line.set_postfix_str(f"{key}")
                begin = time.perf_counter()
                found = self._capture(key, move)
                self.capture_s += time.perf_counter() - begin
                line.update()
        graph, output = found
        graph.replay()
        result: T = output
        return result

    def _capture(
        self, key: Hashable, move: Callable[[], object]
    ) -> tuple[torch.cuda.CUDAGraph, Any]:
        begin = time.perf_counter()
        # Capturing synchronises, loading a kernel's code may too, and neither knows an end: so
        # each begins with a device that is done.
        _wait(key, "what was launched before it")
        with self._blank():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                move()
            torch.cuda.current_stream().wait_stream(stream)
            _wait(key, "its first run")
            # What eager runs left unused is no part of the graph's growth.
            torch.cuda.empty_cache()
            held = torch.cuda.memory_reserved()
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                output = move()
        self._captured[key] = (graph, output)
        self.num_bytes += max(torch.cuda.memory_reserved() - held, 0)
        log.debug(
            "captured %s in %.2f s, %.2f GiB in all",
            key,
            time.perf_counter() - begin,
            self.num_bytes / 2**30,
        )
        return self._captured[key]


def _wait(key: Hashable, what: str) -> None:
    """Wait for all that was launched. RankFailed where it is not done in time."""
    event = torch.cuda.Event()
    event.record()
    if not reached(event, STEP_TIMEOUT_S):
        raise RankFailed(
            f"no graph of {key} can be captured: {what} is not done after {STEP_TIMEOUT_S:g} s: "
            "the device hangs"
        )
