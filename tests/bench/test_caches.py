"""What narrower caches change: nothing where they are not narrower, little where they are."""

import json
from pathlib import Path

import pytest
import torch
from engine.schedules import pair

from eaglerun.bench import caches, evaluate
from eaglerun.config import resolve
from eaglerun.llm import LLM
from eaglerun.messages import SamplingParams
from eaglerun.server import cli
from eaglerun.start import start_engine

TARGET = pair(0, 4, torch.float64).target
TEXT = tuple(1 + (7 * i * i + 3 * i) % 39 for i in range(60))
WIDE = (torch.float64, torch.float64)
FP8 = torch.float8_e4m3fn


def test_the_logits_are_the_engines(monkeypatch: pytest.MonkeyPatch):
    """Greedy answers follow from them, however the text is cut; blocks are dropped on the way."""
    settings = {"max_model_len": 96, "num_kv_blocks": 40, "log_stats_every": 0}
    engine = start_engine(resolve(settings, environ={}), pair(0, 4, torch.float64))
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    answer = LLM.from_engine(engine).generate([TEXT], params, progress=False)[0].token_ids
    text = (*TEXT, *answer[:-1])
    logits = caches.logits_of(TARGET, text, len(TEXT) - 1, WIDE)
    assert tuple(logits.argmax(dim=-1).tolist()) == answer
    monkeypatch.setattr(caches, "CHUNK", 7)
    cut = caches.logits_of(TARGET, text, len(TEXT) - 1, WIDE)
    torch.testing.assert_close(cut, logits, rtol=1e-10, atol=1e-10)


def test_errors_grow_as_caches_narrow():
    exact = caches.logits_of(TARGET, TEXT, 0, WIDE)
    means = []
    for dtypes in (
        WIDE,
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
        (FP8, torch.float64),
    ):
        kl, same = caches.compare(exact, caches.logits_of(TARGET, TEXT, 0, dtypes))
        assert len(kl) == len(same) == 60
        means.append(float(kl.mean()))
    assert means[0] == 0 and means == sorted(means) and means[3] > 10 * means[2] > 0


def test_index_keys_alone_change_the_selection_alone():
    """60 tokens are 15 blocks of which 3 are selected; within 12 tokens all are."""
    dtypes = (torch.float64, FP8)
    exact, other = (caches.logits_of(TARGET, TEXT, 0, d) for d in (WIDE, dtypes))
    torch.testing.assert_close(other[:12], exact[:12], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(other, exact)


def test_compare_by_hand():
    exact = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    other = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    kl, same = caches.compare(exact, other)
    # p = (1, e) / (1 + e) against its mirror: (e - 1) / (e + 1).
    assert kl.tolist() == pytest.approx([0.0, 0.46211715726])
    assert same.tolist() == [True, False]


def test_the_demo_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(evaluate, "TASKS", ("seeds",))
    monkeypatch.setattr(caches, "MAX_TOKENS", 6)
    flags = ("--num-prompts=2", "--max-num-seqs=2", "--num-draft-tokens=0", f"--out={tmp_path}")
    assert cli.main(["bench", "caches", "--device=cpu", *flags]) == 0
    rows = json.loads((tmp_path / "caches.json").read_text())["rows"]
    assert [(r["kv"], r["index"]) for r in rows] == list(caches.PAIRS)
    assert all(r["texts"] == 2 and r["tokens"] == 12 for r in rows)
    assert 0 < rows[0]["kl"] < rows[1]["kl"] < 0.1
