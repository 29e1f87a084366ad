"""Loads a target into transformers' minimax_m3_vl text model and compares the logits with ours.

python recipes/tiny-m3/check_target.py configs/demo/target
"""

import argparse
import json
from pathlib import Path

import torch
from tiny_m3.checkpoints import load_target, read_tensors
from torch import Tensor


def in_memory_names(tensors: dict[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """Hub names -> names of MiniMaxM3VLForCausalLM (experts stacked, gate and up joined)."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("language_model.").replace("block_sparse_moe", "mlp")
        name = name.replace("self_attn.index_", "self_attn.indexer.")
        if name.endswith("e_score_correction_bias"):
            name = name.replace("mlp.e_score", "mlp.gate.e_score")
        out[name] = tensor.float()
    for name in [n for n in out if n.endswith("experts.0.w1.weight")]:
        stem = name.removesuffix("0.w1.weight")
        w1, w3, w2 = (
            torch.stack([out.pop(f"{stem}{e}.{w}.weight") for e in range(num_experts)])
            for w in ("w1", "w3", "w2")
        )
        out[stem + "gate_up_proj"] = torch.cat([w1, w3], 1)
        out[stem + "down_proj"] = w2
    for name in [n for n in out if n.endswith("gate_proj.weight")]:
        gate, up = out.pop(name), out.pop(name.replace("gate_proj", "up_proj"))
        out[name.replace("gate_proj", "gate_up_proj")] = torch.cat([gate, up])
    return out


def build_transformers_model(folder: Path) -> torch.nn.Module:
    """transformers' text model with the weights of a hub-layout folder, fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.models.minimax_m3_vl import MiniMaxM3VLTextConfig

    text = json.loads((folder / "config.json").read_text())["text_config"]
    config = MiniMaxM3VLTextConfig(**{k: v for k, v in text.items() if k != "architectures"})
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    state = in_memory_names(read_tensors(folder), text["num_local_experts"])
    model.load_state_dict(state, strict=True)
    return model.eval()


@torch.no_grad()
def largest_difference(folder: Path, num_tokens: int, seed: int) -> tuple[float, float]:
    """(largest |ours - transformers|, largest |logit|) on random ids of two rows."""
    ours, theirs = load_target(folder).eval(), build_transformers_model(folder)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, ours.config.vocab_size, (2, num_tokens), generator=generator)
    positions = torch.arange(num_tokens).expand(2, -1)
    hidden = ours(ids, positions, torch.zeros(2, dtype=torch.bool))[0]
    logits = ours.head(hidden)
    reference = theirs(ids, use_cache=False).logits
    return float((logits - reference).abs().max()), float(reference.abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=400)
    args = parser.parse_args()
    difference, scale = largest_difference(args.folder, args.tokens, 0)
    print(f"largest difference {difference:.2e}, largest logit {scale:.2f}")
    if difference > 1e-3 * max(scale, 1.0):
        raise SystemExit("the two models differ")


if __name__ == "__main__":
    main()
