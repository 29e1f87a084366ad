"""What the running engine proposes equals the loop oracle's drafts, token for token (float64).

After each step the drafts that stand in DeviceState are noted with the length of their sequence.
When all is done the target runs once over each finished text, whole and without a cache, and from
the aux states of that one forward the oracle computes every proposal from scratch. So a hole or a
stale cell in the draft's KV, a wrong carry, or a draft row at the wrong place is another token.
"""

import functools
import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.drafts import (
    STEERING,
    TOGGLES,
    draft_config,
    guess_successor,
    make_draft,
    random_weights,
    taps_of,
)
from oracles.eagle3 import Eagle3Oracle
from pairs import target_spec, tiny_target
from torch import Tensor

from eaglerun.config import resolve
from eaglerun.kernels.rows import Rows
from eaglerun.loader import Models
from eaglerun.messages import Finished, Request, SamplingParams, Tokens
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
VOCAB = 11
BLOCK = 4
# Drafts that are often right (long accepted runs), beside the random ones of TOGGLES, which hang
# on every key but are right by chance alone.
GUESSERS = {
    "guesser": {"num_attention_heads": 1, "fc_norm": True, "norm_output": True},
    "guesser_pre_norm": {"num_attention_heads": 1, "norm_before_fc": True},
}


@dataclass(frozen=True)
class Pair:
    models: Models
    oracle: Eagle3Oracle


@pytest.fixture(scope="module")
def make_pair(tmp_path_factory: pytest.TempPathFactory) -> "functools.partial[Pair]":
    return functools.partial(_pair, tmp_path_factory.mktemp("drafts"))


def _pair(path: Path, name: str) -> Pair:
    seed = 1
    changes = GUESSERS[name] if name in GUESSERS else TOGGLES[name]
    spec = target_spec(VOCAB, BLOCK, eos_token_ids=(0,))
    config = draft_config(spec, **changes)
    # The guessers' target hangs on the current token, the others' on all of its context.
    context = 0.03 if name in GUESSERS else 0.6
    target = tiny_target(seed, spec, tuple(taps_of(config)), torch.float64, context)
    weights = random_weights(config, seed + 1)
    if name in GUESSERS:
        guess_successor(weights, target, noise=0.03)
    steering = {key: changes[key] for key in STEERING if key in changes}
    draft, oracle = make_draft(target, config, weights, path / f"{name}_{seed}", **steering)
    return Pair(Models("tiny", target, draft, (0,)), oracle)


def aux_states(target: MiniMaxM3, tokens: list[int]) -> Tensor:
    """[taps, n, H]: the tapped states of every position, from one forward over the whole text."""
    n = len(tokens)
    num_blocks = -(-n // BLOCK)
    kv = TargetKV.allocate(target.spec, num_blocks, BLOCK, torch.device("cpu"), torch.float64)
    aux = torch.full((len(target.taps), n, target.spec.hidden_size), torch.nan).double()
    rows = Rows(
        positions=torch.arange(n),
        kv_slots=torch.arange(n),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        seq_lens=torch.tensor([n], dtype=torch.int32),
        max_seq_len=n,
        cu_seqlens=torch.tensor([0, n], dtype=torch.int32),
        q_lens=(n,),
    )
    target(torch.tensor(tokens), rows, kv, aux)
    return aux


@dataclass(frozen=True)
class Script:
    """K of each step, repeated."""

    ks: tuple[int, ...]

    def num_draft_tokens(self, step_id: int, num_running: int) -> int:
        return self.ks[step_id % len(self.ks)]


@dataclass
class Life:
    """One request's answer and the proposals made on its way: (length, drafts)."""

    tokens: list[int]
    proposals: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)
    finished: Finished | None = None


@dataclass
class Drive:
    """An engine with NaN in all of its memory, driven step by step."""

    pair: Pair
    ks: tuple[int, ...]
    settings: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings: dict[str, object] = {
            "draft": "tiny",
            "num_draft_tokens": 8,
            "num_kv_blocks": 200,
            "max_model_len": 120,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 200,
            "log_stats_every": 0,
        }
        config = resolve(settings | self.settings, environ={})
        self.engine = start_engine(config, self.pair.models, Script(self.ks))
        runner = runner_of(self.engine)
        for region in runner.kv_regions():
            region.tensor.fill_(torch.nan)
        assert runner.aux is not None
        runner.aux.fill_(torch.nan)
        self.lives: dict[tuple[str, int], Life] = {}
        self.prompts: dict[str, list[int]] = {}
        self.num_steps = 0

    def submit(self, name: str, prompt: list[int], **sampling: object) -> None:
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True} | sampling)  # type: ignore[arg-type]
        self.engine.submit(Request(name, tuple(prompt), params))
        for index in range(params.n):
            self.lives[name, index] = Life(list(prompt))

    def step(self) -> None:
        for event in self.engine.step():
            assert isinstance(event, Tokens | Finished)
            life = self.lives[event.request_id, event.index]
            if isinstance(event, Tokens):
                life.tokens += event.token_ids
            else:
                life.finished = event
        state = runner_of(self.engine).state
        for seq in self.engine.scheduler.sequences():
            if seq.slot_id >= 0 and seq.num_proposed:
                drafts = tuple(state.draft_tokens[seq.slot_id, : seq.num_proposed].tolist())
                life = self.lives[seq.request.request_id, seq.index]
                life.proposals.add((int(state.length[seq.slot_id]), drafts))
        self.num_steps += 1
        assert self.num_steps < 2000, "never ends"

    def run(self) -> None:
        while self.engine.has_work:
            self.step()

    def check(self, last: int | None = None) -> int:
        """Every proposal (or each life's ``last`` ones) against the oracle; how many drafts."""
        count = 0
        for life in self.lives.values():
            assert life.finished is not None
            aux = aux_states(self.pair.models.target, life.tokens).numpy()
            known = sorted(p for p in life.proposals if p[0] <= len(life.tokens))
            for length, drafts in known[-last:] if last else known:
                chunks = [list(aux[:, j]) for j in range(length)]
                want = self.pair.oracle.propose(life.tokens[:length], chunks, len(drafts))
                assert list(drafts) == want.tokens, f"after {length} tokens"
                count += len(drafts)
        return count


def text(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, VOCAB, length)]


def lively(drive: Drive, seed: int) -> None:
    """Chunked prefills beside decoding, prefix hits, preemptions, greedy and sampled requests."""
    chance = random.Random(seed)
    stem = text(seed, 14)
    arrivals = {
        0: ("a", stem + text(seed + 1, 5), {"max_tokens": 18}),
        2: ("b", text(seed + 2, 3), {"max_tokens": 15, "temperature": 1.0, "seed": seed}),
        6: ("c", stem[:12] + text(seed + 3, chance.randint(1, 6)), {"max_tokens": 13}),
        7: ("d", text(seed + 4, 1), {"max_tokens": 9, "num_draft_tokens": 2}),
        9: ("e", [*stem, 3], {"max_tokens": 12, "temperature": 0.7, "seed": 5}),
    }
    preemptions = {5: "a", 8: "b", 11: "c", 13: "a"}
    for step in itertools.count():
        if step in arrivals:
            name, prompt, sampling = arrivals[step]
            drive.submit(name, prompt, **sampling)
        if step in preemptions:
            drive.engine.scheduler.preempt(preemptions[step])
        drive.step()
        if step > max(arrivals) and not drive.engine.has_work:
            return


SMALL_CHUNKS: dict[str, object] = {"max_chunk_tokens": 5}


@pytest.mark.parametrize("name", [*TOGGLES, *GUESSERS])
def test_every_toggle(make_pair: "functools.partial[Pair]", name: str) -> None:
    """Each toggle through a lively schedule with K from 0 to 4."""
    drive = Drive(make_pair(name), (3, 1, 0, 4, 2), SMALL_CHUNKS)
    lively(drive, seed=1)
    assert drive.engine.stats.preemptions >= 3
    assert drive.engine.stats.cached_tokens >= 8
    assert drive.check() > 30


def variations() -> Iterator[tuple[str, tuple[int, ...], dict[str, object]]]:
    """(pair, K by step, settings): what steps and memory can look like."""
    yield "guesser", (8,), {}
    yield "guesser", (8, 0, 0, 5), SMALL_CHUNKS | {"lag": 1}
    yield "guesser_pre_norm", (1, 6, 0, 3), {"max_chunk_tokens": 1}
    yield "guesser_pre_norm", (4,), {"lag": 1, "max_chunk_tokens": 4}
    yield "eagle_3_1", (0, 0, 3), {"max_chunk_tokens": 7, "enable_prefix_caching": False}
    yield "eagle_3_1_gqa", (2, 8), SMALL_CHUNKS | {"decode_batch_sizes": (1, 3, 8)}
    yield "norm_before_residual", (3,), SMALL_CHUNKS | {"lag": 1, "decode_batch_sizes": (8,)}
    yield "plain", (5, 0, 7), {"max_model_len": 48, "num_kv_blocks": 16}  # blocks run short
    yield "window", (6,), {"max_model_len": 48, "num_kv_blocks": 16, "lag": 1}
    yield "narrow", (3, 2), {"max_chunk_tokens": 3, "max_num_seqs": 2}


@pytest.mark.parametrize("which", range(len(list(variations()))))
@pytest.mark.parametrize("seed", range(2, 2 + SCALE))
def test_any_schedule(make_pair: "functools.partial[Pair]", which: int, seed: int) -> None:
    """Lag 0 and 1, chunks of one token up to none, padded batches, scarce blocks, two slots."""
    name, ks, settings = list(variations())[which]
    drive = Drive(make_pair(name), ks, settings)
    lively(drive, seed)
    assert drive.check() > 30


@pytest.mark.parametrize(("length", "lag"), [(1.5, 1), (3.5, 0), (6.5, 1), (9.0, 0)])
def test_long_runs_of_wild_drafts(
    make_pair: "functools.partial[Pair]", length: float, lag: int
) -> None:
    """Synthetic acceptance makes text of drafts that hang on every cell: after runs of none, one
    ... eight accepted ones, the next proposal starts at the right row."""
    drive = Drive(make_pair("eagle_3_1"), (8,), {"synthetic_acceptance_length": length, "lag": lag})
    for seed in range(2):
        drive.submit(str(seed), text(seed, 4), max_tokens=40, temperature=0.5, seed=seed)
    drive.run()
    histogram = drive.engine.stats.acceptance.stats().acceptance_histogram
    assert histogram[int(length - 1)]
    assert drive.check() > 30


def test_long_runs_of_good_drafts(make_pair: "functools.partial[Pair]") -> None:
    """The same by honest verification: proposals after every number of accepted drafts."""
    drive = Drive(make_pair("guesser"), (6,))
    for seed in range(5):
        drive.submit(str(seed), text(seed, 4), max_tokens=30, temperature=0.5, seed=seed)
    drive.run()
    assert all(drive.engine.stats.acceptance.stats().acceptance_histogram)
    assert drive.check() > 30


@pytest.mark.parametrize(("name", "lag"), [("guesser", 1), ("eagle_3_1", 0)])
def test_after_200_steps_without_drafts(
    make_pair: "functools.partial[Pair]", name: str, lag: int
) -> None:
    """K = 0 fills the draft's KV too: the first drafts after 200 such steps are the oracle's, and
    those of a run that drafted all along."""
    pair = make_pair(name)
    settings = {"max_model_len": 256, "lag": lag, "num_kv_blocks": 150}
    paused = Drive(pair, (*[0] * 200, *[3] * 100), settings)
    steady = Drive(pair, (3,), settings)
    for drive in (paused, steady):
        drive.submit("a", text(3, 7), max_tokens=207)
        drive.submit("b", text(4, 2), max_tokens=207, temperature=1.0, seed=9)
        drive.run()
    for (who, life), (other, reference) in zip(
        paused.lives.items(), steady.lives.items(), strict=True
    ):
        assert who == other and life.tokens == reference.tokens
        first = min(life.proposals)
        assert first[0] > 200
        at = dict(reference.proposals)
        assert all(at[n][: len(d)] == d[: len(at[n])] for n, d in life.proposals if n in at)
    assert paused.check() >= 9
    assert steady.check(last=2) > 5


@pytest.mark.parametrize(("name", "lag"), [("guesser", 0), ("eagle_3_1_gqa", 1)])
def test_after_a_preemption(make_pair: "functools.partial[Pair]", name: str, lag: int) -> None:
    """Preempted at every few steps, with its own blocks found again in the cache or not."""
    pair = make_pair(name)
    for caching in (True, False):
        drive = Drive(
            pair, (3, 5), {"lag": lag, "enable_prefix_caching": caching, "max_chunk_tokens": 12}
        )
        drive.submit("a", text(5, 9), max_tokens=40)
        drive.submit("b", text(6, 4), max_tokens=40, temperature=1.0, seed=3)
        while drive.engine.has_work:
            if drive.num_steps % 6 == 5:
                drive.engine.scheduler.preempt("ab"[drive.num_steps // 6 % 2])
            drive.step()
        assert drive.engine.stats.preemptions >= 2
        assert drive.check() > 30


@pytest.mark.parametrize("length", [9, 12, 13, 16])
@pytest.mark.parametrize("lag", [0, 1])
def test_after_a_prefix_hit(make_pair: "functools.partial[Pair]", length: int, lag: int) -> None:
    """Prompts that share whole blocks and diverge on the next token, or are the same; the writer
    still prefilling, still decoding, or gone; answers of others as the next prompt."""
    pair = make_pair("eagle_3_1")
    drive = Drive(pair, (3,), {"lag": lag, "max_chunk_tokens": 4, "max_num_seqs": 6})
    stem = text(7, length)
    drive.submit("writer", stem, max_tokens=14)
    for i in range(4):
        drive.step()
        drive.submit(f"early {i}", [*stem[: length - i], 1 + i, 5], max_tokens=6)
    while drive.engine.has_work:
        drive.step()
    said = drive.lives["writer", 0].tokens
    drive.submit("same", stem, max_tokens=6)
    drive.submit("follow-up", [*said, 2], max_tokens=6)
    drive.submit("diverging", [*said[:-3], 1 + said[-3] % 10], max_tokens=6)
    drive.run()
    hits = {
        who: life.finished.num_cached_tokens
        for (who, _), life in drive.lives.items()
        if life.finished is not None
    }
    assert hits["same"] == (length - 1) // BLOCK * BLOCK
    assert hits["follow-up"] >= len(said) // BLOCK * BLOCK - BLOCK
    assert hits["diverging"] > length
    assert drive.check() > 30


def test_siblings_share_a_prompt(make_pair: "functools.partial[Pair]") -> None:
    """n answers to one prompt stand on the same blocks; each proposes from its own text."""
    drive = Drive(make_pair("eagle_3_1"), (2, 4), SMALL_CHUNKS)
    drive.submit("a", text(8, 13), max_tokens=12, n=4, temperature=1.0, seed=1)
    drive.run()
    assert len({tuple(life.tokens) for life in drive.lives.values()}) > 1
    ends = [life.finished for life in drive.lives.values() if life.finished is not None]
    assert sorted(end.num_cached_tokens for end in ends) == [0, 12, 12, 12]
    assert drive.check() > 30


def test_up_to_the_last_position(make_pair: "functools.partial[Pair]") -> None:
    """Sequences that run into max_model_len: drafts stop short of it and stay right until then."""
    for lag in (0, 1):
        drive = Drive(make_pair("plain"), (8, 3), {"max_model_len": 30, "lag": lag})
        for i in range(4):
            drive.submit(str(i), text(20 + i, 14 + i), max_tokens=None, temperature=float(i % 2))
        drive.run()
        assert all(len(life.tokens) == 30 for life in drive.lives.values())
        ends = [n + len(d) for life in drive.lives.values() for n, d in life.proposals]
        assert max(ends) <= 30
        assert drive.check() > 30
