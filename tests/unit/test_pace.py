"""Prefill beside running streams, on a device whose steps take a time that is computed."""

import random
from collections import deque
from collections.abc import Callable

import pytest

from eaglerun.messages import Request, SamplingParams
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import FixedDraftLength
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.pace import (
    KEEP,
    KEEP_SURPRISED,
    LEAST_ROWS,
    MAX_RISE,
    DecodeTimes,
    PrefillCost,
)
from eaglerun.plan.scheduler import Scheduler
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import StepPlan, StepResult, StepTimes

BOUND_MS = 50.0
# Steps with both kinds of rows until the device is known: the first rows, doubled a few times.
LEARNT = 12

# (number of the step, sequences that decode, prefill rows, sum of their contexts) -> milliseconds
StepCost = Callable[[int, int, int, float], float]


def affine(fixed: float = 4.0, per_context: float = 2e-7, noise: float = 0.0) -> StepCost:
    """A second forward for the prefill, so much a row, and so much for each token attended to."""
    rng = random.Random(0)

    def cost(step: int, num_decode: int, rows: int, context: float) -> float:
        ms = 6 + 0.2 * num_decode if num_decode else 0.0
        ms += fixed + 0.05 * rows + per_context * context if rows else 0.0
        return ms * (1 + rng.uniform(-noise, noise))

    return cost


class Step:
    def __init__(self, number: int, plan: StepPlan, cost: StepCost) -> None:
        self.plan = plan
        self.rows = sum(len(chunk.token_ids) for chunk in plan.prefill)
        context = sum(len(c.token_ids) * (c.start + c.end) / 2 for c in plan.prefill)
        self.ms = cost(number, len(plan.decode), self.rows, context)
        self.mixed = bool(plan.decode and plan.prefill)


class Device:
    """A scheduler, and a device that accepts one draft of each row. ``steps``: the committed."""

    def __init__(
        self, cost: StepCost, bound: float | None = BOUND_MS, lag: int = 1, **changes: object
    ) -> None:
        limits = {
            "max_num_seqs": 64,
            "max_num_batched_tokens": 8192,
            "max_chunk_tokens": 8192,
            "max_model_len": 1 << 20,
            "num_draft_tokens": 3,
            "has_draft": True,
            "prefix_caching": False,
            "eos_token_ids": (0,),
            "max_itl_ms": bound,
            **changes,
        }
        pool = BlockPool(1 << 14, 128)
        self.scheduler = Scheduler(SchedulerLimits(**limits), pool, FixedDraftLength(3))
        self.steps: list[Step] = []
        self._cost = cost
        self._lag = lag
        self._in_flight: deque[StepPlan] = deque()
        self._arrivals = 0

    def add(self, length: int, max_tokens: int = 40) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        request = Request(str(self._arrivals), (1,) * length, sampling)
        self.scheduler.add(Sequence(request, 0, 0, self._arrivals, None))
        self._arrivals += 1

    def streams(self, count: int) -> None:
        """That many sequences decode from now on."""
        for _ in range(count):
            self.add(20, max_tokens=100_000)
        self.run(3)

    def run(self, count: int) -> None:
        for _ in range(count):
            plan = self.scheduler.plan()
            if plan is not None:
                self._in_flight.append(plan)
            if self._in_flight and (plan is None or len(self._in_flight) > self._lag):
                self._commit(self._in_flight.popleft())

    def run_until_read(self, most: int = 3000) -> None:
        """Until every prompt that was added is planned."""
        while self.scheduler.num_waiting or any(
            not seq.prefill_planned for seq in self.scheduler.sequences()
        ):
            self.run(1)
            assert len(self.steps) < most, "the prompts are never read"
        self.run(self._lag)
        self.scheduler.check_integrity()

    def mixed(self) -> list[Step]:
        return [step for step in self.steps if step.mixed]

    def _commit(self, plan: StepPlan) -> None:
        step = Step(len(self.steps), plan, self._cost)
        self.steps.append(step)
        accepted = tuple(min(1, row.num_drafts) for row in plan.decode)
        self.scheduler.commit(
            StepResult(
                step_id=plan.step_id,
                decode=tuple((7,) * (n + 1) for n in accepted),
                num_accepted=accepted,
                prefill=tuple(7 if c.samples else -1 for c in plan.prefill),
                times=StepTimes(total_ms=step.ms),
            )
        )


def worst(steps: list[Step]) -> float:
    """The longest, as a share of the bound."""
    return max(step.ms for step in steps) / BOUND_MS


def mean(steps: list[Step]) -> float:
    return sum(step.ms for step in steps) / len(steps) / BOUND_MS


def arrive_at_random(device: Device, num_steps: int) -> None:
    """Prompts of all lengths, often several at once, and answers that come and go."""
    rng = random.Random(1)
    for _ in range(num_steps):
        if rng.random() < 0.3:
            device.add(rng.choice([30, 200, 1000, 4000, 20_000]), rng.randint(1, 100))
        device.run(1)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_huge_prompt_keeps_the_bound_from_its_first_row_to_its_last(lag: int, noise: float):
    device = Device(affine(noise=noise), lag=lag)
    device.streams(16)
    device.add(300_000)
    device.run_until_read()
    mixed = device.mixed()
    assert worst(mixed[LEARNT:]) < 1.15
    assert mean(mixed[LEARNT:-2]) > 0.8
    # A row at the end attends to 300,000 tokens and costs twice one at the beginning.
    assert mixed[LEARNT].rows > 1.7 * mixed[-3].rows


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_prompts_of_all_lengths_keep_the_bound_and_use_it(noise: float):
    device = Device(affine(noise=noise))
    device.streams(16)
    arrive_at_random(device, 600)
    mixed = device.mixed()
    assert len(mixed) > 500 and worst(mixed[LEARNT:]) < 1.15
    assert mean(mixed[LEARNT:]) > 0.8


def test_a_cost_of_another_form_is_learnt_too():
    """Attention that selects blocks, small steps dearer, decode that is not linear."""

    def cost(step: int, num_decode: int, rows: int, context: float) -> float:
        ms = 5 + 1.5 * num_decode**0.7 if num_decode else 0.0
        if rows:
            near = rows * min(context / rows, 2048) * 5e-6
            ms += (6 + 0.04 * rows + near + 3e-7 * context) * (1.15 if rows < 512 else 1)
        return ms

    device = Device(cost)
    device.streams(16)
    arrive_at_random(device, 600)
    mixed = device.mixed()
    assert worst(mixed[LEARNT:]) < 1.15 and mean(mixed[LEARNT:]) > 0.8


def test_the_first_steps_are_small_and_double():
    device = Device(affine(), lag=0)
    device.streams(4)
    # The time of the streams' own prompts is known, and of nothing larger.
    assert max(step.rows for step in device.steps) == 80
    device.add(20_000)
    device.run(4)
    assert [step.rows for step in device.mixed()][:3] == [160, 320, 640]


def test_nothing_known_begins_with_the_least_rows():
    device = Device(affine(), lag=0, max_num_seqs=2)
    device.add(8)
    device.add(40_000)
    # The first step waits for nobody: it takes the whole budget.
    device.run(3)
    assert [step.rows for step in device.steps] == [8192, LEAST_ROWS, 2 * LEAST_ROWS]


def test_the_bound_covers_all_chunks_and_admissions_of_a_step():
    device = Device(affine())
    device.streams(4)
    device.add(40_000, max_tokens=1)
    device.run_until_read()
    device.run(20)
    known = len(device.steps)
    for _ in range(60):
        device.add(300, max_tokens=1)
    device.run_until_read()
    mixed = [step for step in device.steps[known:] if step.mixed]
    assert len(mixed[0].plan.prefill) > 1, "several are admitted in a step"
    assert worst(mixed) < 1.15 and mean(mixed[:-1]) > 0.8


@pytest.mark.parametrize("lag", [0, 1])
def test_a_bound_that_cannot_be_kept_still_reads_prompts(lag: int):
    device = Device(affine(), bound=0.5, lag=lag)
    device.streams(4)
    device.add(100 * LEAST_ROWS + 5, max_tokens=1)
    device.run_until_read()
    assert [step.rows for step in device.mixed()] == [LEAST_ROWS] * 100 + [5]


def test_where_nobody_waits_the_whole_budget_is_taken():
    with_bound, without = Device(affine(), bound=0.5), Device(affine(), bound=None)
    for device in (with_bound, without):
        for length in (9000, 20, 3000, 30_000):
            device.add(length, max_tokens=1)
        device.run_until_read()
    plans = [[step.plan for step in device.steps] for device in (with_bound, without)]
    assert plans[0] == plans[1] and not with_bound.mixed()


def test_without_a_bound_prefill_takes_what_decode_leaves():
    device = Device(affine(), bound=None)
    assert device.scheduler.pace is None
    device.streams(4)
    device.add(100_000)
    device.run(8)
    assert {step.rows for step in device.mixed()[:5]} == {8192 - 4 * 4}


def test_an_outlier_does_not_poison_the_estimate():
    """Steps that take a hundred times as long, as where something is compiled in them."""
    base = affine(noise=0.03)
    slow = {0, 2, *range(40, 600, 97)}

    def cost(step: int, *of_step: float) -> float:
        return base(step, *of_step) * (100 if step in slow else 1)

    device = Device(cost)
    device.streams(16)
    arrive_at_random(device, 600)
    others = [s for i, s in enumerate(device.steps) if s.mixed and i not in slow]
    assert worst(others[LEARNT:]) < 1.15
    assert mean(others[LEARNT:]) > 0.8


def test_decode_steps_measured_while_compiling_do_not_stop_prefill():
    """No later decode step corrects them, because each step has prefill rows."""
    base = affine()

    def cost(step: int, *of_step: float) -> float:
        return 3000.0 if step == 1 else base(step, *of_step)

    device = Device(cost, lag=0)
    device.add(20, max_tokens=100_000)
    device.run(2)
    device.add(200_000)
    device.run(60)
    assert worst(device.mixed()[LEARNT:]) < 1.15
    assert mean(device.mixed()[LEARNT:]) > 0.8


def test_a_device_that_becomes_slower_is_followed():
    base = affine()

    def cost(step: int, *of_step: float) -> float:
        return base(step, *of_step) * (2 if step >= 100 else 1)

    device = Device(cost)
    device.streams(4)
    device.add(300_000)
    device.run(200)
    before, after = device.steps[60:100], device.steps[110:]
    assert worst(before) < 1.15 and worst(after) < 1.15
    # Two steps were planned before the change was seen.
    assert sum(step.ms > 1.15 * BOUND_MS for step in device.steps[100:]) <= 4
    assert mean(after) > 0.8


def known_cost() -> PrefillCost:
    """About 4 ms a step and 0.05 ms a row, beside decode rows of 16 ms."""
    cost = PrefillCost()
    for rows in (128, 256, 512) * 4:
        cost.fit(rows, rows * rows / 2, 4 + 0.05 * rows, 20 + 0.05 * rows, KEEP)
    assert cost.rows(30, 0) == pytest.approx(600, rel=0.1)
    return cost


def test_a_context_far_beyond_those_seen_costs_in_proportion():
    cost = known_cost()
    near = cost.rows(30, 0)
    assert cost.rows(30, 10 * cost.farthest) == pytest.approx(near / 10, rel=0.2)
    cost.farthest *= 10
    assert cost.rows(30, cost.farthest) == pytest.approx(near, rel=0.2)


def test_one_step_moves_the_fit_little_and_the_level_by_a_bounded_factor():
    cost = known_cost()
    near = cost.rows(30, 0)
    cost.fit(512, 512 * 256, 4600.0, 4616.0, KEEP_SURPRISED)
    assert cost.rows(30, 0) == pytest.approx(near, rel=0.05)
    near = cost.rows(30, 0)
    cost.follow(99.0)
    assert cost.rows(30, 0) == pytest.approx(near / MAX_RISE, rel=0.05)
    near = cost.rows(30, 0)
    cost.follow(-1.0)
    assert near < cost.rows(30, 0) < 1.5 * near


def test_samples_of_another_device_replace_older_ones_where_they_surprise():
    new, old = known_cost(), known_cost()
    for rows in (512, 256, 128) * 2:
        for cost, keep in ((new, KEEP_SURPRISED), (old, KEEP)):
            cost.fit(rows, rows * rows / 2, 8 + 0.1 * rows, 24 + 0.1 * rows, keep)
    for rows in (128, 512):
        step = (rows, rows * rows / 2, 8 + 0.1 * rows, 0.0)
        assert abs(new.error(*step)) < 0.05
        assert old.error(*step) > 0.3


def test_results_without_times_teach_nothing():
    device = Device(lambda *of_step: 0.0, lag=0)
    device.streams(2)
    device.add(2000)
    device.run(3)
    assert [step.rows for step in device.mixed()] == [LEAST_ROWS] * 3


def test_decode_times_are_those_of_the_nearest_size():
    times = DecodeTimes()
    assert times.ms(4) == 0
    for ms, median in ((900.0, 900.0), (5.0, 5.0), (6.0, 6.0), (900.0, 6.0)):
        times.add(4, ms)
        assert times.ms(4) == median
    times.add(64, 20.0)
    assert [times.ms(rows) for rows in (3, 4, 5, 33, 64, 65, 500)] == [6, 6, 20, 20, 20, 20, 20]
