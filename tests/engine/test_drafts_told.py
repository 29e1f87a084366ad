"""The host is told of every draft: what a step proposed is what the next one judges."""

from dataclasses import replace

import pytest
import torch
from engine.schedules import Schedule, make_engine, play, schedules
from hypothesis import HealthCheck, Phase, given, seed, settings

from eaglerun.engine import Engine
from eaglerun.plan.step import StepPlan, StepResult
from eaglerun.ranks.local import runner_of


class Told:
    """Keeps the newest drafts of each slot, and compares what becomes of them."""

    def __init__(self) -> None:
        self.drafts: dict[int, tuple[int, ...]] = {}
        self.num_judged = 0
        self.num_accepted = 0

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        for b, row in enumerate(plan.decode):
            judged = self.drafts.get(row.slot_id, ())[: row.num_drafts]
            emitted, count = result.decode[b], result.num_accepted[b]
            assert len(judged) == row.num_drafts
            assert emitted[:count] == judged[:count]
            if count < row.num_drafts:
                assert emitted[count] != judged[count]
            self.num_judged += row.num_drafts
            self.num_accepted += count
            self.drafts[row.slot_id] = result.drafts[b] if result.drafts else ()
            assert len(self.drafts[row.slot_id]) == row.num_propose
        for c, chunk in enumerate(plan.prefill):
            made = result.prefill_drafts[c] if result.prefill_drafts else ()
            assert len(made) == chunk.num_propose
            self.drafts[chunk.slot_id] = made


@pytest.mark.parametrize("lag", [0, 1])
def test_drafts_judged_are_the_drafts_told(lag: int):
    totals = [0, 0]

    @seed(7 + lag)
    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate,),
    )
    @given(schedules())
    def run(schedule: Schedule) -> None:
        told = Told()
        engine = make_engine(replace(schedule, lag=lag), torch.float32, plain=False)
        engine.observer = told

        def watch(engine: Engine) -> None:
            for seq in engine.scheduler.sequences():
                if seq.slot_id >= 0 and seq.prefill_planned and not seq.num_in_flight:
                    assert seq.drafts == told.drafts[seq.slot_id]
                    kept = runner_of(engine).state.draft_tokens[seq.slot_id]
                    assert seq.drafts == tuple(kept[: len(seq.drafts)].tolist())

        play(engine, schedule.wishes, watch)
        totals[0] += told.num_judged
        totals[1] += told.num_accepted

    run()
    assert totals[0] > 150 and totals[1] > 30
