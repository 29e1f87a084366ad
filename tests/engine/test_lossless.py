"""Output with the draft equals output without it, token for token, whatever the schedule.

A case is one sequence's life in a random schedule of 6 to 8: K from 0 to 8 changing per step, lag 0
and 1, chunk and block sizes, with and without an inter-token bound, scarce blocks, forced
preemptions, shared prefixes, aborts, every sampling parameter. The schedules are drawn by
hypothesis from a fixed seed.
"""

import os
from dataclasses import replace

import pytest
import torch
from engine.schedules import Schedule, check_lossless, schedules
from hypothesis import HealthCheck, Phase, given, seed, settings

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
# The long suite makes up for the short one, of which these take the largest part.
MORE = SCALE if SCALE == 1 else 2 * SCALE
SETTINGS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    # A failing schedule is short enough to read; shrinking one takes minutes.
    phases=(Phase.explicit, Phase.generate),
)


# 1,000 sequences and more, which each part counts; in parts, to run in parallel.
@pytest.mark.parametrize("part", range(4))
def test_float64(part: int) -> None:
    @seed(part)
    @settings(SETTINGS, max_examples=34 * MORE)
    @given(schedules())
    def run(schedule: Schedule) -> None:
        counts.append(check_lossless(schedule, torch.float64))

    counts: list[int] = []
    run()
    assert sum(counts) >= 250 * MORE


@seed(100)
@settings(SETTINGS, max_examples=20 * MORE)
@given(schedules())
def test_float32(schedule: Schedule) -> None:
    check_lossless(schedule, torch.float32)


@seed(200)
@settings(SETTINGS, max_examples=4 * MORE)
@given(schedules())
def test_fp8_caches(schedule: Schedule) -> None:
    """Whoever writes a key rounds it the same way, so that who wrote it makes no difference."""
    check_lossless(replace(schedule, cache_dtype="fp8"), torch.float64)
