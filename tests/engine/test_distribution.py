"""What the engine samples has exactly the target's distribution.

Thousands of short answers over a vocabulary of six, each with a seed and a filter of its own, all
in one engine, so that rows with different wishes share every batch. The distribution of each token
given the tokens before it is computed by tests/oracles/distribution.py from the logits of whole,
cache-free forwards; draws and distribution are compared by chi-square, position by position. Seeds
are fixed, so a p-value is a fact of the code. ``pytest -rP`` shows them all.
"""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import distribution
from oracles.distribution import ChiSquare
from pairs import draft_spec, target_spec, tiny_draft, tiny_target, without_draft
from scipy import stats

from eaglerun.config import resolve
from eaglerun.kernels.rows import Rows
from eaglerun.loader import Models
from eaglerun.messages import Finished, Request, SamplingParams, Tokens
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.start import start_engine

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
VOCAB = 6
BLOCK = 4
EOS = 0
PROMPT = (1, 2, 2, 4)
MAX_TOKENS = 6
SEED = 24
# A table of some 600 p-values: 1e-4 for any of them to fail by chance.
SMALLEST_P = 1e-7
SMALLEST_POOLED_P = 1e-5

Params = dict[str, Any]
FILTERS: dict[str, Params] = {
    "none": {},
    "temperature": {"temperature": 2.0},
    "min_p": {"min_p": 0.375},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.75},
    "repetition": {"repetition_penalty": 2.5},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": -1.5},
    "logit_bias": {"logit_bias": {5: -1.0, 2: 1.5, 1: -100.0}},
    "min_tokens": {"min_tokens": 3},
    "cold": {"temperature": 0.5},
    "all": {
        "temperature": 1.25,
        "min_p": 0.25,
        "top_k": 4,
        "top_p": 0.875,
        "repetition_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {3: -0.5, 2: 1.5},
        "min_tokens": 2,
    },
}
ENDING = ("min_tokens", "all")  # these may end by EOS, the others ignore it
NUM_ANSWERS = 120 * SCALE  # of each filter in each mode


@dataclass(frozen=True)
class Mode:
    """How the engine speculates: K of each step in turn."""

    ks: tuple[int, ...]
    verification: str = "invariant"
    draft_sampling: str = "greedy"
    draft_vocab_size: int = VOCAB
    lag: int = 0

    def num_draft_tokens(self, step_id: int, num_running: int) -> int:
        return self.ks[step_id % len(self.ks)]


MODES = {
    "K 0": Mode((0,)),
    "K 1 invariant one-hot": Mode((1,)),
    "K 3 invariant one-hot": Mode((3,)),
    "K 1 invariant probabilistic": Mode((1,), draft_sampling="probabilistic"),
    "K 3 invariant probabilistic": Mode((3,), draft_sampling="probabilistic"),
    "K 1 rejection one-hot": Mode((1,), "rejection"),
    "K 3 rejection one-hot": Mode((3,), "rejection"),
    "K 1 rejection probabilistic": Mode((1,), "rejection", "probabilistic"),
    "K 3 rejection probabilistic": Mode((3,), "rejection", "probabilistic"),
    "K 0-3 rejection one-hot, lag": Mode((3, 0, 2, 1), "rejection", lag=1),
    "K 0-3 rejection prob., d2t, lag": Mode((3, 1, 0, 2), "rejection", "probabilistic", 4, 1),
}


@functools.cache
def models(draft_vocab_size: int) -> Models:
    spec = target_spec(VOCAB, BLOCK, num_layers=2, eos_token_ids=(EOS,))
    target = tiny_target(SEED, spec, (0, 1, 2), torch.float64, context=0.6)
    with torch.inference_mode():
        target.lm_head.weight.mul_(0.4)  # so that every token has its chance
    wanted = draft_spec(spec, taps=(0, 1, 2), draft_vocab_size=draft_vocab_size)
    return Models(
        "tiny", target, tiny_draft(SEED + 1, wanted, target, torch.float64, noise=0.1), (EOS,)
    )


def target_logits(target: MiniMaxM3, texts: list[tuple[int, ...]]) -> Iterator[list[float]]:
    """Logits after each text, all of one length, from one forward over whole texts."""
    n, length = len(texts), len(texts[0])
    per_text = -(-length // BLOCK)
    kv = TargetKV.allocate(target.spec, n * per_text, BLOCK, torch.device("cpu"), torch.float64)
    table = torch.arange(n * per_text, dtype=torch.int32).view(n, per_text)
    positions = torch.arange(length).repeat(n)
    rows = Rows(
        positions=positions,
        kv_slots=(torch.arange(n)[:, None] * per_text * BLOCK + torch.arange(length)).flatten(),
        block_tables=table,
        seq_lens=torch.full((n,), length, dtype=torch.int32),
        max_seq_len=length,
    )
    hidden = target(torch.tensor(texts).flatten(), rows, kv).view(n, length, -1)
    yield from target.logits(hidden[:, -1]).tolist()


@dataclass(frozen=True)
class Sample:
    """Answers by filter, and how many drafts of the run were judged and were right."""

    answers: dict[str, list[tuple[int, ...]]]
    drafted: int
    accepted: int


@functools.cache
def sample(mode_name: str) -> Sample:
    mode = MODES[mode_name]
    both = models(mode.draft_vocab_size)
    speculates = max(mode.ks) > 0
    config = resolve(
        {
            "draft": "tiny" if speculates else None,
            "num_draft_tokens": 3,
            "verification": mode.verification,
            "draft_sampling": mode.draft_sampling,
            "lag": mode.lag,
            "max_model_len": 16,
            "num_kv_blocks": 1000,
            "max_num_seqs": 200,
            "max_num_batched_tokens": 2048,
            "log_stats_every": 0,
        },
        environ={},
    )
    engine = start_engine(config, both if speculates else without_draft(both), mode)
    # Neighbouring seeds, and no seed twice in all of the modes.
    seed = list(MODES).index(mode_name) * len(FILTERS) * NUM_ANSWERS
    requests = []
    for i in range(NUM_ANSWERS):
        for name, wish in FILTERS.items():
            params = {"max_tokens": MAX_TOKENS, "ignore_eos": name not in ENDING, "seed": seed}
            sampling = SamplingParams(**params, **wish)
            requests.append(Request(f"{name}/{i}", PROMPT, sampling))
            seed += 1
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    requests.reverse()
    while requests or engine.has_work:
        while requests and engine.num_running + engine.num_waiting < 250:
            engine.submit(requests.pop())
        for event in engine.step():
            assert isinstance(event, Tokens | Finished)
            if isinstance(event, Tokens):
                answers[event.request_id] += event.token_ids
    counted = engine.stats.acceptance.stats()
    return Sample(
        {name: [tuple(answers[f"{name}/{i}"]) for i in range(NUM_ANSWERS)] for name in FILTERS},
        counted.drafted,
        counted.accepted,
    )


@functools.cache
def exact(name: str, output: tuple[int, ...]) -> tuple[float, ...]:
    """The filter's distribution of the token after PROMPT + output."""
    wish = FILTERS[name]
    logits = distribution.adjusted(logits_after(output), wish, PROMPT, output, (EOS,))
    return tuple(distribution.filtered(logits, wish))


_known_logits: dict[tuple[int, ...], list[float]] = {}


def logits_after(output: tuple[int, ...]) -> list[float]:
    return _known_logits[output]


def learn_logits(sampled: Sample) -> None:
    """The target's logits after every beginning of the answers, length by length."""
    for length in range(MAX_TOKENS):
        wanted = {
            answer[:length]
            for answers in sampled.answers.values()
            for answer in answers
            if len(answer) > length
        }
        new = sorted(wanted - _known_logits.keys())
        if new:
            rows = target_logits(models(VOCAB).target, [PROMPT + output for output in new])
            _known_logits.update(zip(new, rows, strict=True))


@functools.cache
def table(mode_name: str) -> dict[tuple[str, int], ChiSquare]:
    """The test of each (filter, position): draws given all that stands before them, grouped by
    the last two tokens."""
    sampled = sample(mode_name)
    learn_logits(sampled)
    return {
        (name, position): distribution.of_draws(
            (answer[max(position - 2, 0) : position], answer[position], exact(name, before))
            for answer in answers
            if len(answer) > position
            for before in [answer[:position]]
        )
        for name, answers in sampled.answers.items()
        for position in range(MAX_TOKENS)
    }


@pytest.mark.parametrize("mode_name", MODES)
def test_every_token_has_the_exact_distribution(mode_name: str) -> None:
    """Chi-square of each position under each filter, and of all together."""
    tests = table(mode_name)
    sampled = sample(mode_name)
    print(f"\n{mode_name}: {sampled.accepted} of {sampled.drafted} drafts accepted; p-values")
    print(f"{'':12}" + "".join(f"{f'token {i + 1}':>9}" for i in range(MAX_TOKENS)) + "      all")
    for name in FILTERS:
        row = [tests[name, position] for position in range(MAX_TOKENS)]
        pooled = sum(row, ChiSquare(0.0, 0))
        print(f"{name:12}" + "".join(f"{t.p:9.4f}" for t in [*row, pooled]))
        assert pooled.p > SMALLEST_POOLED_P and pooled.dof > 5
    together = sum(tests.values(), ChiSquare(0.0, 0))
    print(f"all: p = {together.p:.4f}, {together.dof} degrees")
    assert min(t.p for t in tests.values()) > SMALLEST_P
    assert together.p > SMALLEST_POOLED_P
    assert sum(t.dof == 0 for t in tests.values()) < 4
    if max(MODES[mode_name].ks):
        assert 0.15 * sampled.drafted < sampled.accepted < 0.85 * sampled.drafted


def test_p_values_are_uniform() -> None:
    """All p-values together look like p-values (Kolmogorov-Smirnov), so that no small error
    hides in many places."""
    found = [t.p for mode_name in MODES for t in table(mode_name).values() if t.dof > 2]
    result = stats.kstest(found, "uniform")
    print(f"{len(found)} p-values, smallest {min(found):.2g}, uniform with p = {result.pvalue:.3f}")
    assert len(found) > 300
    assert result.pvalue > 1e-4


def test_every_filter_bites() -> None:
    """Each filter moves much of the distribution, so that leaving one out is seen: the total
    variation from the row without it, averaged over all tokens of the answers."""
    sampled = sample("K 0")
    learn_logits(sampled)
    for name in FILTERS:
        if name == "none":
            continue
        wish = {"temperature": FILTERS[name].get("temperature", 1.0)}
        if name in ("temperature", "cold"):
            wish = {}
        distances = [
            0.5 * sum(abs(a - b) for a, b in zip(exact(name, before), plain, strict=True))
            for answer in sampled.answers[name]
            for position in range(len(answer))
            for before in [answer[:position]]
            for plain in [distribution.filtered(logits_after(before), wish)]
        ]
        print(f"{name:12} moves {sum(distances) / len(distances):.3f}")
        assert sum(distances) / len(distances) > 0.1, name


def test_the_oracle_sees_a_wrong_distribution() -> None:
    """The same draws against each other's filters fail: the test has the power to tell."""
    sampled = sample("K 0")
    learn_logits(sampled)
    for name, other in (("top_k", "temperature"), ("presence", "frequency"), ("none", "min_p")):
        draws = [
            ((), answer[position], tuple(0.999 * p + 0.001 / VOCAB for p in exact(other, before)))
            for answer in sampled.answers[name]
            for position in range(3)
            for before in [answer[:position]]
        ]
        assert distribution.of_draws(draws).p < SMALLEST_P
