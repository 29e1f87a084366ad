"""The counter-based noise is uniform, independent along every one of its coordinates, and finite.

Chi-square of bins and of pairs of neighbours; the seeds are fixed, so a p-value is a fact of the
code. The extremes of the hash are reached by inverting it.
"""

import itertools
import os

import numpy as np
import pytest
import torch
from scipy import stats

from eaglerun.kernels.reference.noise import (
    ACCEPT,
    DRAFT,
    RECOVER,
    SYNTHETIC,
    TOKEN,
    gumbel,
    uniform,
)

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
STREAMS = (TOKEN, ACCEPT, RECOVER, DRAFT, SYNTHETIC)
SMALLEST_P = 1e-6  # some 100 tests
SIDE = 400 * SCALE


def to_uniform(noise: torch.Tensor) -> np.ndarray:
    """Gumbel's distribution function, exp(-exp(-g)), puts the noise back on (0, 1)."""
    return np.exp(-np.exp(-noise.numpy()))


def seeds(count: int, first: int = 0, step: int = 1) -> torch.Tensor:
    return torch.arange(count) * step + first


def field(stream: int = TOKEN, first_seed: int = 0, first_position: int = 0) -> np.ndarray:
    """u [seeds, positions, tokens] of neighbouring coordinates."""
    n = SIDE // 8
    seed = seeds(n, first_seed).repeat_interleave(n)
    position = seeds(n, first_position).repeat(n)
    return to_uniform(gumbel(seed, position, stream, 64)).reshape(n, n, 64)


def p_of_bins(u: np.ndarray, bins: int = 64) -> float:
    counts = np.histogram(u, bins=bins, range=(0.0, 1.0))[0]
    assert counts.sum() == u.size
    return float(stats.chisquare(counts).pvalue)


def p_of_pairs(a: np.ndarray, b: np.ndarray, bins: int = 16) -> float:
    """Pairs in bins of the unit square."""
    counts = np.histogram2d(a.ravel(), b.ravel(), bins=bins, range=((0, 1), (0, 1)))[0]
    return float(stats.chisquare(counts.ravel()).pvalue)


def show(name: str, p: float) -> None:
    print(f"{name}: p = {p:.4f}")
    assert p > SMALLEST_P


@pytest.mark.parametrize("stream", STREAMS)
def test_uniform(stream: int) -> None:
    """Bins of u over seeds at one position, over positions at one seed, and far away."""
    n = 50_000 * SCALE
    for name, seed, position in (
        ("seeds", seeds(n), torch.full((n,), 7)),
        ("negative seeds", seeds(n, -(2**63)), torch.full((n,), 7)),
        ("positions", torch.full((n,), 3), seeds(n)),
        ("far positions", torch.full((n,), 2**62), seeds(n, 10**6)),
        ("both", seeds(n, 5), seeds(n, 9)),
        ("against each other", seeds(n), n - seeds(n)),
        ("strides", seeds(n, 0, 2**32), torch.zeros(n, dtype=torch.int64)),
    ):
        u = uniform(seed, position, stream).numpy()
        assert u.min() > 0 and u.max() < 1 and len(np.unique(u)) == n
        show(f"uniform over {name}, stream {stream}", p_of_bins(u))
        show(f"its neighbours, stream {stream}", p_of_pairs(u[:-1:2], u[1::2]))


@pytest.mark.parametrize("stream", STREAMS)
def test_gumbel_is_gumbel(stream: int) -> None:
    """Bins of exp(-exp(-g)) over tokens, positions and seeds; both tails; all finite."""
    for first_seed, first_position in ((0, 0), (2**40, 0), (-5, 10**6)):
        u = field(stream, first_seed, first_position)
        show(f"gumbel, stream {stream}", p_of_bins(u, bins=256))
        tails = [np.count_nonzero(u < 1e-3), np.count_nonzero(u > 1 - 1e-3)]
        inner = u.size - sum(tails)
        expected = u.size * np.array([1e-3, 1e-3, 1 - 2e-3])
        show("its tails", float(stats.chisquare([*tails, inner], expected).pvalue))


def test_gumbel_moments() -> None:
    """Mean: Euler's constant; variance: pi^2 / 6; each within five standard errors."""
    g = gumbel(seeds(200), seeds(200), TOKEN, 1000).numpy()
    assert np.isfinite(g).all()
    error = np.pi / np.sqrt(6 * g.size)
    assert abs(g.mean() - np.euler_gamma) < 5 * error
    assert abs(g.var() - np.pi**2 / 6) < 5 * np.sqrt(3.4 / g.size) * np.pi**2 / 6


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["seeds", "positions", "tokens"])
@pytest.mark.parametrize("distance", [1, 2, 3, 8])
def test_neighbours_are_independent(axis: int, distance: int) -> None:
    """Pairs at a distance along one coordinate, the others equal."""
    u = np.moveaxis(field(), axis, 0)
    show(f"axis {axis}, distance {distance}", p_of_pairs(u[:-distance], u[distance:]))


def test_diagonals_are_independent() -> None:
    """Pairs that differ by one in two or three coordinates, in the same or opposite direction."""
    u = field()
    for steps in itertools.product((-1, 0, 1), repeat=3):
        if np.count_nonzero(steps) < 2 or steps < (0, 0, 0):
            continue
        here = tuple(slice(max(0, -s), u.shape[i] - max(0, s)) for i, s in enumerate(steps))
        there = tuple(slice(max(0, s), u.shape[i] - max(0, -s)) for i, s in enumerate(steps))
        show(f"diagonal {steps}", p_of_pairs(u[here], u[there]))


@pytest.mark.parametrize("pair", list(itertools.combinations(STREAMS, 2)))
def test_streams_are_independent(pair: tuple[int, int]) -> None:
    """The same seed, position and token in two streams; also one seed or position apart."""
    a, b = field(pair[0]), field(pair[1])
    show(f"streams {pair}", p_of_pairs(a, b))
    show(f"streams {pair}, next seed", p_of_pairs(a[1:], b[:-1]))
    show(f"streams {pair}, next position", p_of_pairs(a[:, 1:], b[:, :-1]))


def test_uniform_and_gumbel_of_one_stream_share_nothing() -> None:
    """The acceptance draw and the recovery noise of a position, even in one stream."""
    n = 20_000
    seed, position = seeds(n), torch.full((n,), 40)
    u = uniform(seed, position, TOKEN).numpy()
    noise = to_uniform(gumbel(seed, position, TOKEN, 4))
    for token in range(4):
        show(f"uniform and token {token}", p_of_pairs(u, noise[:, token]))


def test_the_winner_is_uniform() -> None:
    """argmax over tokens of the noise alone: each token, each parity of successive winners."""
    winners = field().argmax(axis=2)
    counts = np.bincount(winners.ravel(), minlength=64)
    show("winners", float(stats.chisquare(counts).pvalue))
    table = np.zeros((8, 8))
    np.add.at(table, (winners[:, :-1].ravel() // 8, winners[:, 1:].ravel() // 8), 1)
    show("successive winners", float(stats.chisquare(table.ravel()).pvalue))


def test_every_bit_is_fair() -> None:
    """The 52 bits that make u."""
    n = 20_000 * SCALE
    u = uniform(seeds(n), seeds(n, 3), TOKEN).numpy()
    whole = np.floor(u * 2.0**52).astype(np.int64)
    ones = [np.count_nonzero(whole >> bit & 1) for bit in range(52)]
    p = [float(stats.binomtest(count, n).pvalue) for count in ones]
    show("least fair bit", min(p))


def test_a_draw_depends_on_its_coordinates_alone() -> None:
    """The same bits alone or in a batch, in any order, in a vocabulary of any size."""
    seed = torch.tensor([0, -1, 2**63 - 1, -(2**63), 123456789])
    position = torch.tensor([0, 1, 5, 2**40, 1_048_575])
    all_together = gumbel(seed, position, TOKEN, 300)
    for i in range(5):
        alone = gumbel(seed[i : i + 1], position[i : i + 1], TOKEN, 17)
        assert torch.equal(all_together[i, :17], alone[0])
    flipped = gumbel(seed.flip(0), position.flip(0), TOKEN, 300)
    assert torch.equal(flipped.flip(0), all_together)
    assert all_together.dtype == torch.float64
    assert len(torch.unique(all_together)) == all_together.numel()


# The generator's definition, in whole numbers: SplitMix64's finaliser and how keys are chained.

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(x: int) -> int:
    x = (x ^ x >> 30) * MULTIPLIERS[0] & MASK
    x = (x ^ x >> 27) * MULTIPLIERS[1] & MASK
    return x ^ x >> 31


def unmix(x: int) -> int:
    """The input of mix."""

    def unshift(y: int, bits: int) -> int:
        found = y
        for _ in range(64 // bits):
            found = y ^ found >> bits
        return found

    x = unshift(x, 31) * pow(MULTIPLIERS[1], -1, 2**64) & MASK
    x = unshift(x, 27) * pow(MULTIPLIERS[0], -1, 2**64) & MASK
    return unshift(x, 30)


def seed_for(hashed: int, position: int, stream: int, token: int) -> int:
    """The seed, as a signed 64-bit integer, whose draw at these coordinates hashes so."""
    key = unmix(hashed) - GOLDEN * (token + 1) & MASK
    inner = unmix(key) - GOLDEN * (position + 1) & MASK
    seed = unmix(inner) - GOLDEN * (stream + 1) & MASK
    return (seed + 2**63) % 2**64 - 2**63


def test_splitmix_is_splitmix() -> None:
    """The first outputs of SplitMix64 seeded with 0, as its authors' program prints them."""
    outputs = [mix(GOLDEN * i & MASK) for i in (1, 2, 3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert all(unmix(mix(x)) == x for x in (0, 1, MASK, 12345678901234567890))


@pytest.mark.parametrize("hashed", [0, 1, 2**12, MASK // 2, MASK - 2**12, MASK])
def test_the_extremes_are_finite(hashed: int) -> None:
    """u is never 0 or 1 and the noise never infinite, at the smallest and largest hash and in
    between; the draw is the one that whole-number arithmetic predicts."""
    for position, stream, token in ((0, TOKEN, 0), (1_048_575, RECOVER, 200_063), (17, DRAFT, 5)):
        seed = torch.tensor([seed_for(hashed, position, stream, token)])
        g = gumbel(seed, torch.tensor([position]), stream, token + 1)[0, token].item()
        u = ((hashed >> 12) + 0.5) / 2.0**52
        assert 0.0 < u < 1.0
        assert g == pytest.approx(-np.log(-np.log(u)), rel=1e-12)
        assert np.isfinite(g)
    seed = torch.tensor([seed_for(hashed, 3, ACCEPT, -1)])
    assert uniform(seed, torch.tensor([3]), ACCEPT).item() == u
