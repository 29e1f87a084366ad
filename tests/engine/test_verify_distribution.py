"""The judges alone: chi-square of what it emits for random target and draft distributions.

Every row has a seed of its own, drafts come from numpy, so that they are independent of the noise.
Rows of greedy and padding sequences stand between the sampled ones. Seeds are fixed.
"""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracles import distribution
from oracles.distribution import ChiSquare
from scipy import stats
from torch import Tensor

from eaglerun.head import Head
from eaglerun.messages import SamplingParams
from eaglerun.sampling import Features, SamplingState
from eaglerun.speculative.verify import Drafts, Invariant, Rejection, Verified

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
ROWS = 6000 * SCALE
VOCAB = 6
K = 3
# Some 250 p-values: 1e-4 for any of them to fail by chance.
SMALLEST_P = 4e-7

SHARP = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=1.5, top_k=4, min_p=0.0625)


@dataclass(frozen=True)
class Judged:
    """p [K + 1, V] and q [K, V], the drafts drawn from q, and what verify made of them."""

    p: np.ndarray
    q: np.ndarray
    drafts: np.ndarray
    num_drafts: np.ndarray
    emitted: np.ndarray
    accepted: np.ndarray


def random_draft(generator: np.random.Generator, kind: str) -> np.ndarray:
    """q [K, V]: like nothing, with zeros, one-hot, or what the target never says."""
    q = generator.dirichlet(np.full(VOCAB, 0.7), K)
    if kind == "zeros":
        q[:, [1, 4]] = 0.0
    elif kind == "one-hot":
        q = np.eye(VOCAB)[generator.integers(0, VOCAB, K)]
    return q / q.sum(axis=1, keepdims=True)


def judge(
    seed: int, params: SamplingParams, kind: str, rejection: bool, passes_probs: bool
) -> Judged:
    """ROWS sampled sequences that share p and q, with 0 .. K drafts each."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=1.5, size=(K + 1, VOCAB))
    wish = {"temperature": params.temperature, "top_k": params.top_k, "min_p": params.min_p}
    p = np.array([distribution.filtered(list(row), wish) for row in logits])
    q = random_draft(generator, kind)
    if kind == "target":
        q = p[:K]
    rows = ROWS + 2
    drafts = np.stack([generator.choice(VOCAB, rows, p=q[j]) for j in range(K)], axis=1)
    num_drafts = generator.choice(K + 1, rows, p=[0.05, 0.1, 0.15, 0.7])
    num_drafts[-2], num_drafts[-1] = K, -1  # a greedy sequence, then padding
    probs = q if passes_probs else None
    done = call_verify(seed, params, logits, drafts, probs, num_drafts, rejection)
    emitted, accepted = done.emitted.tokens.numpy(), done.emitted.accepted.numpy()
    best = logits.argmax(axis=1)
    right = [*(drafts[-2] == best[:K]), False].index(False)
    assert emitted[-2].tolist() == [*best[: right + 1], *[-1] * (K - right)]
    assert accepted[-2] == right
    assert (emitted[-1] == -1).all() and accepted[-1] == 0
    return Judged(p, q, drafts[:-2], num_drafts[:-2], emitted[:-2], accepted[:-2])


def call_verify(
    seed: int,
    params: SamplingParams,
    logits: np.ndarray,
    drafts: np.ndarray,
    q: np.ndarray | None,
    num_drafts: np.ndarray,
    rejection: bool,
) -> Verified:
    rows = len(drafts)
    state = SamplingState(rows, VOCAB, 1, torch.device("cpu"))
    state.temperature.fill_(params.temperature)
    state.temperature[rows - 2] = 0.0
    state.top_k.fill_(params.top_k)
    state.min_p.fill_(params.min_p)
    state.seed.copy_(torch.arange(rows + 1) + seed * (rows + 1))
    features = Features.of([params, SamplingParams(temperature=0.0)])

    def every_row(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).expand(rows, *values.shape).contiguous()

    judge = (Rejection if rejection else Invariant)(Head(Tensor.clone))
    return judge.judge(
        every_row(logits),
        Drafts(
            torch.from_numpy(drafts),
            torch.from_numpy(num_drafts),
            None if q is None else every_row(q),
        ),
        torch.full((rows,), 1000 + seed),
        state.rows(torch.arange(rows), features),
    )


def check_emitted(judged: Judged) -> list[ChiSquare]:
    """Shape of the answer, then the token at each place, given that it was reached, against p."""
    tests = []
    assert (judged.accepted <= judged.num_drafts).all()
    for j in range(K + 1):
        reached = judged.accepted >= j
        assert ((judged.emitted[:, j] >= 0) == reached).all()
        counts = np.bincount(judged.emitted[reached, j], minlength=VOCAB)
        tests.append(distribution.of_counts(counts.tolist(), judged.p[j].tolist()))
        if j < K:
            stood = judged.accepted > j
            assert (judged.emitted[stood, j] == judged.drafts[stood, j]).all()
    return tests


def report(name: str, tests: list[ChiSquare]) -> None:
    print(f"{name}: p = " + " ".join(f"{t.p:.4f}" for t in tests))
    assert min(t.p for t in tests) > SMALLEST_P
    assert any(t.dof > 1 for t in tests)


@pytest.mark.parametrize("params", [SHARP, FILTERED], ids=["plain", "filtered"])
@pytest.mark.parametrize("kind", ["any", "zeros", "target", "one-hot"])
@pytest.mark.parametrize("seed", [1, 2])
def test_rejection_rule(params: SamplingParams, kind: str, seed: int) -> None:
    """Tokens have the target's distribution whether accepted, corrected or bonus; a draft is
    accepted with probability sum min(p, q); what is accepted has min(p, q), what is corrected
    max(p - q, 0), normalised."""
    judged = judge(seed, params, kind, rejection=True, passes_probs=True)
    tests = check_emitted(judged)
    for j in range(K):
        offered = (judged.accepted >= j) & (judged.num_drafts > j)
        stood = offered & (judged.accepted > j)
        both = np.minimum(judged.p[j], judged.q[j])
        overlap = min(both.sum(), 1.0)
        assert kind != "target" or (stood == offered).all()
        tests.append(
            distribution.of_counts([stood.sum(), (offered & ~stood).sum()], [overlap, 1 - overlap])
            if overlap < 1 - 1e-12
            else ChiSquare(0.0, 0)
        )
        parts = ((stood, both), (offered & ~stood, judged.p[j] - both))
        for rows, weights in parts:
            if weights.sum() > 1e-12:
                counts = np.bincount(judged.emitted[rows, j], minlength=VOCAB)
                expected = (weights / weights.sum()).tolist()
                tests.append(distribution.of_counts(counts.tolist(), expected))
            else:
                assert not rows.any()
    report(f"rejection {kind} {seed}", tests)


@pytest.mark.parametrize("seed", [3, 4])
@pytest.mark.parametrize("params", [SHARP, FILTERED], ids=["plain", "filtered"])
def test_rejection_rule_without_probabilities(params: SamplingParams, seed: int) -> None:
    """Greedy drafts hand no distribution on: each is judged as one-hot, accepted with p(d), and
    the answer is the one that explicit one-hot distributions give."""
    judged = judge(seed, params, "one-hot", rejection=True, passes_probs=False)
    tests = check_emitted(judged)
    same = judge(seed, params, "one-hot", rejection=True, passes_probs=True)
    assert (judged.emitted == same.emitted).all()
    for j in range(K):
        offered = (judged.accepted >= j) & (judged.num_drafts > j)
        chance = judged.p[j][judged.drafts[0, j]]
        stood = offered & (judged.accepted > j)
        tests.append(
            distribution.of_counts([stood.sum(), (offered & ~stood).sum()], [chance, 1 - chance])
        )
    report(f"one-hot {seed}", tests)


@pytest.mark.parametrize("kind", ["any", "zeros", "one-hot"])
@pytest.mark.parametrize("params", [SHARP, FILTERED], ids=["plain", "filtered"])
def test_invariant_rule(params: SamplingParams, kind: str) -> None:
    """The token at each place has p, does not hang on the draft, and a draft stands iff it is
    that token."""
    judged = judge(5, params, kind, rejection=False, passes_probs=False)
    tests = check_emitted(judged)
    for j in range(K):
        offered = (judged.accepted >= j) & (judged.num_drafts > j)
        right = judged.emitted[:, j] == judged.drafts[:, j]
        assert ((judged.accepted > j) == (offered & right)).all()
        for draft in range(VOCAB):
            rows = offered & (judged.drafts[:, j] == draft)
            if rows.sum() > 100:
                counts = np.bincount(judged.emitted[rows, j], minlength=VOCAB)
                tests.append(distribution.of_counts(counts.tolist(), judged.p[j].tolist()))
    report(f"invariant {kind}", tests)


@pytest.mark.parametrize("rejection", [False, True])
def test_successive_tokens_are_independent(rejection: bool) -> None:
    """Two tokens of one verify: their joint counts are those of the product, given that the first
    draft stood."""
    judged = judge(6, SHARP, "any", rejection, passes_probs=True)
    stood = judged.accepted > 0
    weights = np.minimum(judged.p[0], judged.q[0]) if rejection else judged.p[0] * judged.q[0]
    joint = np.outer(weights / weights.sum(), judged.p[1]).flatten()
    pairs = judged.emitted[stood, 0] * VOCAB + judged.emitted[stood, 1]
    counts = np.bincount(pairs, minlength=VOCAB * VOCAB)
    report(f"joint {rejection}", [distribution.of_counts(counts.tolist(), joint.tolist())])


def test_impossible_tokens_never_come() -> None:
    """A draft that the filters exclude is rejected always, and never comes back as correction."""
    judged = judge(7, FILTERED, "any", rejection=True, passes_probs=True)
    for j in range(K):
        excluded = judged.p[j] == 0
        assert excluded.any()
        drafted = excluded[judged.drafts[:, j]]
        assert drafted.any() and (judged.accepted[drafted] <= j).all()


def test_counts_have_power() -> None:
    """A bias of a twentieth in one token is seen at this number of rows."""
    p = np.full(VOCAB, 1 / VOCAB)
    bent = p + np.array([0.05, -0.01, -0.01, -0.01, -0.01, -0.01])
    counts = np.random.default_rng(0).multinomial(ROWS, bent)
    assert distribution.of_counts(counts.tolist(), p.tolist()).p < SMALLEST_P
    assert stats.chisquare(counts).pvalue < SMALLEST_P
