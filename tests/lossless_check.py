"""The command lossless on a small random pair."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pairs import draft_spec, target_spec, tiny_draft, tiny_target

from eaglerun.bench import lossless
from eaglerun.loader import Models
from eaglerun.server import cli

# The top 3 of blocks of 16: contexts of 60 and more drop some.
FLAGS = (
    "--model=tiny",
    "--prompts=random",
    "--num-prompts=8",
    "--input-lens=20,120",
    "--output-len=20",
    "--max-num-seqs=8",
    "--max-num-batched-tokens=300",
    "--draft=tiny",
)


def pair(dtype: torch.dtype, device: str = "cpu") -> Models:
    """A pair whose layers matter, so that a turned selection or a lost key shows; widths that a
    kernel's tile can take."""
    target = replace(
        target_spec(vocab_size=512, block_size=16, num_layers=4, hidden_size=128),
        num_attention_heads=8,
        head_dim=32,
        rotary_dim=16,
        index_head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        expert_intermediate_size=64,
        shared_intermediate_size=64,
        dense_intermediate_size=256,
    )
    draft = draft_spec(target, intermediate_size=256)
    made = tiny_target(0, target, draft.taps, dtype, context=1.0)
    drafts = tiny_draft(1, draft, made, dtype)
    return Models("tiny", made.to(device), drafts.to(device), (0,))


def check(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    dtype: torch.dtype,
    *flags: str,
    device: str = "cpu",
    models: Models | None = None,
) -> tuple[int, list[dict]]:
    """The command on such a pair, or on ``models``: its exit code, and its rows."""
    made = models or pair(dtype, device)
    monkeypatch.setattr(lossless, "load_models", lambda config, progress: made)
    code = cli.main(["lossless", *FLAGS, f"--device={device}", *flags, f"--out={out}"])
    assert (out / "lossless.md").read_text().startswith("| K | ")
    return code, json.loads((out / "lossless.json").read_text())["rows"]
