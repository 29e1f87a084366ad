"""Records what the `speculators` package computes for small EAGLE3 drafts.

The package asks for another torch than the tests have, so it is installed beside them without its
dependencies. In a copy of the tests' environment:

    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    pip install loguru pydantic-settings datasets
    PYTHONPATH=tests python tests/oracles/record_speculators.py

Its forward takes true tokens for the later passes (training-time test). It is given the oracle's,
and must choose them itself.
"""

import importlib.metadata
import json
from dataclasses import asdict
from typing import Any

import torch
from oracles.drafts import taps_of
from oracles.eagle3 import Eagle3Oracle
from oracles.speculators_cases import NAMES, PASSES, RECORD, DraftCase, Recorded, draft_case
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from transformers import LlamaConfig

TOGGLES = ("fc_norm", "norm_before_fc", "norm_output", "norm_before_residual")
PACKAGES = ("speculators", "transformers", "torch", "numpy")


def package_model(case: DraftCase) -> Any:
    config = case.config
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
    model = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=config.get("draft_vocab_size", config["vocab_size"]),
            eagle_aux_hidden_state_layer_ids=taps_of(config),
            **{name: config.get(name, False) for name in TOGGLES},
        )
    )
    tensors = {name: torch.from_numpy(value) for name, value in case.weights.items()}
    if config.get("attention_bias", False):  # transformers gives o_proj a bias too
        tensors["layers.0.self_attn.o_proj.bias"] = torch.zeros(config["hidden_size"])
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(name.startswith(("verifier_", "d2t", "t2d")) for name in missing), missing
    return model.double().eval()


def record(case: DraftCase) -> Recorded:
    model = package_model(case)
    rows = case.rows
    given = Eagle3Oracle(case.config, case.weights).propose(case.tokens, rows, PASSES).tokens
    # The first rows are true. Those behind only carry the tokens that later passes are given.
    ids = torch.tensor([case.tokens[1:] + given])
    hidden = torch.zeros(1, ids.shape[1], len(case.aux) * 32, dtype=torch.float64)
    hidden[0, : len(rows)] = torch.from_numpy(case.aux).transpose(0, 1).flatten(1)
    logits: list[torch.Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out[0]))
    with torch.no_grad():
        chosen = model(hidden, ids, torch.zeros_like(ids), ttt_steps=PASSES)
    tokens = [int(case.kept_ids[int(step[0, len(rows) - 1])]) for step in chosen]
    first = [[round(x, 7) for x in row] for row in logits[0][: len(rows)].tolist()]
    return Recorded(case.digest(), tokens, first)


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    cases = {name: asdict(record(draft_case(name))) for name in NAMES}
    RECORD.write_text(json.dumps({"versions": versions, "cases": cases}) + "\n")
    print(f"{RECORD}: {len(cases)} drafts, {versions}")


if __name__ == "__main__":
    main()
