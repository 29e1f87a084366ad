"""Acceptance at its ends: drafts that are always right, never right, random, or taken by decree.

The copying draft has Eagle3Llama's interface and a memory of its own kind: what it knows of a text
it reads from the draft's paged memory and from the aux states alone, and it runs the target over
it. So it is right every time only if every cell of every text is where it belongs.
"""

import dataclasses
import functools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.drafts import draft_config, make_draft, random_weights
from pairs import CPU, draft_spec, target_spec, tiny_target
from torch import Tensor

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError
from eaglerun.kernels.rows import LayerKV, Rows
from eaglerun.loader import Models
from eaglerun.messages import Finished, Request, SamplingParams, SpeculationStats, Tokens
from eaglerun.models.attention import TargetKV
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.ranks.local import runner_of
from eaglerun.speculative.verify import synthetic_rates
from eaglerun.start import start_engine

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
VOCAB = 30
BLOCK = 4
TAPS = "eagle_aux_hidden_state_layer_ids"


def whole_text_logits(target: MiniMaxM3, tokens: list[int]) -> Tensor:
    """[n, V]: the target over a whole text, without a cache."""
    n = len(tokens)
    num_blocks = -(-n // BLOCK)
    rows = Rows(
        positions=torch.arange(n),
        kv_slots=torch.arange(n),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        seq_lens=torch.tensor([n], dtype=torch.int32),
        max_seq_len=n,
    )
    kv = TargetKV.allocate(target.spec, num_blocks, BLOCK, CPU, torch.float64)
    return target.logits(target(torch.tensor(tokens), rows, kv))


class CopyingDraft(Eagle3Llama):
    """Proposes what the target would say. Its one tap is the embedding, so that a row's hidden
    state names the token before the row's own; both are written to the row's cell."""

    def __init__(self, target: MiniMaxM3, sign: float = 1.0) -> None:
        spec = draft_spec(
            target.spec, taps=(0,), use_aux_hidden_state=False, fc_norm=False, head_dim=2
        )
        super().__init__(spec, device=CPU, dtype=torch.float64)
        self._target = [target]  # in a list, so that it is no submodule
        self._sign = sign

    def fill_kv(
        self, token_ids: Tensor, hidden: Tensor, positions: Tensor, kv_slots: Tensor, kv: LayerKV
    ) -> None:
        write = kv_slots >= 0
        assert ((positions >= 1) | ~write).all()
        before = self._named_by(hidden[write])
        kv.k.view(-1, 2)[kv_slots[write]] = torch.stack([token_ids[write], before], 1).double()
        kv.v.view(-1, 2)[kv_slots[write]] = positions[write, None].double().expand(-1, 2)

    def forward(
        self, token_ids: Tensor, hidden: Tensor, rows: Rows, kv: LayerKV
    ) -> tuple[Tensor, Tensor]:
        self.fill_kv(token_ids, hidden, rows.positions, rows.kv_slots, kv)
        out = torch.zeros(len(token_ids), VOCAB, dtype=torch.float64)
        for row, position in enumerate(rows.positions.tolist()):
            if position < 0:
                continue
            sequence = row // rows.longest
            text = self._read(rows.block_tables[sequence], position, kv)
            assert text[-1] == token_ids[row]
            assert text[-2] == self._named_by(hidden[row : row + 1])
            assert rows.seq_lens[sequence] == position + 1
            out[row] = whole_text_logits(self._target[0], text)[-1]
        return out, self._target[0].embed_tokens.weight[token_ids]

    def logits(self, normed: Tensor) -> Tensor:
        return self._sign * normed

    def _named_by(self, hidden: Tensor) -> Tensor:
        """Whose embedding each row is."""
        return torch.cdist(hidden, self._target[0].embed_tokens.weight).argmin(dim=1)

    def _read(self, table: Tensor, position: int, kv: LayerKV) -> list[int]:
        """Tokens 0 .. position from the cells of 1 .. position, which agree with one another."""
        at = torch.arange(1, position + 1)
        slots = table[at // BLOCK].long() * BLOCK + at % BLOCK
        cells, places = kv.k.view(-1, 2)[slots].long(), kv.v.view(-1, 2)[slots]
        assert torch.equal(places[:, 0].long(), at), "a cell of another position, or a hole"
        assert torch.equal(cells[1:, 1], cells[:-1, 0]), "a cell of another text"
        return [int(cells[0, 1]), *cells[:, 0].tolist()]


@functools.cache
def the_target() -> MiniMaxM3:
    return tiny_target(
        11, target_spec(VOCAB, BLOCK, num_layers=2), (0,), torch.float64, context=0.6
    )


def random_draft(path: Path) -> Models:
    """A draft of random weights, which knows nothing of its target."""
    spec = target_spec(VOCAB, BLOCK, num_layers=2)
    target = tiny_target(11, spec, (0, 1, 2), torch.float64, context=0.6)
    config = draft_config(spec, **{TAPS: [0, 1, 2]}, fc_norm=True, norm_output=True)
    draft, _ = make_draft(target, config, random_weights(config, 5), path)
    return Models("noise", target, draft, (0,))


def copying(sign: float = 1.0) -> Models:
    return Models("copy", the_target(), CopyingDraft(the_target(), sign), (0,))


@dataclass(frozen=True)
class Script:
    ks: tuple[int, ...]

    def num_draft_tokens(self, step_id: int, num_running: int) -> int:
        return self.ks[step_id % len(self.ks)]


def make_engine(models: Models, ks: tuple[int, ...], **settings: object) -> Engine:
    config: dict[str, object] = {
        "draft": "tiny" if models.draft is not None else None,
        "num_draft_tokens": max(ks),
        "max_model_len": 200,
        "num_kv_blocks": 400,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "log_stats_every": 0,
    }
    return start_engine(resolve(config | settings, environ={}), models, Script(ks))


def prompts(count: int = 4) -> list[tuple[int, ...]]:
    """Different lengths, one of a single token; some share their beginnings."""
    generator = np.random.default_rng(3)
    stem = generator.integers(1, VOCAB, 13).tolist()
    tails = [generator.integers(1, VOCAB, n).tolist() for n in (4, 0, 7, 2, 1, 5)]
    found = [[*stem[: 13 - 4 * (i % 3)], *tail] for i, tail in enumerate(tails)]
    return [(stem[0],), *(tuple(prompt) for prompt in found)][:count]


@dataclass
class Run:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    stats: dict[str, SpeculationStats] = field(default_factory=dict)


def run(engine: Engine, sampling: SamplingParams, count: int = 4, preempt_every: int = 0) -> Run:
    done = Run()
    for i, prompt in enumerate(prompts(count)):
        each = dataclasses.replace(sampling, seed=i)
        engine.submit(Request(str(i), prompt, each))
        done.tokens[str(i)] = []
        for _ in range(i % 3):
            _step(engine, done)
    steps = 0
    while engine.has_work:
        steps += 1
        if preempt_every and steps % preempt_every == 0:
            engine.scheduler.preempt(str(steps // preempt_every % count))
        _step(engine, done)
    return done


def _step(engine: Engine, done: Run) -> None:
    for event in engine.step():
        assert isinstance(event, Tokens | Finished)
        if isinstance(event, Tokens):
            done.tokens[event.request_id] += event.token_ids
        else:
            done.stats[event.request_id] = event.speculation


@functools.cache
def plain(sampling_name: str) -> dict[str, list[int]]:
    engine = make_engine(Models("plain", the_target(), None, (0,)), (0,))
    return run(engine, SAMPLINGS[sampling_name]).tokens


# 25 tokens are one of the prefill and 24 of whole runs of 2, 3, 4, 6 or 8.
SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True),
    "sampled": SamplingParams(temperature=1.0, max_tokens=25, ignore_eos=True),
    "filtered": SamplingParams(
        temperature=1.5, top_k=20, top_p=0.875, max_tokens=25, ignore_eos=True
    ),
}
BUSY: dict[str, object] = {"max_chunk_tokens": 3}


def assert_all_accepted(done: Run, k: int) -> None:
    for stats in done.stats.values():
        assert stats.accepted == stats.drafted
        assert stats.steps == 24 // (k + 1)
        assert stats.mean_acceptance_length == k + 1
        assert stats.acceptance_rate == 1.0
        assert stats.acceptance_histogram == (*[0] * k, stats.steps)


@pytest.mark.parametrize(("k", "lag"), [(1, 0), (2, 1), (3, 0), (3, 1), (5, 0), (7, 1)])
def test_a_copy_of_the_target_is_always_right(k: int, lag: int) -> None:
    """Greedy: AL = K + 1 exactly, the same text as without a draft, in chunked prefills, with
    shared prefixes, while others arrive."""
    engine = make_engine(copying(), (k,), lag=lag, **BUSY)
    done = run(engine, SAMPLINGS["greedy"])
    assert done.tokens == plain("greedy")
    assert_all_accepted(done, k)
    assert engine.stats.acceptance.stats().mean_acceptance_length == k + 1
    assert engine.stats.cached_tokens > 0


@pytest.mark.parametrize("sampling", ["sampled", "filtered"])
@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_copy_that_draws_is_always_right(sampling: str, verification: str, k: int) -> None:
    """A draft whose distribution is the target's: with the same noise it draws the same tokens
    (invariant), and p / q = 1 accepts each (rejection)."""
    models = copying()
    settings = BUSY | {"draft_sampling": "probabilistic", "verification": verification}
    done = run(make_engine(models, (k,), **settings), SAMPLINGS[sampling])
    assert_all_accepted(done, k)
    if verification == "invariant":
        assert done.tokens == plain(sampling)


@pytest.mark.parametrize("settings", [{}, {"lag": 1}, {"enable_prefix_caching": False}])
def test_a_copy_stays_right_through_preemptions_and_pauses(settings: dict[str, object]) -> None:
    """K from 0 to 4 by step, a preemption every few steps: not one draft is wrong."""
    engine = make_engine(copying(), (3, 0, 4, 1), **BUSY | settings | {"max_chunk_tokens": 16})
    done = run(engine, SAMPLINGS["greedy"], preempt_every=2)
    assert done.tokens == plain("greedy")
    total = engine.stats.acceptance.stats()
    assert engine.stats.preemptions >= 2
    assert total.drafted > 40 and total.accepted == total.drafted


@pytest.mark.parametrize(("sampling", "lag"), [("greedy", 1), ("sampled", 0)])
def test_a_contrarian_is_never_right(sampling: str, lag: int) -> None:
    """Drafts that are the target's least likely tokens: AL = 1, not a draft accepted, same text."""
    engine = make_engine(copying(sign=-1.0), (2,), lag=lag, **BUSY)
    done = run(engine, SAMPLINGS[sampling])
    assert done.tokens == plain(sampling)
    total = engine.stats.acceptance.stats()
    assert total.drafted > 150
    assert (total.accepted, total.mean_acceptance_length) == (0, 1.0)
    assert total.acceptance_histogram == (total.steps, 0, 0)


@pytest.mark.parametrize("verification", ["invariant", "rejection"])
@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_a_draft_of_noise_is_right_by_chance(
    verification: str, sampling: str, tmp_path: Path
) -> None:
    """Random weights: AL near 1, and the text is the plain engine's (by the rejection rule, where
    greedy)."""
    engine = make_engine(random_draft(tmp_path), (3,), verification=verification, **BUSY)
    done = run(engine, SAMPLINGS[sampling])
    total = engine.stats.acceptance.stats()
    assert total.drafted > 200
    assert 1.0 <= total.mean_acceptance_length < 1.15
    if verification == "invariant" or sampling == "greedy":
        assert done.tokens == plain(sampling)


# Acceptance by decree.


@pytest.mark.parametrize(
    ("length", "k", "unconditional"),
    [
        (3.78, 7, (1, 1, 0.78, 0, 0, 0, 0)),
        (2.83, 3, (1, 0.83, 0)),
        (2.78, 3, (1, 0.78, 0)),
        (1.5, 2, (0.5, 0)),
        (4, 3, (1, 1, 1)),
        (1, 3, (0, 0, 0)),
        (9, 8, (1,) * 8),
        (2, 1, (1,)),
    ],
)
def test_schedule_vectors(length: float, k: int, unconditional: tuple[float, ...]) -> None:
    """The minimum-variance schedule's published examples: the running products of the conditional
    rates are the unconditional ones, and these sum up to the wish."""
    rates = synthetic_rates(length, k)
    assert np.cumprod(rates) == pytest.approx(np.array(unconditional, dtype=float), abs=1e-12)
    assert 1 + np.cumprod(rates).sum() == pytest.approx(length, abs=1e-12)
    assert all(0.0 <= rate <= 1.0 for rate in rates) and len(rates) == k


@pytest.mark.parametrize(("length", "k"), [(0.99, 3), (4.01, 3), (0.0, 1), (3.0, 1)])
def test_an_impossible_length_is_refused(length: float, k: int) -> None:
    with pytest.raises(ConfigError, match=f"{length:g}"):
        synthetic_rates(length, k)


@pytest.fixture
def noise(tmp_path: Path) -> Models:
    return random_draft(tmp_path)


def decree(
    models: Models, k: int, num_steps: int, num_seqs: int = 16, **settings: object
) -> SpeculationStats:
    """Counts of ``num_steps`` decode steps of all sequences, none of them cut short by an end."""
    wide = {
        "max_num_seqs": num_seqs,
        "max_num_batched_tokens": 25 * num_seqs,
        "num_kv_blocks": 60 * num_seqs,
    }
    engine = make_engine(models, (k,), **wide | settings)
    for i in range(num_seqs):
        sampling = SamplingParams(
            temperature=float(i % 2), seed=i, max_tokens=None, ignore_eos=True
        )
        engine.submit(Request(str(i), (1 + i % 16, 2, 3), sampling))
    for _ in range(num_steps + 1):
        engine.step()
    stats = engine.stats.acceptance.stats()
    assert stats.steps == num_seqs * num_steps and stats.drafted == k * stats.steps
    return stats


@pytest.mark.parametrize(
    ("length", "k"), [(1.0, 3), (1.25, 1), (1.5, 2), (2.83, 3), (3.78, 7), (3.0, 3), (4.0, 3)]
)
def test_synthetic_length_is_met(noise: Models, length: float, k: int) -> None:
    """The measured AL is the wish within four standard errors; every step accepts floor(L - 1)
    drafts or one more; a whole length is met exactly."""
    stats = decree(noise, k, 20, 16 * SCALE, synthetic_acceptance_length=length)
    whole = int(length - 1)
    part = length - 1 - whole
    error = np.sqrt(part * (1 - part) / stats.steps)
    assert abs(stats.mean_acceptance_length - length) <= 4 * error + 1e-12
    histogram = stats.acceptance_histogram
    allowed = {whole, whole + 1} if part else {whole}
    assert {count for count, steps in enumerate(histogram) if steps} <= allowed
    if length == k + 1:
        assert stats.mean_acceptance_length == k + 1


@pytest.mark.parametrize(("rate", "k", "length"), [(0.5, 3, 2.5), (1.0, 2, 3.0), (0.0, 2, 1.0)])
def test_synthetic_rate_is_the_length_in_other_words(
    noise: Models, rate: float, k: int, length: float
) -> None:
    """accepted / drafted = rate means AL = 1 + K * rate, by the same draws as that length."""
    by_rate = decree(noise, k, 8, synthetic_acceptance_rate=rate)
    by_length = decree(noise, k, 8, synthetic_acceptance_length=length)
    assert by_rate == by_length


def test_synthetic_tokens(noise: Models) -> None:
    """What stands is the draft's own token; what follows is the target's best, whatever the
    request's temperature: after a rejection and after the last draft."""
    engine = make_engine(noise, (3,), synthetic_acceptance_length=2.5)
    text = [5, 6, 7]
    engine.submit(
        Request(
            "a",
            tuple(text),
            SamplingParams(temperature=1.0, seed=1, max_tokens=None, ignore_eos=True),
        )
    )
    counts = set()
    drafts: list[int] = []
    while len(text) < 60:
        (event,) = engine.step()
        assert isinstance(event, Tokens)
        if drafts:
            accepted = event.num_accepted
            assert list(event.token_ids[:accepted]) == drafts[:accepted]
            before = [*text, *drafts[:accepted]]
            assert event.token_ids[accepted] == whole_text_logits(noise.target, before)[-1].argmax()
            assert len(event.token_ids) == accepted + 1
            counts.add(accepted)
        text += event.token_ids
        (seq,) = engine.scheduler.sequences()
        drafts = runner_of(engine).state.draft_tokens[seq.slot_id, :3].tolist()
    assert counts == {1, 2}


def test_one_wish_only() -> None:
    """Length and rate exclude one another, and both need a draft of at least one token."""
    both = {"synthetic_acceptance_length": 2.0, "synthetic_acceptance_rate": 0.5, "draft": "tiny"}
    with pytest.raises(ConfigError, match="synthetic_acceptance_rate"):
        resolve(both, environ={})
    none = {"synthetic_acceptance_length": 1.0, "num_draft_tokens": 0, "draft": "tiny"}
    with pytest.raises(ConfigError, match="num_draft_tokens"):
        resolve(none, environ={})


def test_the_double_has_the_interface() -> None:
    """The copying draft overrides methods that exist, and nothing else of Eagle3Llama's face."""
    public = {name for name in vars(CopyingDraft) if not name.startswith("_")}
    assert public <= {"fill_kv", "forward", "logits"} <= vars(Eagle3Llama).keys()
    assert isinstance(copying().draft, Eagle3Llama)
    assert DraftSpec in type(CopyingDraft(the_target()).spec).__mro__
