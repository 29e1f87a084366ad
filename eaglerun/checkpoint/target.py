"""TargetSpec: MiniMax-M3's architecture, as its checkpoint's config.json states it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eaglerun.checkpoint.fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    refuse_unless,
    rope,
    stored_dtype,
)
from eaglerun.checkpoint.target_keys import (
    bos_token_id,
    check_target_kind,
    either,
    eos_token_ids,
    flattened,
    index_shared,
    levels,
    moe_layers,
    rotary_dim,
    sparse_layers,
)
from eaglerun.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """MiniMax-M3's text model. Widths in elements, layer lists indexed by layer.

    sparse_layers[i]  layer i has block-sparse attention with a lightning indexer, else full
    moe_layers[i]     layer i has routed experts and a shared one, else a dense MLP
    index_shared[i]   sparse layer i takes the block selection of the last sparse layer that
                      computed one (cross-layer index sharing, an approximation; off by default)
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    dense_intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    swiglu_alpha: float
    swiglu_limit: float
    swiglu_beta: float
    num_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    use_routing_bias: bool
    moe_layers: tuple[bool, ...]
    sparse_layers: tuple[bool, ...]
    index_shared: tuple[bool, ...]
    index_head_dim: int
    num_index_heads: int
    sparse_topk_blocks: int
    sparse_block_size: int
    sparse_init_blocks: int
    sparse_local_blocks: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> "TargetSpec":
        """Reads config.json: the wrapper with its text_config, or the text config alone.

        ``overrides`` replace keys of the text config, objects key by key; they may stand under
        "text_config" or not. A ``generation_config`` in ``config`` (read_checkpoint_config) adds
        its end-of-sequence ids.

        Raises ConfigError, which names the key, for anything this build would not compute as the
        config says, and for an override that nothing reads.
        """
        return _parse_target(config, flattened(overrides))


def check_block_size(spec: TargetSpec, block_size: int) -> None:
    """Refuse KV blocks other than the sparse blocks: the indexer selects whole KV blocks."""
    if any(spec.sparse_layers) and block_size != spec.sparse_block_size:
        raise ConfigError(
            f"block_size = {block_size}: must be {spec.sparse_block_size}, the target's "
            "sparse_block_size"
        )


def _parse_target(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> TargetSpec:
    """Defaults without another source: transformers' MiniMaxM3VLTextConfig. Sizes have none."""
    outer, text = levels(config, overrides)
    check_target_kind(outer, text)
    sparse = text.section("sparse_attention_config")
    num_layers = text.integer("num_hidden_layers", maximum=MAX_LAYERS)
    is_sparse = sparse_layers(text, sparse, num_layers)
    theta, factor = rope(text, 5e6)
    spec = TargetSpec(
        hidden_size=text.integer("hidden_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=text.integer("num_attention_heads"),
        num_key_value_heads=text.integer("num_key_value_heads"),
        head_dim=text.integer("head_dim"),
        vocab_size=text.integer("vocab_size"),
        expert_intermediate_size=text.integer("intermediate_size"),
        shared_intermediate_size=text.integer("shared_intermediate_size"),
        dense_intermediate_size=text.integer("dense_intermediate_size"),
        max_position_embeddings=text.integer("max_position_embeddings", maximum=MAX_POSITIONS),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rotary_dim=rotary_dim(text, factor),
        swiglu_alpha=text.number("swiglu_alpha", 1.702),
        swiglu_limit=text.number("swiglu_limit", 7.0),
        # In no config.json: the 1.0 of (up + 1.0) in transformers' MiniMaxM3VLExperts.
        swiglu_beta=text.number("swiglu_beta", 1.0),
        num_experts=text.integer("num_local_experts"),
        num_experts_per_tok=text.integer("num_experts_per_tok"),
        routed_scaling_factor=text.number("routed_scaling_factor", 2.0),
        # transformers has the bias and no key for it.
        use_routing_bias=text.flag("use_routing_bias", True),
        moe_layers=moe_layers(text, num_layers),
        sparse_layers=is_sparse,
        index_shared=index_shared(text, is_sparse),
        index_head_dim=either(text, "index_head_dim", sparse, "sparse_index_dim", 128),
        num_index_heads=either(text, "index_n_heads", sparse, "sparse_num_index_heads", 4),
        sparse_topk_blocks=either(text, "index_topk_blocks", sparse, "sparse_topk_blocks", 16),
        sparse_block_size=either(text, "index_block_size", sparse, "sparse_block_size", 128),
        # transformers has no init blocks.
        sparse_init_blocks=sparse.integer("sparse_init_block", 0, minimum=0),
        sparse_local_blocks=either(text, "index_local_blocks", sparse, "sparse_local_block", 1, 0),
        # transformers ties if either level says so.
        tie_word_embeddings=text.flag("tie_word_embeddings", False)
        or outer.flag("tie_word_embeddings", False),
        bos_token_id=bos_token_id(text, outer),
        eos_token_ids=eos_token_ids(text, outer),
        dtype=stored_dtype(text, outer),
    )
    _check_target(spec, text.path)
    if unread := text.unread(overrides):
        raise ConfigError(f"override of {', '.join(unread)}: the target has no such key to replace")
    return spec


def _check_target(spec: TargetSpec, prefix: str) -> None:
    heads, kv_heads = spec.num_attention_heads, spec.num_key_value_heads
    ids = (*spec.eos_token_ids, *(() if spec.bos_token_id is None else (spec.bos_token_id,)))
    forced = spec.sparse_init_blocks + spec.sparse_local_blocks
    moe, sparse = any(spec.moe_layers), any(spec.sparse_layers)
    refuse_unless(
        (
            (
                heads % kv_heads == 0,
                f"num_attention_heads = {heads}: must be a multiple of num_key_value_heads = "
                f"{kv_heads}",
            ),
            (spec.head_dim % 2 == 0, f"head_dim = {spec.head_dim}: must be even"),
            (
                spec.rotary_dim % 2 == 0 and 0 < spec.rotary_dim <= spec.head_dim,
                f"rotary_dim = {spec.rotary_dim}: must be even, at least 2 and at most head_dim = "
                f"{spec.head_dim}",
            ),
            (
                not moe or spec.num_experts_per_tok <= spec.num_experts,
                f"num_experts_per_tok = {spec.num_experts_per_tok}: must be at most "
                f"num_local_experts = {spec.num_experts}",
            ),
            (
                not sparse or spec.num_index_heads == kv_heads,
                f"index_n_heads / sparse_num_index_heads = {spec.num_index_heads}: must equal "
                f"num_key_value_heads = {kv_heads}, as each KV head has its own selection",
            ),
            (
                not sparse or spec.index_head_dim % 2 == 0,
                f"index_head_dim / sparse_index_dim = {spec.index_head_dim}: must be even",
            ),
            (
                not sparse or spec.rotary_dim <= spec.index_head_dim,
                f"index_head_dim / sparse_index_dim = {spec.index_head_dim}: must be at least "
                f"rotary_dim = {spec.rotary_dim}",
            ),
            (
                not sparse or forced <= spec.sparse_topk_blocks,
                f"index_topk_blocks / sparse_topk_blocks = {spec.sparse_topk_blocks}: must be at "
                f"least the {spec.sparse_init_blocks} init and {spec.sparse_local_blocks} local "
                "blocks, which are always selected",
            ),
            *(
                (
                    0 <= i < spec.vocab_size,
                    f"bos_token_id or eos_token_id = {i} (200034 and 200020 where the config has "
                    f"none): must be in [0, {spec.vocab_size}), the vocabulary",
                )
                for i in ids
            ),
        ),
        prefix,
    )
