"""Slots and blocks: taken, held while a step is in flight, and given back."""

import pytest

from eaglerun.errors import EngineError
from eaglerun.messages import Request, SamplingParams
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.residency import Residency
from eaglerun.plan.sequence import Sequence, Status
from eaglerun.plan.step import DecodeRow, PrefillChunk

LIMITS = SchedulerLimits(
    max_num_seqs=2,
    max_num_batched_tokens=64,
    max_chunk_tokens=64,
    max_model_len=32,
    num_draft_tokens=3,
    has_draft=True,
    prefix_caching=True,
    eos_token_ids=(),
)


def make(blocks: int = 16) -> Residency:
    return Residency(LIMITS, BlockPool(blocks, 4))


def seq(length: int, arrival: int = 0, **params: object) -> Sequence:
    prompt = tuple(range(1, length + 1))
    return Sequence(Request(str(arrival), prompt, SamplingParams(**params)), 0, 0, arrival, None)


def test_an_admitted_sequence_has_room_for_its_prompt_a_token_and_its_drafts():
    residency, new = make(), seq(9)
    assert residency.admit(new)
    assert new.status is Status.RUNNING and new.slot_id == 0 and residency.running == [new]
    assert len(new.block_ids) == 4  # 9 + 1 + 3 positions of 4
    (update,) = residency.updates(new)
    assert (update.slot_id, update.first_index, update.block_ids) == (0, 0, tuple(new.block_ids))
    assert list(residency.updates(new)) == []
    residency.check_integrity()


def test_nothing_is_taken_where_blocks_are_short():
    residency, new = make(blocks=3), seq(9)
    assert not residency.admit(new)
    assert new.status is Status.WAITING and new.block_ids == [] and residency.has_slot
    assert residency.pool.num_free == 3


def test_published_blocks_are_shared_but_the_last_token_is_computed_again():
    residency, first, second = make(), seq(8, 0), seq(8, 1)
    residency.admit(first)
    first.num_computed = 8
    residency.publish(first)
    residency.admit(second)
    assert second.num_computed == second.num_planned == 4 and second.num_published == 1
    assert second.block_ids[0] == first.block_ids[0] and second.block_ids[1] != first.block_ids[1]
    assert not residency.has_slot
    residency.check_integrity()


def test_a_request_for_prompt_logprobs_shares_nothing():
    residency, first, second = make(), seq(8, 0), seq(8, 1, prompt_logprobs=1)
    residency.admit(first)
    first.num_computed = 8
    residency.publish(first)
    residency.admit(second)
    assert second.num_computed == 0 and not set(first.block_ids) & set(second.block_ids)


def test_reserving_takes_what_is_missing_or_nothing():
    residency, new = make(blocks=5), seq(4)
    residency.admit(new)
    assert len(new.block_ids) == 2
    assert residency.reserve(new, 8) and len(new.block_ids) == 2
    assert residency.reserve(new, 17) and len(new.block_ids) == 5
    assert not residency.reserve(new, 21) and len(new.block_ids) == 5


def test_a_preempted_sequence_holds_nothing_and_keeps_its_tokens():
    residency, new = make(), seq(8)
    residency.admit(new)
    new.token_ids.append(7)
    new.num_planned = new.num_computed = 8
    residency.preempt(new)
    assert new.status is Status.WAITING and new.slot_id == -1 and new.block_ids == []
    assert new.num_planned == new.num_computed == 0 and new.num_output_tokens == 1
    assert residency.pool.num_held == 0 and residency.running == []
    residency.check_integrity()


def test_what_an_ended_sequence_holds_is_reused_only_after_its_last_step():
    residency, new = make(), seq(8)
    residency.admit(new)
    row = DecodeRow(new.slot_id, 2, 2, 9)
    new.launched(row)
    new.launched(row)
    new.status = Status.ENDED
    residency.leave(new)
    for _ in range(2):
        assert residency.leaving == [new] and residency.pool.num_held == 3
        new.landed(row)
        residency.release(new)
    assert residency.leaving == [] and residency.pool.num_held == 0
    residency.check_integrity()


def test_all_is_taken_at_once_when_the_ranks_are_gone():
    residency, first, second = make(), seq(8, 0), seq(8, 1)
    residency.admit(first)
    residency.admit(second)
    first.launched(DecodeRow(first.slot_id, 0, 0, 9))
    residency.leave(first)
    residency.clear()
    assert list(residency) == [] and residency.pool.num_held == 0
    residency.check_integrity()


def test_a_lost_slot_is_noticed():
    residency, new = make(), seq(8)
    residency.admit(new)
    residency.running.clear()
    residency.pool.release(new.block_ids)
    with pytest.raises(EngineError, match=r"slots in use or free: \[1\]"):
        residency.check_integrity()


def test_steps_in_flight_widen_the_length_and_their_commits_narrow_it():
    new = seq(8)
    chunk, final = PrefillChunk(0, (1,) * 4, 0, 5, 0), PrefillChunk(0, (5,) * 4, 4, -1, 3)
    row = DecodeRow(0, 3, 2, 9)
    new.launched(chunk)
    assert (new.min_len, new.max_len, new.num_planned, new.num_proposed) == (8, 8, 4, 0)
    new.launched(final)
    assert (new.min_len, new.max_len, new.num_planned, new.num_proposed) == (9, 9, 8, 3)
    new.launched(row)
    assert (new.min_len, new.max_len, new.num_in_flight, new.num_proposed) == (10, 13, 3, 2)
    for part in (chunk, final, row):
        new.landed(part)
    assert (new.min_len, new.max_len, new.num_in_flight) == (8, 8, 0)
