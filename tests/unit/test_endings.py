"""Where a sequence ends, and why; what came after that end is dropped."""

import pytest
from tokenizers import Tokenizer, decoders, models

from eaglerun.messages import FinishReason, Request, SamplingParams
from eaglerun.plan.endings import Ending, finished, may_have_ended, take, tokens_left
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import DecodeRow
from eaglerun.plan.text import TextStream

EOS = 0
LIMITS = SchedulerLimits(
    max_num_seqs=1,
    max_num_batched_tokens=64,
    max_chunk_tokens=64,
    max_model_len=10,
    num_draft_tokens=3,
    has_draft=True,
    prefix_caching=False,
    eos_token_ids=(EOS,),
)


def seq(with_text: bool = False, **params: object) -> Sequence:
    sampling = SamplingParams(**params)
    text = None
    if with_text:
        letters = {c: i for i, c in enumerate("_abcdefgh")}
        tokenizer = Tokenizer(models.WordLevel(letters, unk_token="_"))
        tokenizer.decoder = decoders.Fuse()
        shown = sampling.include_stop_str_in_output
        text = TextStream(tokenizer, sampling.stop, shown, sampling.skip_special_tokens)
    return Sequence(Request("r", (1, 2, 3, 4), sampling), 0, 0, 0, text)


@pytest.mark.parametrize(
    ("params", "num_tokens", "ending"),
    [
        ({"max_tokens": None}, 3, None),
        ({"max_tokens": 2}, 2, Ending(FinishReason.LENGTH)),
        ({"stop_token_ids": (6,)}, 2, Ending(FinishReason.STOP, 6)),
        ({"stop_token_ids": (6,), "min_tokens": 2}, 3, None),
        ({"stop_token_ids": (6,), "max_tokens": 2}, 2, Ending(FinishReason.STOP, 6)),
    ],
)
def test_tokens_are_taken_up_to_the_end(
    params: dict[str, object], num_tokens: int, ending: Ending | None
):
    new = seq(**params)
    taken = take(new, (5, 6, 7), LIMITS)
    assert (taken.num_tokens, taken.ending, taken.text) == (num_tokens, ending, "")
    assert tuple(new.output_ids) == (5, 6, 7)[:num_tokens]


def test_eos_ends_a_sequence_unless_it_is_ignored():
    assert take(seq(), (5, EOS, 7), LIMITS).ending == Ending(FinishReason.STOP)
    assert take(seq(ignore_eos=True), (5, EOS, 7), LIMITS).ending is None
    assert take(seq(min_tokens=2), (5, EOS, 7), LIMITS).ending is None


def test_the_models_length_is_an_end():
    new = seq(max_tokens=None)
    assert take(new, (5,) * 8, LIMITS).ending == Ending(FinishReason.LENGTH)
    assert len(new.token_ids) == 10


def test_an_abort_ends_with_the_steps_tokens():
    new = seq()
    new.abort_requested = True
    taken = take(new, (5, 6), LIMITS)
    assert (taken.num_tokens, taken.ending) == (2, Ending(FinishReason.ABORT))


def test_a_stop_string_is_cut_and_named_and_what_was_held_back_comes_with_another_end():
    taken = take(seq(True, stop=("fg",)), (5, 6, 7, 8), LIMITS)
    assert (taken.num_tokens, taken.text) == (3, "e")
    assert taken.ending == Ending(FinishReason.STOP, "fg")
    shown = take(seq(True, stop=("fg",), include_stop_str_in_output=True), (5, 6, 7, 8), LIMITS)
    assert shown.text == "efg"
    held = take(seq(True, stop=("fg",), max_tokens=2), (5, 6, 7, 8), LIMITS)
    assert (held.text, held.ending) == ("ef", Ending(FinishReason.LENGTH))


def test_a_stop_tokens_text_is_shown_only_if_asked_for():
    assert take(seq(True, stop_token_ids=(6,)), (5, 6), LIMITS).text == "e"
    shown = seq(True, stop_token_ids=(6,), include_stop_str_in_output=True)
    assert take(shown, (5, 6), LIMITS).text == "ef"


def test_a_step_in_flight_may_be_the_last():
    new = seq(max_tokens=2)
    assert tokens_left(new, LIMITS) == 2 and not may_have_ended(new, LIMITS)
    new.launched(DecodeRow(0, 0, 0, 5))
    assert tokens_left(new, LIMITS) == 1 and not may_have_ended(new, LIMITS)
    new.launched(DecodeRow(0, 0, 0, 6))
    assert tokens_left(new, LIMITS) == 0 and may_have_ended(new, LIMITS)


def test_the_last_event_says_why():
    new = seq(stop_token_ids=(6,))
    end = finished(new, take(new, (5, 6), LIMITS).ending or Ending(FinishReason.ERROR))
    assert (end.reason, end.stop_reason, end.num_output_tokens) == (FinishReason.STOP, 6, 2)
    assert end.prompt_logprobs is None
