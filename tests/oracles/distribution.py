"""The exact next-token distribution, by lists and loops in float64, and chi-square tests of draws.

Nothing of the engine is imported: the order of the steps is the one its SamplingParams document,
logit_bias, penalties, the min_tokens mask; temperature, min_p, top_k, top_p, each on what is left.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


def adjusted(
    logits: Sequence[float],
    wish: Mapping[str, Any],
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Iterable[int],
) -> list[float]:
    """Logits after logit_bias, penalties and the min_tokens mask (-inf)."""
    counts = Counter(output)
    out = []
    for token, logit in enumerate(logits):
        value = float(logit) + wish.get("logit_bias", {}).get(token, 0.0)
        r = wish.get("repetition_penalty", 1.0)
        if token in counts or token in prompt:
            value = value / r if value > 0 else value * r
        value -= wish.get("frequency_penalty", 0.0) * counts[token]
        value -= wish.get("presence_penalty", 0.0) * (counts[token] > 0)
        if len(output) < wish.get("min_tokens", 0) and token in stop_ids:
            value = -math.inf
        out.append(value)
    return out


def softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def filtered(logits: Sequence[float], wish: Mapping[str, Any]) -> list[float]:
    """Probabilities after temperature, min_p, top_k and top_p."""
    p = softmax([value / wish.get("temperature", 1.0) for value in logits])
    kept = [t for t in range(len(p)) if p[t] >= wish.get("min_p", 0.0) * max(p)]
    kept.sort(key=lambda t: (-p[t], t))
    if wish.get("top_k", 0) > 0:
        kept = kept[: wish["top_k"]]
    total = sum(p[t] for t in kept)
    nucleus, mass = [], 0.0
    for t in kept:
        if nucleus and mass >= wish.get("top_p", 1.0):
            break
        nucleus.append(t)
        mass += p[t] / total
    left = sum(p[t] for t in nucleus)
    return [p[t] / left if t in nucleus else 0.0 for t in range(len(p))]


@dataclass(frozen=True)
class ChiSquare:
    statistic: float
    dof: int

    @property
    def p(self) -> float:
        return float(stats.chi2.sf(self.statistic, self.dof)) if self.dof else 1.0

    def __add__(self, other: "ChiSquare") -> "ChiSquare":
        return ChiSquare(self.statistic + other.statistic, self.dof + other.dof)


def of_counts(observed: Sequence[int], probabilities: Sequence[float]) -> ChiSquare:
    """Pearson's test of counts against exact probabilities; cells of fewer than 5 expected draws
    are one. Raises  AssertionError where an impossible token was drawn."""
    n = sum(observed)
    statistic, cells, rest_observed, rest_expected = 0.0, 0, 0, 0.0
    for count, probability in zip(observed, probabilities, strict=True):
        assert probability > 0 or count == 0, "an impossible token was drawn"
        expected = n * probability
        if expected >= 5:
            statistic += (count - expected) ** 2 / expected
            cells += 1
        else:
            rest_observed += count
            rest_expected += expected
    if rest_expected >= 1:
        statistic += (rest_observed - rest_expected) ** 2 / rest_expected
        cells += 1
    return ChiSquare(statistic, max(cells - 1, 0))


def of_draws(
    draws: Iterable[tuple[Hashable, int, Sequence[float]]], least_draws: int = 20
) -> ChiSquare:
    """Draws that each have a distribution of their own: (group, token, probabilities).

    Within a group D = sum of (one-hot of the token - p) has mean 0 and covariance
    C = sum of (diag p - p p^T); D^T pinv(C) D is chi-square with rank C degrees. Tokens and
    directions of D with a variance below 5 are left out, as they are far from normal; groups of
    few draws are one.
    """
    groups: dict[Hashable, list[tuple[int, Sequence[float]]]] = {}
    for group, token, p in draws:
        assert p[token] > 0, "an impossible token was drawn"
        groups.setdefault(group, []).append((token, p))
    small: list[tuple[int, Sequence[float]]] = []
    large = []
    for members in groups.values():
        if len(members) < least_draws:
            small += members
        else:
            large.append(members)
    total = ChiSquare(0.0, 0)
    for members in [*large, small]:
        if len(members) >= least_draws:
            total += _quadratic_form(members)
    return total


def _quadratic_form(members: Sequence[tuple[int, Sequence[float]]]) -> ChiSquare:
    p = np.array([probabilities for _, probabilities in members])
    seen = np.zeros_like(p)
    seen[np.arange(len(members)), [token for token, _ in members]] = 1.0
    likely = (p * (1 - p)).sum(axis=0) >= 5
    if likely.sum() < 1:
        return ChiSquare(0.0, 0)
    p, seen = p[:, likely], seen[:, likely]
    difference = (seen - p).sum(axis=0)
    covariance = np.diag(p.sum(axis=0)) - p.T @ p
    values, vectors = np.linalg.eigh(covariance)
    solid = values >= 5  # not the sums that are (nearly) certain, as that of all tokens is
    along = vectors[:, solid].T @ difference
    return ChiSquare(float((along**2 / values[solid]).sum()), int(solid.sum()))
