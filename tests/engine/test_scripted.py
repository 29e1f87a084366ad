"""Scripted drafts and tokens: the hooks of benchmarks and of lossless checks on a GPU."""

import random
from dataclasses import replace

import pytest
import torch
from engine.schedules import VOCAB, pair
from pairs import without_draft

from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.llm import LLM
from eaglerun.messages import SamplingParams
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = [list(range(3, 25)), list(range(9, 15))]


def make(draft: bool, **settings: object) -> Engine:
    models = pair(1, 4, torch.float64)
    config = {
        "draft": "tiny" if draft else None,
        "max_model_len": 96,
        "num_kv_blocks": 100,
        "max_num_seqs": 8,
        "log_stats_every": 0,
        **settings,
    }
    return start_engine(resolve(config, environ={}), models if draft else without_draft(models))


def test_a_script_with_wrong_tokens_at_seeded_places_is_lossless():
    """The plain run's tokens replayed as drafts, 30% of them wrong: same output, 70% right."""
    params = [replace(GREEDY, seed=i) for i in range(2)]
    plain = LLM.from_engine(make(draft=False)).generate(PROMPTS, params, progress=False)
    rng = random.Random(0)
    engine = make(draft=True, scripted="drafts", num_draft_tokens=4)

    def write_script(seed: int, length: int) -> torch.Tensor:
        script = torch.zeros(length, dtype=torch.int64)
        whole = [*PROMPTS[seed], *plain[seed].token_ids]
        for i, token in enumerate(whole):
            script[i] = token if rng.random() < 0.7 else (token + 1) % VOCAB
        return script

    script = runner_of(engine).script
    assert script is not None
    script.write = write_script
    out = LLM.from_engine(engine).generate(PROMPTS, params, progress=False)
    assert [o.token_ids for o in out] == [o.token_ids for o in plain]
    at_first = engine.stats.acceptance.stats()
    assert 0.5 < at_first.accepted_at[0] / at_first.judged_at[0] < 0.9


@pytest.mark.parametrize("k", [0, 3])
def test_scripted_tokens_are_the_same_stream_in_every_mode(k: int):
    """A benchmark feeds plain and speculative runs the same random tokens."""
    engine = make(draft=k > 0, scripted="tokens", num_draft_tokens=k)
    out = LLM.from_engine(engine).generate([PROMPTS[0]], replace(GREEDY, seed=5), progress=False)
    start = len(PROMPTS[0])
    written = runner_of(engine).script
    assert written is not None
    script = written.write(5, 96)[start : start + 40]
    assert list(out[0].token_ids) == script.tolist()
    assert len(set(out[0].token_ids)) > 20


def test_synthetic_acceptance_judges_scripted_tokens_too():
    engine = make(
        draft=True, scripted="tokens", num_draft_tokens=3, synthetic_acceptance_length=4.0
    )
    # One token of the prefill, then ten whole steps of four.
    params = replace(GREEDY, max_tokens=41)
    out = LLM.from_engine(engine).generate(PROMPTS, params, progress=False)
    assert all(o.speculation.mean_acceptance_length == 4.0 for o in out)
