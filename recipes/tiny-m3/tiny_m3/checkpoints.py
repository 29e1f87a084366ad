"""Checkpoints in the layout of the hub: names, shapes and config.json of M3 and of its draft.

Names: transformers' conversion_mapping for minimax_m3_vl, and the Inferact EAGLE3 checkpoints.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiny_m3 import chat_format
from tiny_m3.draft import DraftConfig, Eagle3Draft
from tiny_m3.model import TargetConfig, TinyM3

SHARD_BYTES = 8 * 2**20
INDEX_NAME = "model.safetensors.index.json"


def target_tensors(model: TinyM3) -> dict[str, Tensor]:
    """Hub name -> tensor. Linear weights are [out, in]; router and its bias stay fp32."""
    c, state = model.config, model.state_dict()
    out = {
        "language_model.model.embed_tokens.weight": state["embed.weight"],
        "language_model.lm_head.weight": state["head.weight"],
        "language_model.model.norm.weight": state["norm.weight"],
    }
    for i in range(c.num_layers):
        hub, own = f"language_model.model.layers.{i}.", f"layers.{i}."
        out[hub + "input_layernorm.weight"] = state[own + "input_norm.weight"]
        out[hub + "post_attention_layernorm.weight"] = state[own + "post_norm.weight"]
        for name in "qkvo":
            out[f"{hub}self_attn.{name}_proj.weight"] = state[f"{own}attention.{name}.weight"]
        norms = ["q_norm", "k_norm"]
        if c.is_sparse(i):
            norms += ["index_q_norm", "index_k_norm"]
            for name in ("index_q", "index_k"):
                out[f"{hub}self_attn.{name}_proj.weight"] = state[f"{own}attention.{name}.weight"]
        for name in norms:
            out[f"{hub}self_attn.{name}.weight"] = state[f"{own}attention.{name}.weight"]
        if not c.is_sparse(i):
            _put_mlp(out, state, hub + "mlp.", own + "mlp.")
            continue
        moe = hub + "block_sparse_moe."
        out[moe + "gate.weight"] = state[own + "mlp.gate"]
        out[moe + "e_score_correction_bias"] = state[own + "mlp.bias"]
        for e in range(c.num_experts):
            w1, w3 = state[own + "mlp.w13"][e].chunk(2)
            out[f"{moe}experts.{e}.w1.weight"] = w1
            out[f"{moe}experts.{e}.w3.weight"] = w3
            out[f"{moe}experts.{e}.w2.weight"] = state[own + "mlp.w2"][e]
        _put_mlp(out, state, moe + "shared_experts.", own + "mlp.shared.")
    return out


def _put_mlp(out: dict[str, Tensor], state: dict[str, Tensor], hub: str, own: str) -> None:
    gate, up = state[own + "gate_up.weight"].chunk(2)
    out[hub + "gate_proj.weight"] = gate
    out[hub + "up_proj.weight"] = up
    out[hub + "down_proj.weight"] = state[own + "down.weight"]


def load_target(folder: Path) -> TinyM3:
    """A TinyM3 from a hub-layout folder, in fp32."""
    config = target_config(json.loads((folder / "config.json").read_text()))
    model = TinyM3(config)
    slots = target_tensors(model)  # views into the model's own storage
    stored = read_tensors(folder)
    if set(slots) != set(stored):
        raise ValueError(f"{folder}: unexpected or missing {sorted(set(slots) ^ set(stored))[:5]}")
    with torch.no_grad():
        for name, slot in slots.items():
            slot.copy_(stored[name])
    return model


def load_draft(folder: Path) -> Eagle3Draft:
    """An Eagle3Draft from a hub-layout folder, in fp32."""
    model = Eagle3Draft(draft_config(json.loads((folder / "config.json").read_text())))
    model.load_state_dict({k: v.float() for k, v in read_tensors(folder).items()})
    return model


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    out: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                out[name] = f.get_tensor(name)
    return out


def save_target(model: TinyM3, folder: Path) -> None:
    """config.json, generation_config.json and bf16 shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        # The router decides by comparison: fp32, as in the published checkpoint.
        k: v.detach().to("cpu", torch.float32 if "gate.weight" in k or "bias" in k else
                         torch.bfloat16).contiguous().clone()
        for k, v in target_tensors(model).items()
    }  # fmt: skip
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used + size > SHARD_BYTES and shards[-1]:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += size
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX_NAME, index)
    _write_json(folder / "config.json", target_config_json(model.config))
    bos, eos = (chat_format.added_id(t, model.config.vocab_size)
                for t in (chat_format.BOS, chat_format.EOS))  # fmt: skip
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True, "temperature": 1.0,
         "top_p": 0.95},
    )  # fmt: skip


def save_draft(model: Eagle3Draft, folder: Path) -> None:
    """config.json and one bf16 file."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().to("cpu", torch.bfloat16) for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", draft_config_json(model.config))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def target_config_json(c: TargetConfig) -> dict[str, Any]:
    """config.json as MiniMax-M3 spells it: a wrapper with the text model nested."""
    sparse = [int(c.is_sparse(i)) for i in range(c.num_layers)]
    bos, eos, image, video = (
        chat_format.added_id(t, c.vocab_size)
        for t in (chat_format.BOS, chat_format.EOS, chat_format.IMAGE, chat_format.VIDEO)
    )
    text = {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.expert_width,
        "shared_intermediate_size": c.shared_width,
        "dense_intermediate_size": c.dense_width,
        "max_position_embeddings": c.max_len,
        "rms_norm_eps": c.norm_eps,
        "use_gemma_norm": True,
        "attention_output_gate": False,
        "rope_theta": c.rope_theta,
        "rotary_dim": c.rotary_dim,
        "partial_rotary_factor": c.rotary_dim / c.head_dim,
        "hidden_act": "swigluoai",
        "swiglu_alpha": c.swiglu_alpha,
        "swiglu_limit": c.swiglu_limit,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": c.routed_scale,
        "moe_layer_freq": sparse,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_index_dim": c.index_dim,
            "sparse_num_index_heads": c.num_kv_heads,
            "sparse_topk_blocks": c.topk_blocks,
            "sparse_block_size": c.block_size,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 1,
            "sparse_attention_freq": sparse,
            "sparse_disable_index_value": sparse,
        },
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": "bfloat16",
    }
    return {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "image_token_index": image,
        "video_token_index": video,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "text_config": text,
    }


def target_config(json_config: dict[str, Any]) -> TargetConfig:
    """The sizes in a config.json of M3's architecture."""
    t = json_config["text_config"]
    s = t["sparse_attention_config"]
    freq = t["moe_layer_freq"]
    num_dense = freq.index(1)
    if freq != s["sparse_attention_freq"] or freq != sorted(freq):
        raise ValueError("only dense layers first, then sparse layers with experts")
    return TargetConfig(
        vocab_size=t["vocab_size"], hidden_size=t["hidden_size"],
        num_layers=t["num_hidden_layers"], num_dense_layers=num_dense,
        num_heads=t["num_attention_heads"], num_kv_heads=t["num_key_value_heads"],
        head_dim=t["head_dim"], rotary_dim=t["rotary_dim"], rope_theta=t["rope_theta"],
        dense_width=t["dense_intermediate_size"], shared_width=t["shared_intermediate_size"],
        expert_width=t["intermediate_size"], num_experts=t["num_local_experts"],
        experts_per_token=t["num_experts_per_tok"], routed_scale=t["routed_scaling_factor"],
        index_dim=s["sparse_index_dim"], block_size=s["sparse_block_size"],
        topk_blocks=s["sparse_topk_blocks"], max_len=t["max_position_embeddings"],
        norm_eps=t["rms_norm_eps"], swiglu_alpha=t["swiglu_alpha"],
        swiglu_limit=t["swiglu_limit"],
    )  # fmt: skip


def draft_config_json(c: DraftConfig) -> dict[str, Any]:
    """config.json of an EAGLE3 draft; the taps are said explicitly."""
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "target_hidden_size": c.hidden_size,
        "intermediate_size": c.width,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "max_position_embeddings": c.max_len,
        "attention_bias": False,
        "fc_norm": True,
        "norm_output": True,
        "tie_word_embeddings": False,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": list(c.taps),
        },
        "dtype": "bfloat16",
    }


def draft_config(j: dict[str, Any]) -> DraftConfig:
    """The sizes in a config.json of such a draft."""
    return DraftConfig(
        vocab_size=j["vocab_size"], hidden_size=j["hidden_size"],
        taps=tuple(j["eagle_config"]["eagle_aux_hidden_state_layer_ids"]),
        width=j["intermediate_size"], num_heads=j["num_attention_heads"],
        num_kv_heads=j["num_key_value_heads"], head_dim=j["head_dim"],
        rope_theta=j["rope_theta"], max_len=j["max_position_embeddings"],
        norm_eps=j["rms_norm_eps"],
    )  # fmt: skip
