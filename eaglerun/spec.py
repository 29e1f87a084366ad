"""TargetSpec and DraftSpec: the two architectures, as their checkpoints' config.json state them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaglerun.checkpoint_config import (
    Fields,
    agree,
    check_kind,
    read_json,
    refuse_quantized,
    refuse_unless,
    rope,
    stored_dtype,
)
from eaglerun.errors import CheckpointError, ConfigError
from eaglerun.target_config import (
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

# Far beyond any model: what is larger would fill the memory before it is found to be wrong.
MAX_LAYERS, MAX_POSITIONS = 1 << 12, 1 << 24


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
        """From config.json: the wrapper with its text_config, or the text config alone.

        ``overrides`` replace keys of the text config, objects key by key; they may stand under
        "text_config" or not. A ``generation_config`` in ``config`` (read_checkpoint_config) adds
        its end-of-sequence ids.

        Raises ConfigError, which names the key, for anything this build would not compute as the
        config says, and for an override that nothing reads.
        """
        return _parse_target(config, flattened(overrides))


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """An EAGLE3 draft of one Llama layer (SafeAILab/EAGLE; EAGLE-3.1 toggles).

    taps                  target layers whose input residual stream is captured, increasing
    target_hidden_size    width of one captured chunk; fc takes len(taps) of them
    use_aux_hidden_state  false: no fc, the one captured chunk is the hidden state itself
    fc_norm               one RMSNorm per chunk before fc;  norm_before_fc: one over all chunks
    norm_output           the state fed back is the normed one
    norm_before_residual  the residual is the hidden_norm output
    draft_vocab_size      rows of the head; below vocab_size a d2t table maps draft to target ids
    sliding_window        None: full causal attention
    """

    hidden_size: int
    target_hidden_size: int
    taps: tuple[int, ...]
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool
    use_aux_hidden_state: bool
    fc_norm: bool
    norm_before_fc: bool
    norm_output: bool
    norm_before_residual: bool
    logit_scale: float
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any], target: TargetSpec) -> "DraftSpec":
        """From the draft's config.json, checked against the target it drafts for.

        Raises ConfigError, which names the key, for a draft that is no EAGLE3 Llama layer, that
        does not fit the target, or that asks for something this build does not compute.
        """
        return _parse_draft(config, target)


def read_checkpoint_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint; its generation_config.json, if any, under that key.

    Raises CheckpointError without a config.json, ConfigError where a file is no JSON object.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'} is missing, so {path} is no checkpoint")
    config = _read_object(path / "config.json")
    if (path / "generation_config.json").is_file():
        config["generation_config"] = _read_object(path / "generation_config.json")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


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


# The draft.

# TorchSpec's and SafeAILab's name, and vLLM's.
DRAFT_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


def _parse_draft(config: Mapping[str, Any], target: TargetSpec) -> DraftSpec:
    """Defaults without another source: transformers' LlamaConfig, and EAGLE-3.1 toggles off."""
    fields = Fields(config, "draft ")
    _check_draft_kind(fields)
    hidden_size = fields.integer("hidden_size")
    heads = fields.integer("num_attention_heads")
    vocab_size = fields.integer("vocab_size")
    theta, factor = rope(fields, 1e4)
    if factor not in (None, 1.0):
        raise ConfigError(f"draft partial_rotary_factor = {factor}: this build knows only 1.0")
    eagle = fields.section("eagle_config")
    use_aux = eagle.flag("use_aux_hidden_state", True)
    spec = DraftSpec(
        hidden_size=hidden_size,
        # The defaults of these toggles: vLLM's llama_eagle3 and speculators' Eagle3DraftModel.
        target_hidden_size=fields.integer("target_hidden_size", hidden_size),
        taps=_taps(fields, eagle, target, use_aux),
        intermediate_size=fields.integer("intermediate_size"),
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden_size // heads),
        vocab_size=vocab_size,
        draft_vocab_size=fields.integer("draft_vocab_size", vocab_size),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        # A draft without a length of its own goes as far as its target: rope has no end.
        max_position_embeddings=fields.integer(
            "max_position_embeddings", target.max_position_embeddings, maximum=MAX_POSITIONS
        ),
        attention_bias=fields.flag("attention_bias", False),
        use_aux_hidden_state=use_aux,
        fc_norm=fields.flag("fc_norm", False),
        norm_before_fc=fields.flag("norm_before_fc", False),
        norm_output=fields.flag("norm_output", False),
        norm_before_residual=fields.flag("norm_before_residual", False),
        logit_scale=fields.number("logit_scale", 1.0),
        sliding_window=_sliding_window(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        dtype=stored_dtype(fields),
    )
    _check_draft(spec, target)
    return spec


def _check_draft_kind(fields: Fields) -> None:
    check_kind(fields, "an EAGLE3 draft", DRAFT_ARCHITECTURES, ("llama",))
    # A plain Llama has the same model_type, so that the architecture is the only evidence.
    if not fields.texts("architectures"):
        raise ConfigError(
            f"draft architectures is missing; an EAGLE3 draft is {' or '.join(DRAFT_ARCHITECTURES)}"
        )
    refuse_quantized(fields)
    fields.only("num_hidden_layers", 1)
    fields.only("hidden_act", "silu")
    fields.only("mlp_bias", False)


def _taps(fields: Fields, eagle: Fields, target: TargetSpec, use_aux: bool) -> tuple[int, ...]:
    """Target layers to capture; without a list those of SafeAILab/EAGLE: 2, L // 2 and L - 3."""
    key = "eagle_aux_hidden_state_layer_ids"
    length = target.num_hidden_layers
    where, key = agree(eagle, key, fields, key)
    stated = where.integers(key)
    taps = (2, length // 2, length - 3) if stated is None else stated
    told = "" if stated is not None else " (the default for this target)"
    name = where.name(key)
    if any(not 0 <= tap <= length for tap in taps):
        raise ConfigError(f"{name} = {taps}{told}: each must be in [0, {length}], target layers")
    if any(low >= high for low, high in zip(taps, taps[1:], strict=False)) or not taps:
        raise ConfigError(f"{name} = {taps}{told}: must be increasing, at least one")
    if not use_aux and len(taps) != 1:
        raise ConfigError(f"{name} = {taps}{told}: must be one tap without use_aux_hidden_state")
    count = fields.integer("num_aux_hidden_states", len(taps))
    if count != len(taps):
        raise fields.refusal("num_aux_hidden_states", f"must be the number of taps {taps}{told}")
    return taps


def _sliding_window(fields: Fields) -> int | None:
    """The switch decides: ATOM's rule, as many Llama configs carry an unused window."""
    if not fields.flag("use_sliding_window", False):
        return None
    return fields.integer("sliding_window")


def _check_draft(spec: DraftSpec, target: TargetSpec) -> None:
    refuse_unless(
        (
            (
                spec.target_hidden_size == target.hidden_size,
                f"target_hidden_size = {spec.target_hidden_size} (hidden_size where the config has "
                f"none): must be the target's hidden_size = {target.hidden_size}",
            ),
            (
                spec.vocab_size == target.vocab_size,
                f"vocab_size = {spec.vocab_size}: must be the target's = {target.vocab_size}",
            ),
            (
                spec.draft_vocab_size <= spec.vocab_size,
                f"draft_vocab_size = {spec.draft_vocab_size}: must be at most vocab_size = "
                f"{spec.vocab_size}",
            ),
            (
                not spec.tie_word_embeddings or spec.draft_vocab_size == spec.vocab_size,
                f"draft_vocab_size = {spec.draft_vocab_size}: must be vocab_size = "
                f"{spec.vocab_size} where tie_word_embeddings is true",
            ),
            (
                spec.num_attention_heads % spec.num_key_value_heads == 0,
                f"num_attention_heads = {spec.num_attention_heads}: must be a multiple of "
                f"num_key_value_heads = {spec.num_key_value_heads}",
            ),
            (spec.head_dim % 2 == 0, f"head_dim = {spec.head_dim}: must be even"),
            (
                not (spec.fc_norm and spec.norm_before_fc),
                "fc_norm = true and norm_before_fc = true: at most one of them",
            ),
            (
                spec.use_aux_hidden_state or not (spec.fc_norm or spec.norm_before_fc),
                "fc_norm or norm_before_fc = true: without use_aux_hidden_state there is no fc",
            ),
            (
                spec.use_aux_hidden_state or spec.hidden_size == spec.target_hidden_size,
                f"hidden_size = {spec.hidden_size}: must be target_hidden_size = "
                f"{spec.target_hidden_size} without use_aux_hidden_state",
            ),
        ),
        "draft ",
    )
