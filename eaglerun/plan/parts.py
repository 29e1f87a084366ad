"""The parts of a step: a decode row or a prefill chunk of each sequence, and the admissions."""

from eaglerun.plan.endings import tokens_left
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import Admission, BlockUpdate, DecodeRow, PrefillChunk, StepPlan


def decode_row(seq: Sequence, k: int, limits: SchedulerLimits) -> DecodeRow:
    """How many drafts to judge now and to propose, never beyond max_model_len or max_tokens."""
    room = limits.max_model_len - seq.max_len - 1
    num_drafts = min(seq.num_proposed, room, tokens_left(seq, limits) - 1)
    propose = _num_propose(seq, k, room - num_drafts - 1, limits)
    return DecodeRow(seq.slot_id, num_drafts, propose, seq.max_len)


def num_positions(row: DecodeRow, limits: SchedulerLimits) -> int:
    """Positions that the row's sequence needs blocks for, at its longest."""
    # The draft's row of the newest token is written even where nothing is proposed.
    ahead = max(row.num_propose, 1) if limits.has_draft else 0
    return min(row.max_len + row.num_drafts + ahead, limits.max_model_len)


def prefill_chunk(seq: Sequence, k: int, budget: int, limits: SchedulerLimits) -> PrefillChunk:
    """The next of the sequence's tokens to compute, at most ``budget`` of them."""
    start = seq.num_planned
    end = min(seq.prefill_len, start + min(budget, limits.max_chunk_tokens))
    samples = end == seq.prefill_len
    propose = _num_propose(seq, k, limits.max_model_len - seq.prefill_len - 2, limits)
    want = seq.sampling.prompt_logprobs
    return PrefillChunk(
        slot_id=seq.slot_id,
        token_ids=tuple(seq.token_ids[start:end]),
        start=start,
        next_token=-1 if samples else seq.token_ids[end],
        num_propose=propose if samples else 0,
        prompt_logprobs=-1 if want is None or start >= seq.num_prompt_tokens else want,
    )


def admission(seq: Sequence) -> Admission:
    """Tells the device what it must know of a sequence that has just got its slot."""
    counted, hits = seq.sampling.penalized, seq.num_published
    return Admission(
        slot_id=seq.slot_id,
        sampling=seq.sampling,
        seed=seq.seed,
        prompt_ids=seq.request.prompt_ids if counted else (),
        output_ids=tuple(seq.output_ids) if counted else (),
        num_output_tokens=seq.num_output_tokens,
        carry_block=seq.block_ids[hits - 1] if hits else -1,
    )


def step_plan(
    step_id: int,
    admissions: list[Admission],
    blocks: list[BlockUpdate],
    decode: list[tuple[Sequence, DecodeRow]],
    prefill: list[tuple[Sequence, PrefillChunk]],
) -> StepPlan:
    """The parts as one step, as wide as the widest of them."""
    parts: list[tuple[Sequence, DecodeRow | PrefillChunk]] = [*decode, *prefill]
    wanted = [seq.sampling.logprobs for seq, _ in parts]
    return StepPlan(
        step_id=step_id,
        admissions=tuple(admissions),
        blocks=tuple(blocks),
        decode=tuple(row for _, row in decode),
        prefill=tuple(chunk for _, chunk in prefill),
        num_drafts=max((row.num_drafts for _, row in decode), default=0),
        num_propose=max((part.num_propose for _, part in parts), default=0),
        num_logprobs=max((-1 if n is None else n for n in wanted), default=-1),
    )


def _num_propose(seq: Sequence, k: int, room: int, limits: SchedulerLimits) -> int:
    """Drafts for the step after one that emits at least a token; ``room``: positions left."""
    wish = seq.sampling.num_draft_tokens
    limit = k if wish is None else min(k, wish)
    return max(min(limit, room, tokens_left(seq, limits) - 2), 0)
