"""The policy alone: plans and commits with made-up results, no model and no torch."""

import pytest

from eaglerun.errors import EngineError
from eaglerun.messages import Finished, Request, SamplingParams, Tokens
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import FixedDraftLength
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.scheduler import Scheduler
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import StepPlan, StepResult

EOS = 0


class Bench:
    """A scheduler whose device accepts ``accepts`` drafts of every row and emits token 7."""

    def __init__(self, k: int = 3, blocks: int = 64, **changes: object) -> None:
        limits = {
            "max_num_seqs": 4,
            "max_num_batched_tokens": 32,
            "max_chunk_tokens": 32,
            "max_model_len": 64,
            "num_draft_tokens": 8,
            "has_draft": True,
            "prefix_caching": True,
            "eos_token_ids": (EOS,),
            **changes,
        }
        self.pool = BlockPool(blocks, 4)
        self.scheduler = Scheduler(SchedulerLimits(**limits), self.pool, FixedDraftLength(k))
        self.arrivals = 0

    def add(self, length: int, name: str = "", priority: int = 0, **params: object) -> Sequence:
        sampling = SamplingParams(**{"max_tokens": 40, "ignore_eos": True, **params})
        prompt = tuple(100 + self.arrivals * 50 + i for i in range(length))
        request = Request(name or str(self.arrivals), prompt, sampling, priority)
        seq = Sequence(request, 0, 0, self.arrivals, None)
        self.arrivals += 1
        self.scheduler.add(seq)
        return seq

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan()
        assert plan is not None
        return plan

    def commit(self, plan: StepPlan, accepts: int = 0, token: int = 7):
        counts = tuple(min(accepts, row.num_drafts) for row in plan.decode)
        events = self.scheduler.commit(
            StepResult(
                step_id=plan.step_id,
                decode=tuple((token,) * (n + 1) for n in counts),
                num_accepted=counts,
                prefill=tuple(token if c.samples else -1 for c in plan.prefill),
            )
        )
        self.scheduler.check_integrity()
        return events


def test_decode_rows_come_first_and_prefill_takes_the_rest_of_the_budget():
    bench = Bench(max_chunk_tokens=16)
    bench.add(10)
    bench.commit(bench.plan())
    bench.add(30)
    plan = bench.plan()
    assert [(r.num_drafts, r.num_propose) for r in plan.decode] == [(3, 3)]
    assert [(c.start, c.end, c.samples) for c in plan.prefill] == [(0, 16, False)]
    assert plan.prefill[0].next_token == 150 + 16
    bench.commit(plan)
    plan = bench.plan()
    assert [(c.start, c.end, c.samples) for c in plan.prefill] == [(16, 30, True)]
    assert plan.num_drafts == 3 and plan.num_propose == 3


def test_the_plan_names_every_block_once():
    bench = Bench()
    seq = bench.add(10)
    plan = bench.plan()
    # Ten prompt tokens, the sampled one and up to 8 drafts: 19 positions of 4.
    assert [(u.first_index, len(u.block_ids)) for u in plan.blocks] == [(0, 5)]
    bench.commit(plan)
    sent = 5
    for _ in range(10):
        plan = bench.plan()
        for update in plan.blocks:
            assert update.first_index == sent
            sent += len(update.block_ids)
        row = plan.decode[0]
        assert sent * 4 >= row.max_len + row.num_drafts + row.num_propose
        bench.commit(plan, accepts=3)
        if not bench.scheduler.num_running:
            break
    assert seq.num_output_tokens == 40


def test_running_ahead_reserves_for_the_upper_bound():
    bench = Bench()
    bench.add(8)
    bench.commit(bench.plan())
    first = bench.plan()
    second = bench.plan()
    assert first.decode[0].max_len == 9 and second.decode[0].max_len == 13
    bench.commit(first, accepts=1)
    third = bench.plan()
    assert third.decode[0].max_len == 9 + 2 + 4
    bench.commit(second, accepts=0)
    bench.commit(third, accepts=0)


def test_max_tokens_bounds_drafts_and_certain_ends_are_not_planned():
    bench = Bench()
    bench.add(8, max_tokens=3)
    bench.commit(bench.plan())
    plan = bench.plan()
    # Two tokens are left: one draft and the target's own.
    assert (plan.decode[0].num_drafts, plan.decode[0].num_propose) == (1, 0)
    ahead = bench.plan()
    assert ahead.decode[0].num_drafts == 0
    assert bench.scheduler.plan() is None, "both tokens may be in flight already"
    (tokens, end) = bench.commit(plan, accepts=1)
    assert isinstance(tokens, Tokens) and isinstance(end, Finished)
    assert end.num_output_tokens == 3
    assert bench.commit(ahead) == []
    assert bench.scheduler.stats.steps_discarded == 1
    assert bench.pool.num_held == 0


def test_max_model_len_is_never_passed():
    bench = Bench(k=8, max_model_len=20)
    bench.add(8, max_tokens=None)
    plan = bench.plan()
    total = 8
    while plan is not None:
        for row in plan.decode:
            assert row.max_len + row.num_drafts + 1 <= 20
            assert row.max_len + row.num_drafts + row.num_propose <= 20
        for event in bench.commit(plan, accepts=8):
            if isinstance(event, Tokens):
                total += len(event.token_ids)
            else:
                assert isinstance(event, Finished) and event.reason == "length"
        plan = bench.scheduler.plan()
    assert total == 20


def test_short_blocks_wait_for_the_commit_then_preempt_the_last():
    bench = Bench(k=0, blocks=6, has_draft=False, max_model_len=24, prefix_caching=False)
    old, young = bench.add(11), bench.add(11)
    bench.commit(bench.plan())
    assert bench.pool.num_free == 0
    ahead = bench.plan()
    assert bench.scheduler.plan() is None, "a fourth block is needed; the commit comes first"
    assert bench.scheduler.stats.preemptions == 0
    bench.commit(ahead)
    plan = bench.plan()
    assert [r.slot_id for r in plan.decode] == [old.slot_id]
    assert young.slot_id == -1 and bench.scheduler.stats.preemptions == 1
    bench.commit(plan)
    bench.scheduler.abort("0")
    again = bench.plan()
    assert again.prefill[0].token_ids == tuple(young.token_ids)
    assert again.admissions[0].num_output_tokens == young.num_output_tokens == 2


def test_a_hit_starts_behind_the_shared_blocks_with_their_carry():
    bench = Bench()
    first = bench.add(12)
    bench.commit(bench.plan())
    second = Sequence(Request("again", first.request.prompt_ids), 0, 0, 9, None)
    bench.scheduler.add(second)
    plan = bench.plan()
    # Twelve tokens are three full blocks; the last token must be computed again, so two are shared.
    assert plan.prefill[0].start == 8
    assert plan.admissions[0].carry_block == second.block_ids[1] == first.block_ids[1]
    assert second.num_cached_tokens == 8
    bench.commit(plan)


def test_best_priority_is_admitted_first_and_nobody_overtakes():
    bench = Bench(max_num_seqs=1)
    bench.add(4, "late", priority=1, max_tokens=1)
    bench.add(4, "early", priority=0, max_tokens=1)
    ends = []
    for _ in range(2):
        ends += [e.request_id for e in bench.commit(bench.plan()) if isinstance(e, Finished)]
    assert ends == ["early", "late"]


def test_results_must_come_in_order():
    bench = Bench()
    bench.add(4)
    plan = bench.plan()
    bench.plan()
    with pytest.raises(EngineError, match="result of step 1, not 0"):
        bench.scheduler.commit(StepResult(1, (), (), ()))
    assert plan.step_id == 0
