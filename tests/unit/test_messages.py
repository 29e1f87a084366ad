"""Sampling parameters refuse what they cannot mean, naming the field."""

import pytest

from eaglerun.errors import RequestError
from eaglerun.messages import SamplingParams, SpeculationStats


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1, "-1 is not in"),
        ("temperature", float("nan"), "nan is not in"),
        ("top_p", 0, r"0 is not in \(0, 1\]"),
        ("top_p", 1.5, "1.5 is not in"),
        ("top_k", -2, r"-2 must be in \[-1, "),
        ("top_k", 1.5, "1.5 is not an integer"),
        ("min_p", 2, "2 is not in"),
        ("repetition_penalty", 0, "0 is not in"),
        ("repetition_penalty", 5e-324, "5e-324 is not in"),
        ("presence_penalty", 3, "3 is not in"),
        ("frequency_penalty", "a", "'a' is not in"),
        ("max_tokens", 0, r"0 must be in \[1, "),
        ("max_tokens", True, "True is not an integer"),
        ("min_tokens", 17, "17 exceeds max_tokens = 16"),
        ("logprobs", 21, r"21 must be in \[0, 20\]"),
        ("num_draft_tokens", 9, r"9 must be in \[0, 8\]"),
        ("n", 0, r"0 must be in \[1, 128\]"),
        ("seed", 2**63, "must be in"),
        ("stop", ("a", ""), "must be non-empty strings"),
        ("logit_bias", {-1: 1.0}, "-1 is not a token id"),
        ("logit_bias", {1: 101}, "101 is not in"),
        ("logit_bias", {True: 1.0}, "True is not a token id"),
        ("logit_bias", [1], r"\[1\] does not map token ids"),
        ("top_k", 2**70, "must be in"),
        ("min_tokens", 2**31, "must be in"),
        ("top_p", True, "True is not in"),
        ("stop", 5, "5 is not a list"),
        ("stop_token_ids", [1.5], "1.5 is not a token id"),
        ("stop_token_ids", ["x"], "'x' is not a token id"),
        ("ignore_eos", "no", "'no' is not true or false"),
    ],
)
def test_refusals(field: str, value: object, words: str):
    with pytest.raises(RequestError, match=f"^{field}: .*{words}") as error:
        SamplingParams(**{field: value})
    assert error.value.field == field


def test_a_waiting_request_keeps_its_own_bias():
    bias = {3: 1.0}
    params = SamplingParams(logit_bias=bias, stop=None)
    bias[4] = 2.0
    assert params.logit_bias == {3: 1.0} and params.stop == ()


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_acceptance_length():
    stats = SpeculationStats(steps=10, drafted=30, accepted=22)
    assert stats.mean_acceptance_length == 3.2
    assert stats.acceptance_rate == pytest.approx(22 / 30)
    assert SpeculationStats().mean_acceptance_length == 1.0
