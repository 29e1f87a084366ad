"""DraftSpec: the architecture of an EAGLE3 draft, as its checkpoint's config.json states it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eaglerun.checkpoint.fields import (
    MAX_POSITIONS,
    Fields,
    agree,
    check_kind,
    refuse_quantized,
    refuse_unless,
    rope,
    stored_dtype,
)
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.errors import ConfigError

# TorchSpec's and SafeAILab's name, and vLLM's.
DRAFT_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


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
        """Reads the draft's config.json, checked against the target it drafts for.

        Raises ConfigError, which names the key, for a draft that is no EAGLE3 Llama layer, that
        does not fit the target, or that asks for something this build does not compute.
        """
        return _parse_draft(config, target)


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
