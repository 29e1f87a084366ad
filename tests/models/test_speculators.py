"""The draft's oracle against the `speculators` package's Eagle3, which trains published drafts.

Not a dependency: the test runs where the package is installed. Its forward takes true tokens for
the later passes (training-time test), so it is given ours, and has to choose them itself. The
engine's draft is held against the same oracle in test_eagle3_oracle.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles.drafts import TOGGLES, draft_config, make_draft, random_weights, taps_of
from pairs import target_spec, tiny_target
from transformers import LlamaConfig

eagle3 = pytest.importorskip("speculators.models.eagle3", reason="speculators is not installed")

VOCAB = 11
PASSES = 4
# The toggles that the package has; it knows no narrow draft and no scaled logits.
NAMES = (
    "plain",
    "fc_norm",
    "norm_before_fc",
    "norm_output",
    "norm_before_residual",
    "eagle_3_1",
    "eagle_3_1_gqa",
    "reduced_vocab_3_1",
    "attention_bias",
    "five_taps",
)


def their_model(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    layer = LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=1,
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config.get("num_key_value_heads", config["num_attention_heads"]),
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        attention_bias=config.get("attention_bias", False),
        mlp_bias=False,
        attn_implementation="eager",
    )
    toggles = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")
    model = eagle3.Eagle3DraftModel(
        eagle3.Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=config.get("draft_vocab_size", config["vocab_size"]),
            eagle_aux_hidden_state_layer_ids=taps_of(config),
            **{name: config.get(name, False) for name in toggles},
        )
    )
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    if config.get("attention_bias", False):  # transformers gives o_proj a bias too
        tensors["layers.0.self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"])
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.startswith(("verifier_", "d2t", "t2d")) for name in missing), missing
    return model.double().eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_equals_the_packages(name: str, tmp_path: Path) -> None:
    """Each draft token of greedy propose is the package's choice, and the first pass's logits of
    every row are its logits to float32, in which it norms and rotates."""
    spec = dataclasses.replace(target_spec(VOCAB, 4), max_position_embeddings=128)
    config = draft_config(spec, **TOGGLES[name])
    weights = random_weights(config, 5)
    taps = taps_of(config)
    target = tiny_target(5, spec, tuple(taps), torch.float64)
    _, oracle = make_draft(target, config, weights, tmp_path)
    theirs = their_model(config, weights)
    kept = np.arange(len(weights["lm_head.weight"])) + weights.get("d2t", 0)

    generator = np.random.default_rng(5)
    tokens = [int(t) for t in generator.integers(0, VOCAB, 9)]
    aux = generator.normal(size=(len(taps), len(tokens) - 1, 32))
    rows = [list(aux[:, j]) for j in range(len(tokens) - 1)]
    proposal = oracle.propose(tokens, rows, PASSES)

    # Rows 0 .. 7 are true; those behind only carry the tokens that later passes are given.
    ids = torch.tensor([tokens[1:] + proposal.tokens])
    hidden = torch.zeros(1, ids.shape[1], len(taps) * 32, dtype=torch.float64)
    hidden[0, : len(rows)] = torch.from_numpy(aux).transpose(0, 1).flatten(1)
    logits: list[torch.Tensor] = []
    theirs.lm_head.register_forward_hook(lambda module, args, out: logits.append(out[0]))
    with torch.no_grad():
        chosen = theirs(hidden, ids, torch.zeros_like(ids), ttt_steps=PASSES)
    last = len(rows) - 1
    assert [int(kept[int(step[0, last])]) for step in chosen] == proposal.tokens
    states = [oracle.fuse(row) for row in rows]
    own = oracle.rows(tokens[1:], states, range(len(rows)))
    np.testing.assert_allclose(
        logits[0][: len(rows)], [s.logits for s in own], rtol=1e-5, atol=1e-5
    )
