"""Random EAGLE3 drafts as checkpoints: a config.json, tensors under their published names, files.

The engine reads the files through its own loader; the oracle takes the same dicts. So the two
share a checkpoint and nothing else.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles.eagle3 import Eagle3Oracle
from pairs import CPU
from safetensors.numpy import save_file

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.loading import load_draft
from eaglerun.models.minimax_m3 import MiniMaxM3

# Every toggle alone, then the published combinations and their neighbours. "taps" and "stored"
# steer the maker; all else are keys of config.json.
TOGGLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fc_norm": {"fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True},
    "norm_output": {"norm_output": True},
    "norm_before_residual": {"norm_before_residual": True},
    "eagle_3_1": {"fc_norm": True, "norm_output": True},
    "eagle_3_1_gqa": {"fc_norm": True, "norm_output": True, "num_key_value_heads": 2},
    "all_norms": {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
    "one_kv_head": {"num_key_value_heads": 1, "head_dim": 6},
    "narrow": {"hidden_size": 20, "target_hidden_size": 32, "head_dim": 10},
    "wide": {"hidden_size": 48, "target_hidden_size": 32, "fc_norm": True},
    "window": {"use_sliding_window": True, "sliding_window": 5},
    "window_of_one": {"use_sliding_window": True, "sliding_window": 1, "norm_output": True},
    "window_unused": {"use_sliding_window": False, "sliding_window": 2},
    "reduced_vocab": {"draft_vocab_size": 7},
    "reduced_vocab_3_1": {"draft_vocab_size": 7, "fc_norm": True, "norm_output": True},
    "attention_bias": {"attention_bias": True},
    "logit_scale": {"logit_scale": 0.25, "norm_output": True},
    "no_fc": {
        "eagle_config": {
            "use_aux_hidden_state": False,
            "eagle_aux_hidden_state_layer_ids": [3],
        }
    },
    "one_tap": {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0]}, "fc_norm": True},
    "five_taps": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2, 3, 4], "norm_before_fc": True},
    "tied": {"tie_word_embeddings": True},
    "target_embedding_and_head": {"stored": ("fc", "layers", "norm"), "norm_output": True},
    "midlayer": {"prefix": "midlayer.", "num_key_value_heads": 2},
    "eps_and_theta": {"rms_norm_eps": 0.1, "rope_theta": 30.0, "fc_norm": True},
}
STEERING = ("stored", "prefix")


def draft_config(target: TargetSpec, **changes: Any) -> dict[str, Any]:
    """A config.json for a draft of ``target``: 4 heads, full attention, taps 1, 2 and 3."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": target.hidden_size,
        "num_attention_heads": 4,
        "intermediate_size": 40,
        "vocab_size": target.vocab_size,
        "hidden_act": "silu",
        "dtype": "float32",
        "max_position_embeddings": target.max_position_embeddings,
    }
    if "eagle_config" not in changes:
        config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    return config | {key: value for key, value in changes.items() if key not in STEERING}


def taps_of(config: Mapping[str, Any]) -> list[int]:
    key = "eagle_aux_hidden_state_layer_ids"
    taps: list[int] = config.get("eagle_config", config)[key]
    return taps


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors of every name the config asks for, attention sharp and the aux loud, so
    that a wrong key, position or hidden state changes what is drafted."""
    generator = np.random.default_rng(seed)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads", heads)
    dim = config.get("head_dim", hidden // heads)
    vocab, width = config["vocab_size"], config["intermediate_size"]
    head_rows = config.get("draft_vocab_size", vocab)
    chunk, chunks = config.get("target_hidden_size", hidden), len(taps_of(config))
    weights: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        values = generator.normal(size=(rows, columns)) * gain * columns**-0.5
        weights[name + ".weight"] = values.astype(np.float32)

    def norm(name: str, size: int) -> None:
        weights[name + ".weight"] = generator.normal(1.0, 0.3, size).astype(np.float32)

    matrix("embed_tokens", vocab, hidden, gain=hidden**0.5)
    if config.get("eagle_config", {}).get("use_aux_hidden_state", True):
        matrix("fc", hidden, chunks * chunk, gain=2.0)
    if config.get("fc_norm", False):
        for g in range(chunks):
            norm(f"fc_norm.{g}", chunk)
    if config.get("norm_before_fc", False):
        norm("input_norm", chunks * chunk)
    for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
        norm(f"layers.0.{name}", hidden)
    attention = "layers.0.self_attn."
    for name, count, gain in (("q", heads, 2.0), ("k", groups, 2.0), ("v", groups, 2.0)):
        matrix(f"{attention}{name}_proj", count * dim, 2 * hidden, gain)
        if config.get("attention_bias", False):
            bias = generator.normal(size=count * dim).astype(np.float32)
            weights[f"{attention}{name}_proj.bias"] = bias
    matrix(f"{attention}o_proj", hidden, heads * dim, gain=2.0)
    matrix("layers.0.mlp.gate_proj", width, hidden)
    matrix("layers.0.mlp.up_proj", width, hidden)
    matrix("layers.0.mlp.down_proj", hidden, width)
    norm("norm", hidden)
    if not config.get("tie_word_embeddings", False):
        matrix("lm_head", head_rows, hidden, gain=3.0)
    if head_rows < vocab:
        kept = np.sort(generator.choice(vocab, head_rows, replace=False))
        weights["d2t"] = (kept - np.arange(head_rows)).astype(np.int64)
    return weights


def guess_successor(weights: dict[str, np.ndarray], target: MiniMaxM3, noise: float) -> None:
    """Turn random weights into a draft that is often right about a target whose next token hangs
    on the current one: attention looks at its own row and hands the embedding on to the head."""
    hidden = target.spec.hidden_size
    weights["embed_tokens.weight"] = target.embed_tokens.weight.float().numpy()
    weights["lm_head.weight"] = target.lm_head.weight.float().numpy()
    weights["norm.weight"] = 1.0 + target.norm.weight.float().numpy()
    weights["layers.0.input_layernorm.weight"] = np.ones(hidden, np.float32)
    own = np.concatenate([np.eye(hidden), np.zeros((hidden, hidden))], axis=1)
    attention = "layers.0.self_attn."
    for name, gain, keep in (("q_proj", 3.0, own), ("k_proj", 3.0, own), ("v_proj", 1.0, own)):
        random = noise * weights[f"{attention}{name}.weight"]
        weights[f"{attention}{name}.weight"] = (gain * keep + random).astype(np.float32)
    out = 8.0 * np.eye(hidden) + noise * weights[attention + "o_proj.weight"]
    weights[attention + "o_proj.weight"] = out.astype(np.float32)
    for name in ("fc", "layers.0.mlp.down_proj"):
        weights[name + ".weight"] = noise * weights[name + ".weight"]


def make_draft(
    target: MiniMaxM3,
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
    path: Path,
    stored: tuple[str, ...] = (),
    prefix: str = "layers.0.",
) -> tuple[Eagle3Llama, Eagle3Oracle]:
    """The checkpoint's two readers. ``stored``: beginnings of the names that are in the file;
    what is left out the draft shares with the target. ``prefix``: how the layer is spelled."""
    path.mkdir(parents=True, exist_ok=True)
    on_disk = {
        name.replace("layers.0.", prefix): tensor
        for name, tensor in weights.items()
        if not stored or name.startswith(stored)
    }
    (path / "config.json").write_text(json.dumps(config))
    save_file(on_disk, path / "model.safetensors")
    spec = DraftSpec.from_config(json.loads((path / "config.json").read_text()), target.spec)
    draft = Eagle3Llama(spec, device=CPU, dtype=torch.float64)
    load_draft(draft, path, spec, target)
    shared = {
        "embed_tokens.weight": target.embed_tokens.weight.numpy(),
        "lm_head.weight": target.lm_head.weight.numpy(),
    }
    return draft, Eagle3Oracle(config, on_disk, shared)
