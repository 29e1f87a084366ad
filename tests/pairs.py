"""Small random pairs for the engine's tests, made by hand so that drafts are often right.

The target's next token hangs mostly on the current one (its layers add little to the residual
stream), and the draft's attention looks at its own row, so that it guesses that successor. How
often it is right is set by ``noise``. Both run all of their real code.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.loader import Models
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3

CPU = torch.device("cpu")


def target_spec(
    vocab_size: int = 40,
    block_size: int = 4,
    num_layers: int = 4,
    hidden_size: int = 32,
    eos_token_ids: tuple[int, ...] = (0,),
) -> TargetSpec:
    """4 layers: one full and dense, then sparse and MoE; the top 3 blocks of ``block_size``."""
    sparse = (False, *[True] * (num_layers - 1))
    return TargetSpec(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=vocab_size,
        expert_intermediate_size=16,
        shared_intermediate_size=16,
        dense_intermediate_size=32,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rotary_dim=4,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        swiglu_beta=1.0,
        num_experts=4,
        num_experts_per_tok=2,
        routed_scaling_factor=2.0,
        use_routing_bias=True,
        moe_layers=sparse,
        sparse_layers=sparse,
        index_shared=(False,) * num_layers,
        index_head_dim=8,
        num_index_heads=2,
        sparse_topk_blocks=3,
        sparse_block_size=block_size,
        sparse_init_blocks=0,
        sparse_local_blocks=1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_ids=eos_token_ids,
        dtype="float32",
    )


def draft_spec(target: TargetSpec, **changes: Any) -> DraftSpec:
    spec = DraftSpec(
        hidden_size=target.hidden_size,
        target_hidden_size=target.hidden_size,
        taps=(1, 2, 3),
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=target.vocab_size,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=256,
        attention_bias=False,
        use_aux_hidden_state=True,
        fc_norm=True,
        norm_before_fc=False,
        norm_output=True,
        norm_before_residual=False,
        logit_scale=1.0,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="float32",
    )
    return dataclasses.replace(spec, **changes)


def randomize(model: torch.nn.Module, seed: int, residual_scale: float) -> None:
    """Random weights; what is added to the residual stream is scaled by ``residual_scale``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    plain_norm = isinstance(model, Eagle3Llama)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.copy_(0.1 * normal(tensor) + (1.0 if plain_norm else 0.0))
        elif tensor.ndim == 1:
            tensor.copy_(0.1 * normal(tensor))
        elif name.startswith("embed"):
            tensor.copy_(normal(tensor))
        else:
            tensor.copy_(normal(tensor) * tensor.shape[-1] ** -0.5)
        if name.endswith(("o_proj.weight", "down_proj.weight", "w2")):
            tensor.mul_(residual_scale)


def tiny_target(
    seed: int, spec: TargetSpec, taps: tuple[int, ...], dtype: torch.dtype, context: float = 0.1
) -> MiniMaxM3:
    """``context``: how much the layers add to the residual stream; 0: the successor alone."""
    with torch.no_grad():
        target = MiniMaxM3(spec, taps, device=CPU, dtype=dtype)
        randomize(target, seed, context)
        target.lm_head.weight.mul_(4.0)
    return target


def tiny_draft(
    seed: int, spec: DraftSpec, target: MiniMaxM3, dtype: torch.dtype, noise: float = 0.05
) -> Eagle3Llama:
    """A draft that guesses the target's successor, more wildly the larger ``noise``."""
    with torch.no_grad():
        draft = Eagle3Llama(spec, device=CPU, dtype=dtype)
        randomize(draft, seed, noise)
        if spec.draft_vocab_size < spec.vocab_size:
            assert draft.d2t is not None
            kept = torch.arange(spec.draft_vocab_size) * spec.vocab_size // spec.draft_vocab_size
            draft.d2t.copy_(kept - torch.arange(spec.draft_vocab_size))
            draft.lm_head.weight.copy_(target.lm_head.weight[kept])
        else:
            draft.lm_head.weight.copy_(target.lm_head.weight)
        draft.embed_tokens.weight.copy_(target.embed_tokens.weight)
        H, heads, dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
        qkv = draft.layer.self_attn.qkv_proj.weight
        own = torch.zeros(H, 2 * H, dtype=dtype)
        own[:, :H] = torch.eye(H, dtype=dtype)
        if heads * dim == H and spec.num_key_value_heads == heads:
            qkv[:H] += 3 * own
            qkv[H : 2 * H] += 3 * own
            qkv[2 * H :] = own + noise * qkv[2 * H :]
            weight = draft.layer.self_attn.o_proj.weight
            weight.copy_(8 * torch.eye(H, dtype=dtype) + noise * weight)
        draft.layer.input_layernorm.weight.fill_(1.0)
        draft.norm.weight.copy_(1.0 + target.norm.weight)
        if draft.fc is not None:
            draft.fc.weight.mul_(noise)
    return draft


def tiny_pair(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    noise: float = 0.05,
    context: float = 0.1,
    vocab_size: int = 40,
    block_size: int = 4,
    **draft_changes: Any,
) -> Models:
    spec = target_spec(vocab_size, block_size)
    wanted = draft_spec(spec, **draft_changes)
    target = tiny_target(seed, spec, wanted.taps, dtype, context)
    draft = tiny_draft(seed + 1, wanted, target, dtype, noise)
    return Models("tiny", target, draft, spec.eos_token_ids)


def without_draft(models: Models) -> Models:
    return Models(models.name, models.target, None, models.eos_token_ids, models.tokenizer)
