"""Looks at the engine's totals once a second: a history for the live page, lines for the log."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from eaglerun.messages import SpeculationStats
from eaglerun.server.wire import Totals
from eaglerun.stats import AcceptanceLog

log = logging.getLogger(__name__)

EVERY_S = 1.0
NUM_SAMPLES = 600


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. Rates and ``speculation`` are of the interval since the sample before.

    number  counts up from 0, also over samples that were forgotten
    time_s  since the monitor began
    """

    number: int
    time_s: float
    num_running: int
    num_waiting: int
    kv_usage: float
    prompt_rate: float
    output_rate: float
    cached_share: float
    speculation: SpeculationStats


class Monitor:
    """Samples ``totals``; ``clock`` is any steady clock in seconds. No log lines at interval 0."""

    def __init__(
        self, totals: Callable[[], Totals], log_interval_s: float, clock: Callable[[], float]
    ) -> None:
        self.samples: deque[Sample] = deque(maxlen=NUM_SAMPLES)
        self._totals = totals
        self._clock = clock
        self._log_interval_s = log_interval_s
        # Tells this monitor's numbers from those of a server that ran before.
        self.began = time.time()
        self._begin_s = self._then_s = self._logged_s = clock()
        self._then = self._logged = totals()
        self._number = 0
        self._was_active = False

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            self.tick()

    def tick(self) -> None:
        now_s, now = self._clock(), self._totals()
        self.samples.append(self._sample(now, now.since(self._then), now_s))
        self._then, self._then_s = now, now_s
        self._number += 1
        if self._log_interval_s and now_s - self._logged_s >= self._log_interval_s:
            self._log(now, now.since(self._logged), now_s)
            self._logged, self._logged_s = now, now_s

    def _sample(self, now: Totals, new: Totals, now_s: float) -> Sample:
        seconds = max(now_s - self._then_s, 1e-9)
        return Sample(
            number=self._number,
            time_s=now_s - self._begin_s,
            num_running=now.num_running,
            num_waiting=now.num_waiting,
            kv_usage=now.kv_usage,
            prompt_rate=new.prompt_tokens / seconds,
            output_rate=new.emitted_tokens / seconds,
            cached_share=new.cached_tokens / new.prompt_tokens if new.prompt_tokens else 0.0,
            speculation=new.speculation,
        )

    def _log(self, now: Totals, new: Totals, now_s: float) -> None:
        """vLLM's sentences, for the tools that read them; one more after the last activity."""
        active = bool(new.prompt_tokens or new.emitted_tokens or now.num_running)
        if active or self._was_active:
            seconds = now_s - self._logged_s
            hits = new.cached_tokens / new.prompt_tokens if new.prompt_tokens else 0.0
            log.info(
                "Engine 000: Avg prompt throughput: %.1f tokens/s, "
                "Avg generation throughput: %.1f tokens/s, Running: %d reqs, Waiting: %d reqs, "
                "GPU KV cache usage: %.1f%%, Prefix cache hit rate: %.1f%%",
                new.prompt_tokens / seconds,
                new.emitted_tokens / seconds,
                now.num_running,
                now.num_waiting,
                100 * now.kv_usage,
                100 * hits,
            )
        words = AcceptanceLog(1, self._logged_s)
        words.line(self._logged.speculation, self._logged_s)
        acceptance = words.line(now.speculation, now_s)
        if acceptance is not None:
            log.info("%s", acceptance)
        self._was_active = active
