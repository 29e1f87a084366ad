"""The lossless check on a GPU: in float32 nothing parts, in bf16 nothing without a near tie."""

from pathlib import Path

import pytest
import torch
from lossless_check import check

from eaglerun.bench.divergence import Selections

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, eager: bool):
    flags = ["--num-drafts=0,1,3,7", "--acceptance=0.7"] + ["--enforce-eager"] * eager
    code, rows = check(monkeypatch, tmp_path, torch.float32, *flags, device="cuda")
    assert code == 0
    assert [row["identical"] for row in rows] == [8] * 4


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, eager: bool):
    flags = ["--num-drafts=0,1,3,7", "--acceptance=0.7", "--num-prompts=64", "--max-num-seqs=64"]
    flags += ["--max-num-batched-tokens=1024"] + ["--enforce-eager"] * eager
    code, rows = check(monkeypatch, tmp_path, torch.bfloat16, *flags, device="cuda")
    assert code == 0, [row["divergences"] for row in rows]


def test_a_captured_step_keeps_that_all_blocks_are_visible():
    kept = torch.zeros(2, 5, 1, 3, dtype=torch.int16, device="cuda")
    selections = Selections.__new__(Selections)
    selections._at = (torch.tensor([1], device="cuda"), torch.tensor([4], device="cuda"))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        selections._keep_blocks(kept, None, (), None)
    kept.zero_()
    graph.replay()
    assert kept[1, 4].eq(-1).all() and kept.sum() == -3
