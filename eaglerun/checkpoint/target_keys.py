"""The keys of the target's config.json that take more than a look: spellings, lists, variants."""

from collections.abc import Mapping
from typing import Any

from eaglerun.checkpoint.fields import Fields, agree, check_kind, refuse_quantized, shown
from eaglerun.errors import ConfigError

TARGET_ARCHITECTURES = (
    "MiniMaxM3SparseForConditionalGeneration",  # the hub's wrapper
    "MiniMaxM3SparseForCausalLM",  # the hub's text_config
    "MiniMaxM3VLForCausalLM",  # transformers' text model
)
# The wrapper; then transformers' and vLLM's names of the text config, for which the hub has none.
TARGET_MODEL_TYPES = ("minimax_m3_vl", "minimax_m3_vl_text", "minimax_m3_text")


def flattened(overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """Overrides as keys of the text config, whether or not they stood under "text_config"."""
    flat = dict(overrides or {})
    inner = flat.pop("text_config", {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"override of text_config = {shown(inner)}: must be an object")
    return flat | dict(inner)


def levels(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[Fields, Fields]:
    """(wrapper, text config with the overrides); the same object twice for a text config alone."""
    wrapper = Fields(config, "target ")
    if not wrapper.section("text_config").values:
        text = Fields(_merged(config, overrides), "target ")
        return text, text
    text_config = wrapper.section("text_config")
    return wrapper, Fields(_merged(text_config.values, overrides), text_config.path)


def _merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in overrides.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = _merged(inner, value)
        merged[key] = value
    return merged


def check_target_kind(outer: Fields, text: Fields) -> None:
    """Refuse another model, and every variant of this one that would compute something else."""
    check_kind(outer, "MiniMax-M3", TARGET_ARCHITECTURES, TARGET_MODEL_TYPES)
    if text is outer and (
        text.text("model_type") == TARGET_MODEL_TYPES[0]
        or TARGET_ARCHITECTURES[0] in (text.texts("architectures") or ())
    ):
        raise ConfigError(f"{text.name('text_config')} is missing; the wrapper's config has one")
    text.only("model_type", *TARGET_MODEL_TYPES)
    refuse_quantized(outer)
    refuse_quantized(text)
    # The hub's name; transformers stores "silu", and computes SwiGLU-OAI all the same.
    text.only("hidden_act", "swigluoai", "silu")
    text.only("scoring_func", "sigmoid")
    text.only("n_shared_experts", 1)
    text.only("use_gemma_norm", True)
    text.only("use_qk_norm", True)
    text.only("qk_norm_type", "per_head")
    text.only("attention_output_gate", False)
    text.only("attention_bias", False)


def _layer_kinds(
    words: Fields, word_key: str, values: dict[str, bool], flags: Fields, flag_key: str, length: int
) -> tuple[bool, ...]:
    """A per-layer switch, spelled in words (transformers) or in zeros and ones (the hub)."""
    found: dict[str, tuple[bool, ...]] = {}
    if (texts := words.texts(word_key)) is not None:
        if not set(texts) <= values.keys():
            raise words.refusal(word_key, f"each must be {' or '.join(values)}")
        found[words.name(word_key)] = tuple(values[text] for text in texts)
    if (numbers := flags.integers(flag_key)) is not None:
        if not set(numbers) <= {0, 1}:
            raise flags.refusal(flag_key, "each must be 0 or 1")
        found[flags.name(flag_key)] = tuple(number == 1 for number in numbers)
    if not found:
        raise ConfigError(f"{words.name(word_key)} and {flags.name(flag_key)} are both missing")
    for name, kinds in found.items():
        if len(kinds) != length:
            raise ConfigError(
                f"{name} has {len(kinds)} entries: must have num_hidden_layers = {length}"
            )
    first, *others = found.values()
    if any(other != first for other in others):
        raise ConfigError(f"{' and '.join(found)} say different things of the same layers")
    return first


def moe_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    words = {"dense": False, "sparse": True}
    return _layer_kinds(text, "mlp_layer_types", words, text, "moe_layer_freq", num_layers)


def sparse_layers(text: Fields, sparse: Fields, num_layers: int) -> tuple[bool, ...]:
    """Which layers are sparse; refuses those that score or mix blocks in another way."""
    words = {"full_attention": False, "minimax_m3_sparse": True}
    key = "sparse_attention_freq"
    use = sparse.flag("use_sparse_attention", True)
    if not use and text.raw("layer_types") is None:
        return (False,) * num_layers
    layers = _layer_kinds(text, "layer_types", words, sparse, key, num_layers)
    if any(layers) and not use:
        raise sparse.refusal("use_sparse_attention", "but layer_types has sparse layers")
    if any(layers):
        sparse.only("sparse_score_type", "max")
        _check_disabled_index_value(sparse, layers)
    return layers


def _check_disabled_index_value(sparse: Fields, layers: tuple[bool, ...]) -> None:
    """The index branch has no value projection in any checkpoint; 0 would ask for one."""
    key = "sparse_disable_index_value"
    value = sparse.raw(key)
    if value is None:
        return
    disabled = (value,) * len(layers) if isinstance(value, int) else sparse.integers(key) or ()
    if len(disabled) != len(layers):
        raise sparse.refusal(key, f"must have num_hidden_layers = {len(layers)} entries")
    if any(is_sparse and off != 1 for is_sparse, off in zip(layers, disabled, strict=True)):
        raise sparse.refusal(key, "must be 1 on every sparse layer")


def index_shared(text: Fields, sparse_layers: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which sparse layers reuse the last selection. Source: vLLM and ATOM, which agree on M3.

    The o-th sparse layer computes if max(o - offset, 0) is a multiple of the frequency; a pattern
    (ATOM) says it letter by letter instead, S for a shared one, and those beyond it compute.
    """
    frequency = text.integer("index_topk_freq", 1)
    offset = text.integer("index_skip_topk_offset", 0, minimum=0)
    pattern = text.text("index_topk_pattern")
    if not text.flag("use_index_cache", False):
        return (False,) * len(sparse_layers)
    if pattern is not None:
        if pattern.startswith("S") or not set(pattern) <= set("FS"):
            raise text.refusal(
                "index_topk_pattern", "must be F (computes) or S (shares) per sparse layer, F first"
            )
        if len(pattern) > sum(sparse_layers):
            raise text.refusal(
                "index_topk_pattern", f"is longer than the {sum(sparse_layers)} sparse layers"
            )
    shared = []
    ordinal = 0
    for is_sparse in sparse_layers:
        if pattern is None:
            skips = max(ordinal - offset, 0) % frequency != 0
        else:
            skips = pattern[ordinal : ordinal + 1] == "S"
        shared.append(is_sparse and skips)
        ordinal += is_sparse
    return tuple(shared)


def either(
    text: Fields, key: str, sparse: Fields, hub_key: str, default: int, minimum: int = 1
) -> int:
    """A size of the indexer, under transformers' key or the hub's."""
    fields, name = agree(text, key, sparse, hub_key)
    return fields.integer(name, default, minimum)


def rotary_dim(text: Fields, factor: float | None) -> int:
    """From rotary_dim (hub), the partial rotary factor (transformers), or both if they agree."""
    head_dim = text.integer("head_dim")
    if factor is None and text.section("rope_parameters").values:
        factor = 1.0  # transformers turns by the factor and never reads rotary_dim
    if factor is None:
        return text.integer("rotary_dim")
    turned = int(head_dim * factor)
    if text.integer("rotary_dim", turned) != turned:
        raise text.refusal(
            "rotary_dim", f"must be {turned} = head_dim {head_dim} * partial_rotary_factor {factor}"
        )
    return turned


def bos_token_id(text: Fields, outer: Fields) -> int | None:
    for fields in (text, outer):
        if fields.states("bos_token_id"):
            is_null = fields.raw("bos_token_id") is None
            return None if is_null else fields.integer("bos_token_id", minimum=0)
    return 200034


def eos_token_ids(text: Fields, outer: Fields) -> tuple[int, ...]:
    """Each level's ids, an integer or a list, in order; an explicit null means none."""
    ids: list[int] = []
    stated = False
    for fields in (text, outer, outer.section("generation_config")):
        stated |= fields.states("eos_token_id")
        if isinstance(fields.raw("eos_token_id"), list | tuple):
            ids += fields.integers("eos_token_id") or ()
        elif fields.raw("eos_token_id") is not None:
            ids.append(fields.integer("eos_token_id", minimum=0))
    return tuple(dict.fromkeys(ids)) if stated else (200020,)
