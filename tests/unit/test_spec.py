"""The specs come out of every form of config.json right, and what cannot be served is refused."""

import copy
import json
from dataclasses import replace

import pytest

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.target import TargetSpec, check_block_size
from eaglerun.errors import CheckpointError, ConfigError

FREQ = [0] * 3 + [1] * 57
HUB_SPARSE = {
    "use_sparse_attention": True,
    "sparse_index_dim": 128,
    "sparse_num_index_heads": 4,
    "sparse_topk_blocks": 16,
    "sparse_block_size": 128,
    "sparse_score_type": "max",
    "sparse_init_block": 0,
    "sparse_local_block": 1,
    "sparse_attention_freq": FREQ,
    "sparse_disable_index_value": FREQ,
}
HUB_TEXT = {
    "architectures": ["MiniMaxM3SparseForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 200064,
    "intermediate_size": 3072,
    "shared_intermediate_size": 3072,
    "dense_intermediate_size": 12288,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6,
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "hidden_act": "swigluoai",
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
    "moe_layer_freq": FREQ,
    "num_mtp_modules": 7,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "bos_token_id": 200034,
    "eos_token_id": 200020,
    "torch_dtype": "bfloat16",
    "sparse_attention_config": HUB_SPARSE,
}
HUB = {
    "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
    "model_type": "minimax_m3_vl",
    "image_token_index": 200025,
    "projector_hidden_size": 6144,
    "tie_word_embeddings": False,
    "text_config": HUB_TEXT,
    "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1280},
}
# The same model as transformers saves it.
SAVED_TEXT = {
    key: HUB_TEXT[key]
    for key in (
        "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "vocab_size rms_norm_eps rotary_dim "
        "intermediate_size shared_intermediate_size dense_intermediate_size "
        "max_position_embeddings num_local_experts num_experts_per_tok routed_scaling_factor "
        "swiglu_alpha swiglu_limit tie_word_embeddings bos_token_id eos_token_id"
    ).split()
} | {
    "architectures": ["MiniMaxM3VLForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "pad_token_id": None,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "partial_rotary_factor": 0.5,
    },
    "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
    "index_n_heads": 4,
    "index_head_dim": 128,
    "index_block_size": 128,
    "index_topk_blocks": 16,
    "index_local_blocks": 1,
}
DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 200064,
    "draft_vocab_size": 200064,
    "fc_norm": True,
    "norm_output": True,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "attention_bias": False,
    "max_position_embeddings": 32768,
    "torch_dtype": "bfloat16",
}
TARGET = TargetSpec.from_config(HUB)


def changed(config: dict, path: str, value: object) -> dict:
    """A copy with one key, named by its dotted path, replaced; ... takes it away."""
    config = copy.deepcopy(config)
    *outer, key = path.split(".")
    inner = config
    for name in outer:
        inner = inner.setdefault(name, {})
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return config


def test_hub_config():
    assert TARGET == TargetSpec(
        hidden_size=6144,
        num_hidden_layers=60,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=200064,
        expert_intermediate_size=3072,
        shared_intermediate_size=3072,
        dense_intermediate_size=12288,
        max_position_embeddings=1048576,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rotary_dim=64,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        swiglu_beta=1.0,
        num_experts=128,
        num_experts_per_tok=4,
        routed_scaling_factor=2.0,
        use_routing_bias=True,
        moe_layers=(False,) * 3 + (True,) * 57,
        sparse_layers=(False,) * 3 + (True,) * 57,
        index_shared=(False,) * 60,
        index_head_dim=128,
        num_index_heads=4,
        sparse_topk_blocks=16,
        sparse_block_size=128,
        sparse_init_blocks=0,
        sparse_local_blocks=1,
        tie_word_embeddings=False,
        bos_token_id=200034,
        eos_token_ids=(200020,),
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    "config",
    [
        HUB_TEXT,
        SAVED_TEXT,
        {**SAVED_TEXT, "model_type": "minimax_m3_text", "architectures": None},
        {"model_type": "minimax_m3_vl", "text_config": SAVED_TEXT, "dtype": "bfloat16"},
        {**HUB, "text_config": {**HUB_TEXT, "model_type": "minimax_m3_text"}},
        {**HUB, "text_config": {**HUB_TEXT, **SAVED_TEXT}},
        changed(changed(HUB, "text_config.rotary_dim", ...), "text_config.eos_token_id", ...),
        changed(HUB, "text_config.partial_rotary_factor", ...),
        changed(HUB, "text_config.sparse_attention_config.sparse_disable_index_value", 1),
        changed(HUB, "text_config.rope_scaling", {"rope_type": "default"}),
    ],
)
def test_every_form_of_the_config_gives_the_same_spec(config):
    assert TargetSpec.from_config(config) == TARGET


def test_sizes_and_switches_are_read():
    config = copy.deepcopy(HUB)
    config["text_config"] |= {
        "swiglu_beta": 0.5,
        "use_routing_bias": False,
        "rope_theta": 10000,
        "dtype": "float32",
        "tie_word_embeddings": True,
    }
    config["text_config"]["sparse_attention_config"] |= {
        "sparse_init_block": 2,
        "sparse_local_block": 3,
        "sparse_topk_blocks": 8,
        "sparse_block_size": 64,
        "sparse_index_dim": 96,
    }
    assert TargetSpec.from_config(config) == replace(
        TARGET,
        swiglu_beta=0.5,
        use_routing_bias=False,
        rope_theta=1e4,
        dtype="float32",
        tie_word_embeddings=True,
        sparse_init_blocks=2,
        sparse_local_blocks=3,
        sparse_topk_blocks=8,
        sparse_block_size=64,
        index_head_dim=96,
    )


def test_sparse_attention_switched_off():
    config = changed(HUB, "text_config.sparse_attention_config.use_sparse_attention", False)
    assert TargetSpec.from_config(config).sparse_layers == (False,) * 60


@pytest.mark.parametrize(
    ("text", "outer", "generation", "expected"),
    [
        (200020, ..., ..., (200020,)),
        ([5, 7], ..., ..., (5, 7)),
        (5, 6, {"eos_token_id": [7, 5]}, (5, 6, 7)),
        (..., ..., {"eos_token_id": 9}, (9,)),
        (..., ..., {"temperature": 1.0}, (200020,)),
        (None, ..., ..., ()),
    ],
)
def test_eos_ids(text, outer, generation, expected):
    config = changed(HUB, "text_config.eos_token_id", text)
    config = config if outer is ... else changed(config, "eos_token_id", outer)
    config = config if generation is ... else changed(config, "generation_config", generation)
    assert TargetSpec.from_config(config).eos_token_ids == expected


def computing_layers(**overrides: object) -> list[int]:
    spec = TargetSpec.from_config(HUB, {"use_index_cache": True, **overrides})
    assert not any(shared for shared in spec.index_shared[:3])
    return [i for i in range(3, 60) if not spec.index_shared[i]]


def test_index_sharing():
    assert computing_layers(index_topk_freq=4) == list(range(3, 60, 4))
    assert computing_layers(index_topk_freq=4, index_skip_topk_offset=2) == [
        *(3, 4),
        *range(5, 60, 4),
    ]
    assert computing_layers(index_topk_pattern="FSSF") == [3, 6, *range(7, 60)]
    assert computing_layers() == list(range(3, 60))
    assert computing_layers(use_index_cache=False, index_topk_freq=4) == list(range(3, 60))
    in_file = changed(HUB, "text_config.use_index_cache", True)
    in_file = changed(in_file, "text_config.index_topk_freq", 57)
    assert sum(TargetSpec.from_config(in_file).index_shared) == 56


def test_overrides():
    for overrides in (
        {"rms_norm_eps": 1e-5, "sparse_attention_config": {"sparse_topk_blocks": 4}},
        {
            "rms_norm_eps": 1e-5,
            "text_config": {"sparse_attention_config": {"sparse_topk_blocks": 4}},
        },
    ):
        for config in (HUB, HUB_TEXT):
            spec = TargetSpec.from_config(config, overrides)
            assert spec == replace(TARGET, rms_norm_eps=1e-5, sparse_topk_blocks=4)
    assert HUB_SPARSE["sparse_topk_blocks"] == 16


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"index_topk_frequency": 4}, "override of index_topk_frequency"),
        ({"sparse_attention_config": {"topk": 4}}, "override of sparse_attention_config.topk"),
        ({"vision_config": {}}, "override of vision_config"),
        ({"text_config": 1}, "override of text_config = 1"),
    ],
)
def test_an_override_that_nothing_reads_is_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        TargetSpec.from_config(HUB, overrides)
    assert message in str(error.value)


S = "text_config.sparse_attention_config."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "architectures",
            ["LlamaForCausalLM"],
            "architectures = ['LlamaForCausalLM']: MiniMax-M3 is ",
        ),
        ("model_type", "llama", "model_type = 'llama': MiniMax-M3 is minimax_m3_vl or"),
        ("text_config", ..., "text_config is missing"),
        ("text_config", [], "text_config = []: must be an object"),
        (
            "quantization_config",
            {"quant_method": "mxfp8"},
            "quantization_config.quant_method = 'mxfp8': this build loads bfloat16, float16",
        ),
        ("text_config.quantization_config", {"quant_method": "quark"}, "quant_method = 'quark'"),
        ("text_config.torch_dtype", "float8_e4m3fn", "torch_dtype = 'float8_e4m3fn': this build"),
        ("text_config.model_type", "qwen3", "text_config.model_type = 'qwen3'"),
        ("text_config.hidden_size", ..., "text_config.hidden_size is missing"),
        ("text_config.hidden_size", "6144", "hidden_size = '6144': must be an integer"),
        ("text_config.num_hidden_layers", 0, "num_hidden_layers = 0: must be an integer"),
        ("text_config.rms_norm_eps", -1, "rms_norm_eps = -1: must be a positive number"),
        ("text_config.use_routing_bias", 1, "use_routing_bias = 1: must be true or false"),
        ("text_config.hidden_act", "gelu", "hidden_act = 'gelu': this build knows only "),
        ("text_config.scoring_func", "softmax", "scoring_func = 'softmax': this build"),
        ("text_config.n_shared_experts", 2, "n_shared_experts = 2: this build knows only 1"),
        ("text_config.use_gemma_norm", False, "use_gemma_norm = False: this build knows only True"),
        ("text_config.use_qk_norm", False, "use_qk_norm = False: this build knows only True"),
        ("text_config.qk_norm_type", "per_layer", "qk_norm_type = 'per_layer': this build"),
        ("text_config.attention_output_gate", True, "attention_output_gate = True: this build"),
        ("text_config.attention_bias", True, "attention_bias = True: this build knows only False"),
        (
            "text_config.rope_scaling",
            {"rope_type": "yarn", "factor": 4},
            "rope_scaling.rope_type = 'yarn': this build knows only 'default'",
        ),
        ("text_config.rope_scaling", {"type": "linear"}, "rope_scaling.type = 'linear'"),
        ("text_config.rope_scaling", {"factor": 2.0}, "rope_scaling.factor = 2.0: this build"),
        (
            "text_config.rope_parameters",
            {"rope_theta": 10000.0},
            "rope_parameters.rope_theta = 10000.0 and target text_config.rope_theta = 5000000",
        ),
        ("text_config.rotary_dim", 32, "rotary_dim = 32: must be 64 = head_dim 128 * partial"),
        ("text_config.partial_rotary_factor", 1.5, "rotary_dim = 64: must be 192 = head_dim 128"),
        ("text_config.head_dim", 127, "rotary_dim = 64: must be 63"),
        ("text_config.num_attention_heads", 66, "num_attention_heads = 66: must be a multiple"),
        (
            "text_config.num_key_value_heads",
            8,
            "sparse_num_index_heads = 4: must equal",
        ),
        ("text_config.num_experts_per_tok", 129, "num_experts_per_tok = 129: must be at most"),
        (
            "text_config.moe_layer_freq",
            [0, 1],
            "moe_layer_freq has 2 entries: must have num_hidden_layers = 60",
        ),
        ("text_config.moe_layer_freq", [0] * 59 + [2], "each must be 0 or 1"),
        ("text_config.moe_layer_freq", 1, "moe_layer_freq = 1: must be a list of integers"),
        (
            "text_config.moe_layer_freq",
            ...,
            "moe_layer_freq are both missing",
        ),
        ("text_config.mlp_layer_types", ["sparse"] * 60, "say different things of the same layers"),
        ("text_config.layer_types", ["mamba"] * 60, "each must be full_attention or"),
        ("text_config.layer_types", "sparse", "layer_types = 'sparse': must be a list of strings"),
        (S + "sparse_attention_freq", ..., "sparse_attention_freq are both missing"),
        (S + "sparse_attention_freq", [1], "has 1 entries: must have num_hidden_layers = 60"),
        (S + "sparse_score_type", "mean", "sparse_score_type = 'mean': this build knows only"),
        (S + "sparse_disable_index_value", [0] * 60, "must be 1 on every sparse layer"),
        (S + "sparse_disable_index_value", 0, "must be 1 on every sparse layer"),
        (S + "sparse_disable_index_value", [1], "must have num_hidden_layers = 60 entries"),
        (
            S + "sparse_num_index_heads",
            2,
            "sparse_num_index_heads = 2: must equal",
        ),
        (S + "sparse_index_dim", 65, "sparse_index_dim = 65: must be even"),
        (S + "sparse_index_dim", 32, "sparse_index_dim = 32: must be at least rotary_dim = 64"),
        (
            S + "sparse_local_block",
            17,
            "sparse_topk_blocks = 16: must be at least the 0 init",
        ),
        (
            "text_config.index_topk_blocks",
            8,
            "sparse_attention_config.sparse_topk_blocks = 16: these mean the same",
        ),
        ("text_config.eos_token_id", 200064, "eos_token_id = 200064 (200034 and"),
        ("text_config.eos_token_id", "2", "eos_token_id = '2': must be an integer"),
        ("text_config.bos_token_id", -1, "bos_token_id = -1: must be an integer of at least 0"),
        ("text_config.index_topk_freq", 0, "index_topk_freq = 0: must be an integer of at least 1"),
    ],
)
def test_target_refusals(key, value, message):
    with pytest.raises(ConfigError) as error:
        TargetSpec.from_config(changed(HUB, key, value))
    assert message in str(error.value)
    assert str(error.value).startswith("target ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"head_dim": 127, "rotary_dim": ..., "partial_rotary_factor": ...},
            "rotary_dim is missing",
        ),
        ({"head_dim": 127, "partial_rotary_factor": ...}, "head_dim = 127: must be even"),
        ({"rotary_dim": 63, "partial_rotary_factor": ...}, "rotary_dim = 63: must be even"),
        ({"rotary_dim": 130, "partial_rotary_factor": ...}, "at most head_dim = 128"),
        (
            {"partial_rotary_factor": ..., "rope_parameters": {"rope_type": "default"}},
            "rotary_dim = 64: must be 128 = head_dim 128 * partial_rotary_factor 1.0",
        ),
        (
            {"use_index_cache": True, "index_topk_pattern": "SF"},
            "index_topk_pattern = 'SF': must be F (computes) or S (shares)",
        ),
        ({"use_index_cache": True, "index_topk_pattern": "FX"}, "'FX': must be F (computes)"),
        (
            {"use_index_cache": True, "index_topk_pattern": "F" * 58},
            "is longer than the 57 sparse layers",
        ),
        ({"architectures": ..., "model_type": ...}, "architectures and model_type are missing"),
        ({"model_type": "minimax_m3_vl"}, "text_config is missing"),
    ],
)
def test_target_refusals_of_several_keys(change, message):
    config = HUB_TEXT
    for key, value in change.items():
        config = {**config, key: value}
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(ConfigError) as error:
        TargetSpec.from_config(config)
    assert message in str(error.value)


def test_sparse_layers_contradict_the_switch():
    config = {**SAVED_TEXT, "sparse_attention_config": {"use_sparse_attention": False}}
    with pytest.raises(ConfigError, match="use_sparse_attention = False: but layer_types has"):
        TargetSpec.from_config(config)


def test_block_size():
    check_block_size(TARGET, 128)
    check_block_size(replace(TARGET, sparse_layers=(False,) * 60), 16)
    with pytest.raises(ConfigError, match="block_size = 16: must be 128, the target's"):
        check_block_size(TARGET, 16)


MHA = DraftSpec(
    hidden_size=6144,
    target_hidden_size=6144,
    taps=(2, 30, 57),
    intermediate_size=18432,
    num_attention_heads=64,
    num_key_value_heads=64,
    head_dim=128,
    vocab_size=200064,
    draft_vocab_size=200064,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    max_position_embeddings=32768,
    attention_bias=False,
    use_aux_hidden_state=True,
    fc_norm=True,
    norm_before_fc=False,
    norm_output=True,
    norm_before_residual=False,
    logit_scale=1.0,
    sliding_window=None,
    tie_word_embeddings=False,
    dtype="bfloat16",
)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, MHA),
        ({"num_key_value_heads": 4}, replace(MHA, num_key_value_heads=4)),
        # The EAGLE-3.1 draft's config is not public; nothing beyond these keys may be needed.
        (
            dict.fromkeys(
                "model_type hidden_act norm_output attention_bias max_position_embeddings "
                "draft_vocab_size tie_word_embeddings num_key_value_heads".split(),
                ...,
            ),
            replace(MHA, norm_output=False, max_position_embeddings=1048576),
        ),
        (
            {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}},
            MHA,
        ),
        ({"rope_theta": ..., "rms_norm_eps": ...}, replace(MHA, rope_theta=1e4)),
        ({"head_dim": ...}, replace(MHA, head_dim=96)),
        ({"target_hidden_size": 6144, "hidden_size": 4096}, replace(MHA, hidden_size=4096)),
        ({"draft_vocab_size": 32000}, replace(MHA, draft_vocab_size=32000)),
        (
            {"fc_norm": False, "norm_before_fc": True, "norm_before_residual": True},
            replace(MHA, fc_norm=False, norm_before_fc=True, norm_before_residual=True),
        ),
        (
            {"logit_scale": 0.5, "attention_bias": True, "tie_word_embeddings": True},
            replace(MHA, logit_scale=0.5, attention_bias=True, tie_word_embeddings=True),
        ),
        ({"sliding_window": 2048}, MHA),
        (
            {"sliding_window": 2048, "use_sliding_window": True},
            replace(MHA, sliding_window=2048),
        ),
        ({"num_aux_hidden_states": 3}, MHA),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 60]}},
            replace(MHA, taps=(0, 60)),
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 3, 4], "num_aux_hidden_states": 4},
            replace(MHA, taps=(1, 2, 3, 4)),
        ),
        (
            {
                "fc_norm": False,
                "eagle_config": {
                    "use_aux_hidden_state": False,
                    "eagle_aux_hidden_state_layer_ids": [60],
                },
            },
            replace(MHA, fc_norm=False, use_aux_hidden_state=False, taps=(60,)),
        ),
    ],
)
def test_draft_configs(change, expected):
    config = {key: value for key, value in {**DRAFT, **change}.items() if value is not ...}
    assert DraftSpec.from_config(config, TARGET) == expected


TAPS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["LlamaForCausalLM"]},
            "architectures = ['LlamaForCausalLM']: an EAGLE3 draft is LlamaForCausalLMEagle3",
        ),
        ({"architectures": ...}, "architectures is missing; an EAGLE3 draft is"),
        ({"model_type": "qwen3"}, "model_type = 'qwen3': an EAGLE3 draft is llama"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2: this build knows only 1"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': this build knows only 'silu'"),
        ({"mlp_bias": True}, "mlp_bias = True: this build knows only False"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quant_method = 'modelopt'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config.quant_method = None"),
        ({"hidden_size": 4096}, "target_hidden_size = 4096 (hidden_size where"),
        (
            {"target_hidden_size": 5120},
            "target_hidden_size = 5120",
        ),
        ({"vocab_size": 32000}, "vocab_size = 32000: must be the target's = 200064"),
        ({"draft_vocab_size": 200065}, "draft_vocab_size = 200065: must be at most vocab_size"),
        (
            {"draft_vocab_size": 32000, "tie_word_embeddings": True},
            "draft_vocab_size = 32000: must be vocab_size = 200064 where tie_word_embeddings",
        ),
        ({"num_key_value_heads": 6}, "num_attention_heads = 64: must be a multiple"),
        ({"head_dim": 127}, "head_dim = 127: must be even"),
        ({"norm_before_fc": True}, "fc_norm = true and norm_before_fc = true: at most one"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type = 'llama3'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: this build knows only 1.0"),
        ({"use_sliding_window": True}, "sliding_window is missing"),
        ({TAPS: [2, 30, 61]}, f"{TAPS} = (2, 30, 61): each must be in [0, 60]"),
        ({TAPS: [-1, 30, 57]}, f"{TAPS} = (-1, 30, 57): each must be in [0, 60]"),
        ({TAPS: [30, 2, 57]}, f"{TAPS} = (30, 2, 57): must be increasing"),
        ({TAPS: [2, 2, 57]}, f"{TAPS} = (2, 2, 57): must be increasing"),
        ({TAPS: []}, f"{TAPS} = (): must be increasing, at least one"),
        ({TAPS: [2, 30, 57], "eagle_config": {TAPS: [2, 30, 58]}}, "these mean the same"),
        ({TAPS: [2, 30]}, "num_aux_hidden_states = 3: must be the number of taps (2, 30)"),
        (
            {"eagle_config": {"use_aux_hidden_state": False}},
            "(2, 30, 57) (the default for this target): must be one tap without",
        ),
        (
            {"eagle_config": {"use_aux_hidden_state": False, TAPS: [60]}},
            "fc_norm or norm_before_fc = true: without use_aux_hidden_state there is no fc",
        ),
        (
            {
                "fc_norm": False,
                "hidden_size": 4096,
                "target_hidden_size": 6144,
                "eagle_config": {"use_aux_hidden_state": False, TAPS: [60]},
            },
            "hidden_size = 4096: must be target_hidden_size = 6144 without use_aux_hidden_state",
        ),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"eagle_config": [1]}, "eagle_config = [1]: must be an object"),
        ({"torch_dtype": 16}, "torch_dtype = 16: must be a string"),
    ],
)
def test_draft_refusals(change, message):
    if TAPS in change:
        change = {"num_aux_hidden_states": 3, **change}
    config = {key: value for key, value in {**DRAFT, **change}.items() if value is not ...}
    with pytest.raises(ConfigError) as error:
        DraftSpec.from_config(config, TARGET)
    assert message in str(error.value)
    assert str(error.value).startswith("draft ")


def test_default_taps_must_fit_a_short_target():
    short = TargetSpec.from_config(
        HUB_TEXT,
        {
            "num_hidden_layers": 4,
            "moe_layer_freq": [1] * 4,
            "sparse_attention_config": {
                "sparse_attention_freq": [1] * 4,
                "sparse_disable_index_value": [1] * 4,
            },
        },
    )
    with pytest.raises(ConfigError) as error:
        DraftSpec.from_config(DRAFT, short)
    assert "= (2, 2, 1) (the default for this target): must be increasing" in str(error.value)


def test_read_checkpoint_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_checkpoint_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUB))
    assert read_checkpoint_config(tmp_path) == HUB
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 200020]}')
    config = read_checkpoint_config(tmp_path)
    assert TargetSpec.from_config(config).eos_token_ids == (200020, 7)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(
        ConfigError, match=r"generation_config\.json holds a list, not a JSON object"
    ):
        read_checkpoint_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON: Expecting"):
        read_checkpoint_config(tmp_path)
