"""The draft against the loop oracle: same drafts token for token, states within 1e-9 (float64).

Combine, forward, the KV of fill_kv and the whole propose loop, for every toggle of the config,
over paged memory with shuffled block ids whose unused cells are NaN.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.drafts import STEERING, TOGGLES, draft_config, make_draft, random_weights, taps_of
from oracles.eagle3 import Eagle3Oracle, Proposal, rotate
from pairs import target_spec, tiny_target
from torch import Tensor

from eaglerun.kernels.noise import DRAFT
from eaglerun.kernels.rows import LayerKV, Newest, Rows
from eaglerun.messages import SamplingParams
from eaglerun.models.attention import DraftKV
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.sampling import Features, SamplingState
from eaglerun.speculative.drafter import Asked
from eaglerun.speculative.eagle3 import Sampler, propose

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
TOLERANCE = 1e-9
VOCAB = 11
BLOCK = 4
TEMPERATURE = 1.75  # exact in float32, in which the engine keeps it


@dataclass(frozen=True)
class Case:
    draft: Eagle3Llama
    oracle: Eagle3Oracle
    num_taps: int


def make_case(changes: dict[str, Any], seed: int, path: Path) -> Case:
    spec = target_spec(VOCAB, BLOCK)
    config = draft_config(spec, **changes)
    target = tiny_target(seed, spec, tuple(taps_of(config)), torch.float64)
    steering = {key: changes[key] for key in STEERING if key in changes}
    draft, oracle = make_draft(target, config, random_weights(config, seed), path, **steering)
    return Case(draft, oracle, len(taps_of(config)))


def mixed_toggles(generator: random.Random) -> dict[str, Any]:
    """Any combination that the config allows."""
    flip = generator.choice
    changes: dict[str, Any] = {
        "fc_norm": flip([False, True]),
        "norm_output": flip([False, True]),
        "norm_before_residual": flip([False, True]),
        "attention_bias": flip([False, True]),
        "num_key_value_heads": flip([1, 2, 4]),
        "hidden_size": flip([24, 32, 40]),
        "target_hidden_size": 32,
        "head_dim": flip([4, 8, 14]),
        "draft_vocab_size": flip([5, VOCAB]),
        "logit_scale": flip([0.5, 1.0, 2.0]),
        "rms_norm_eps": flip([1e-6, 1e-2]),
        "rope_theta": flip([20.0, 10000.0, 5e6]),
        "use_sliding_window": flip([False, True]),
        "sliding_window": flip([1, 2, 3, 9]),
        "prefix": flip(["midlayer.", "layers.0."]),
    }
    changes["norm_before_fc"] = not changes["fc_norm"] and flip([False, True])
    taps = sorted(generator.sample(range(5), generator.randint(1, 4)))
    return changes | {"eagle_aux_hidden_state_layer_ids": taps}


# 10 mixtures, times the scale.
CASES = {**TOGGLES, **{f"mixed_{i}": mixed_toggles(random.Random(i)) for i in range(10 * SCALE)}}
every_toggle = pytest.mark.parametrize("name", CASES)


@dataclass(frozen=True)
class Text:
    """A sequence x[0 .. p] with the target's aux states of its positions 0 .. p - 1."""

    tokens: list[int]
    aux: np.ndarray  # [taps, p, target hidden]

    def states(self, oracle: Eagle3Oracle) -> list[np.ndarray]:
        return [oracle.fuse(list(self.aux[:, j])) for j in range(len(self.tokens) - 1)]

    def proposal(
        self, oracle: Eagle3Oracle, count: int, drawn: list[int] | None = None
    ) -> Proposal:
        aux = [list(self.aux[:, j]) for j in range(len(self.tokens) - 1)]
        return oracle.propose(self.tokens, aux, count, drawn)


def random_text(generator: np.random.Generator, num_tokens: int, num_taps: int) -> Text:
    tokens = [int(t) for t in generator.integers(0, VOCAB, num_tokens)]
    scale = generator.uniform(0.2, 3.0, (num_taps, 1, 1))
    return Text(tokens, scale * generator.normal(size=(num_taps, num_tokens - 1, 32)))


def poisoned_kv(draft: Eagle3Llama, num_blocks: int) -> LayerKV:
    device = torch.device("cpu")
    kv = DraftKV.allocate(draft.spec, num_blocks, BLOCK, device, torch.float64).layer
    kv.k.fill_(torch.nan)
    kv.v.fill_(torch.nan)
    return kv


def shuffled_tables(
    generator: np.random.Generator, num_tokens: list[int], spare_blocks: int
) -> tuple[Tensor, int]:
    """Block tables [B, M] of scattered, disjoint blocks; -1 past a sequence's own."""
    counts = [-(-n // BLOCK) for n in num_tokens]
    ids = generator.permutation(sum(counts) + spare_blocks).tolist()
    table = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for b, count in enumerate(counts):
        table[b, :count] = torch.tensor([ids.pop() for _ in range(count)])
    return table, sum(counts) + spare_blocks


def slots_of(table: Tensor, b: int, positions: Tensor) -> Tensor:
    return table[b].long()[positions // BLOCK] * BLOCK + positions % BLOCK


def combine(draft: Eagle3Llama, text: Text) -> Tensor:
    return draft.combine(torch.from_numpy(text.aux))


def assert_close(got: Tensor, want: Any) -> None:
    torch.testing.assert_close(
        got, torch.as_tensor(np.asarray(want)), atol=TOLERANCE, rtol=TOLERANCE
    )


@every_toggle
def test_combine_and_forward(name: str, tmp_path: Path) -> None:
    """The fused hidden states, and normed state, feedback and logits of every row of three
    sequences in one ragged batch; the same rows again in a uniform one."""
    case = make_case(CASES[name], 3, tmp_path)
    draft, oracle = case.draft, case.oracle
    generator = np.random.default_rng(7)
    texts = [random_text(generator, n, case.num_taps) for n in (2, 14, 9)]
    lengths = [len(text.tokens) for text in texts]
    table, num_blocks = shuffled_tables(generator, lengths, spare_blocks=3)
    kv = poisoned_kv(draft, num_blocks)
    positions = [torch.arange(1, n) for n in lengths]
    q_lens = tuple(n - 1 for n in lengths)
    batch = Rows(
        positions=torch.cat(positions),
        kv_slots=torch.cat([slots_of(table, b, p) for b, p in enumerate(positions)]),
        block_tables=table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        max_seq_len=max(lengths),
        cu_seqlens=torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32),
        q_lens=q_lens,
    )
    hidden = torch.cat([combine(draft, text) for text in texts])
    assert_close(hidden, [h for text in texts for h in text.states(oracle)])
    ids = torch.tensor([t for text in texts for t in text.tokens[1:]])
    normed, feedback = draft.forward(ids, hidden, batch, kv)
    logits = draft.logits(normed)
    states = [
        state
        for text in texts
        for state in oracle.rows(text.tokens[1:], text.states(oracle), range(len(text.tokens) - 1))
    ]
    assert_close(normed, [state.normed for state in states])
    assert_close(feedback, [state.feedback for state in states])
    assert_close(logits, [state.logits for state in states])
    best = draft.to_target_ids(logits.argmax(-1)).tolist()
    assert best == [oracle.target_id(int(np.argmax(state.logits))) for state in states]

    rows = slice(q_lens[0], q_lens[0] + 8)  # eight rows of the second sequence, uniform form
    again = Rows(
        positions=batch.positions[rows],
        kv_slots=torch.full((8,), -1),
        block_tables=table[1:2],
        seq_lens=torch.tensor([lengths[1]], dtype=torch.int32),
        max_seq_len=lengths[1],
    )
    normed_again, feedback_again = draft.forward(ids[rows], hidden[rows], again, kv)
    assert_close(normed_again, [state.normed for state in states[rows]])
    assert_close(feedback_again, [state.feedback for state in states[rows]])


@every_toggle
def test_fill_kv(name: str, tmp_path: Path) -> None:
    """The stored keys and values are the oracle's, at the slots of their positions, and no other
    cell is touched."""
    case = make_case(CASES[name], 4, tmp_path)
    generator = np.random.default_rng(8)
    text = random_text(generator, 11, case.num_taps)
    table, num_blocks = shuffled_tables(generator, [11], spare_blocks=2)
    kv = poisoned_kv(case.draft, num_blocks)
    positions = torch.arange(1, 11)
    slots = slots_of(table, 0, positions)
    slots[4] = -1
    ids = torch.tensor(text.tokens[1:])
    case.draft.fill_kv(ids, combine(case.draft, text), positions, slots, kv)
    groups, dim = kv.k.shape[2:]
    k, v = kv.k.view(-1, groups, dim), kv.v.view(-1, groups, dim)
    written = torch.zeros(k.shape[0], dtype=torch.bool)
    for row, (token, hidden) in enumerate(
        zip(text.tokens[1:], text.states(case.oracle), strict=True)
    ):
        if slots[row] < 0:
            continue
        written[slots[row]] = True
        keys, values = case.oracle.key_value(case.oracle.layer_input(token, hidden), row)
        assert_close(k[slots[row]], keys)
        assert_close(v[slots[row]], values)
    assert k[~written].isnan().all() and v[~written].isnan().all()


@dataclass(frozen=True)
class Proposed:
    """A batch of sequences that proposed together, over paged memory."""

    texts: list[Text]
    num_propose: list[int]
    drafts: Tensor
    probs: Tensor | None


def run_propose(
    case: Case, seed: int, num_passes: int, temperature: float | None = None
) -> Proposed:
    """Five sequences of different lengths and wishes, the last a padding row; true rows filled
    first, in two parts, then propose. ``temperature``: draw the drafts."""
    generator = np.random.default_rng(seed)
    draft = case.draft
    lengths = [2, int(generator.integers(3, 7)), 12, int(generator.integers(13, 30)), 5]
    texts = [random_text(generator, n, case.num_taps) for n in lengths]
    num_propose = [num_passes, *generator.integers(0, num_passes + 1, 3).tolist(), 0]
    # No block beyond the last draft row: position length - 1 + num_propose - 1.
    needed = [n + max(k - 1, 0) for n, k in zip(lengths, num_propose, strict=True)]
    table, num_blocks = shuffled_tables(generator, needed, spare_blocks=2)
    kv = poisoned_kv(draft, num_blocks)
    newest = []
    for b, text in enumerate(texts):
        hidden = combine(draft, text)
        newest.append(hidden[-1])
        positions = torch.arange(1, lengths[b])
        slots = slots_of(table, b, positions)
        cut = int(generator.integers(0, len(positions) + 1))
        for part in (slice(cut, None), slice(0, cut)):
            draft.fill_kv(
                torch.tensor(text.tokens[1:])[part], hidden[part], positions[part], slots[part], kv
            )
    state = SamplingState(len(texts), VOCAB, 1, torch.device("cpu"))
    sampler = None
    if temperature is not None:
        params = SamplingParams(temperature=temperature, seed=seed)
        for slot in range(len(texts)):
            state.admit(slot, params, seed + slot, (), (), (), 0)
        slots = torch.arange(len(texts))
        sampler = Sampler(state.rows(slots, Features.of([params])), DRAFT)
    # A row of padding has no sequence behind it (kernels.draft_inputs.newest_inputs).
    newest[-1] = torch.zeros_like(newest[-1])
    start = Newest(
        torch.tensor([text.tokens[-1] for text in texts]),
        torch.tensor([n - 1 for n in lengths]),
        torch.stack(newest),
    )
    asked = Asked(start, torch.tensor(num_propose), table.clamp(min=0), max(lengths))
    drafts, probs = propose(draft, kv, asked, num_passes, sampler)
    return Proposed(texts, num_propose, drafts, probs)


@every_toggle
def test_propose(name: str, tmp_path: Path) -> None:
    """Every pass of the paged loop drafts the token that the loop from scratch drafts."""
    case = make_case(CASES[name], 5, tmp_path)
    for seed, num_passes in ((1, 1), (2, 4), (3, 8)):
        done = run_propose(case, seed, num_passes)
        assert done.probs is None and done.drafts.shape == (5, num_passes)
        for text, count, drafts in zip(
            done.texts, done.num_propose, done.drafts.tolist(), strict=True
        ):
            assert drafts[:count] == text.proposal(case.oracle, count).tokens


@every_toggle
def test_propose_draws(name: str, tmp_path: Path) -> None:
    """Sampled drafts: the distribution handed on is the softmax of the oracle's logits at the
    temperature, in the target's vocabulary, along the drafts that were drawn."""
    case = make_case(CASES[name], 6, tmp_path)
    done = run_propose(case, 4, 4, temperature=TEMPERATURE)
    assert done.probs is not None and done.probs.shape == (5, 4, VOCAB)
    for b, (text, count) in enumerate(zip(done.texts, done.num_propose, strict=True)):
        drawn = done.drafts[b, :count].tolist()
        proposal = text.proposal(case.oracle, count, drawn)
        for s, row in enumerate(proposal.rows):
            powers = np.exp((row.logits - row.logits.max()) / TEMPERATURE)
            want = np.zeros(VOCAB)
            for draft_id, power in enumerate(powers):
                want[case.oracle.target_id(draft_id)] = power / powers.sum()
            assert_close(done.probs[b, s], want)
            assert want[drawn[s]] > 0


def test_worked_vectors() -> None:
    """The oracle against numbers computed by hand: the d2t offsets, and rope's frequencies."""
    oracle = Eagle3Oracle(
        {"hidden_size": 4, "num_attention_heads": 1}, {"d2t": np.array([0, 0, 3])}
    )
    assert [oracle.target_id(i) for i in range(3)] == [0, 1, 5]
    for j, frequency in ((0, 1.0), (1, 0.7858299804196346), (63, 2.545079788e-07)):
        turned = rotate(np.eye(128)[j], 1, 5e6)
        assert turned[j] == pytest.approx(np.cos(frequency), abs=1e-12)
        assert turned[j + 64] == pytest.approx(np.sin(frequency), rel=1e-9)
        assert np.count_nonzero(turned) == 2
