"""The lossless check on a GPU: in float32 nothing parts, in bf16 nothing without a near tie."""

from pathlib import Path

import pytest
import torch
from lossless_check import check

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
