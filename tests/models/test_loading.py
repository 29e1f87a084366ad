"""Every layout of the two checkpoints loads into the same parameters, and nothing else loads."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counted_reads import Reads
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
)

from eaglerun.checkpoint.budget import Component, draft_components, target_components
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.errors import CheckpointError
from eaglerun.models import loading
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.loading import fill_dummy, load_draft, load_target, resolve_checkpoint
from eaglerun.models.minimax_m3 import MiniMaxM3

CPU = torch.device("cpu")
TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 12,
    "dense_intermediate_size": 40,
    "shared_intermediate_size": 20,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    # All four kinds of layer.
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
    "layer_types": ["full_attention"] * 2 + ["minimax_m3_sparse"] * 2,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "index_block_size": 4,
    "index_topk_blocks": 3,
    "rotary_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Path, dict[str, Tensor]]:
    """The same random model saved by transformers as a text model (one file) and as a VL model
    (files of 20 KB with an index), and its state dict under the text model's names."""
    torch.manual_seed(0)
    text = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**TEXT))
    for tensor in text.state_dict().values():
        tensor.normal_()
    config = MiniMaxM3VLConfig(text_config=TEXT, vision_config=VISION, projector_hidden_size=8)
    vl = MiniMaxM3SparseForConditionalGeneration(config)
    state = text.state_dict()
    for name, tensor in vl.state_dict().items():
        if name.startswith(("model.language_model.", "lm_head.")):
            tensor.copy_(state[name.replace("language_model.", "")])
    folder = tmp_path_factory.mktemp("saved")
    text.save_pretrained(folder / "text")
    vl.save_pretrained(folder / "vl", max_shard_size="20KB")
    return folder / "text", folder / "vl", state


@pytest.fixture
def spec(saved) -> TargetSpec:
    return TargetSpec.from_config(read_checkpoint_config(saved[0]))


def new_target(spec: TargetSpec, dtype: torch.dtype = torch.float32) -> MiniMaxM3:
    """A target whose parameters are all NaN, so that one that stays unfilled shows."""
    model = MiniMaxM3(spec, (), device=CPU, dtype=dtype)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    return model


def fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that transformers' text state dict stands for, joined by hand."""
    found = {}
    for i in range(4):
        layer = f"model.layers.{i}.self_attn."
        rows = [state[f"{layer}{letter}_proj.weight"] for letter in "qkv"]
        if i >= 2:
            rows += [state[f"{layer}indexer.{letter}_proj.weight"] for letter in "qk"]
        found[f"layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(rows)
    for name, tensor in state.items():
        if re.search(r"self_attn\.(indexer\.)?[qkv]_proj", name):
            continue
        name = name.removeprefix("model.").replace("indexer.", "index_")
        name = name.replace("experts.gate_up_proj", "experts.w13") if tensor.dim() == 3 else name
        name = name.replace("experts.down_proj", "experts.w2") if tensor.dim() == 3 else name
        found[name] = tensor
    return found


def assert_holds(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


def hub_tensors(vl: Path) -> dict[str, Tensor]:
    tensors = {}
    for file in vl.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def refusal(model: torch.nn.Module, path: Path, *rest: object) -> str:
    """The message with which a load is refused, before it touched the model."""
    load = load_target if isinstance(model, MiniMaxM3) else load_draft
    with pytest.raises(CheckpointError) as error:
        load(model, path, model.spec, *rest)
    if isinstance(model, MiniMaxM3):
        assert all(parameter.isnan().all() for parameter in model.parameters())
    return str(error.value)


def test_both_saves_of_transformers(saved, spec, capsys):
    text, vl, state = saved
    assert len(list(vl.glob("*.safetensors"))) > 4
    assert spec == TargetSpec.from_config(read_checkpoint_config(vl))
    assert spec.sparse_layers == (False, False, True, True)
    for path in (text, vl):
        model = new_target(spec)
        pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
        load_target(model, path, spec, progress=None)
        assert_holds(model, fused(state))
        # Into the parameters that were there.
        assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert capsys.readouterr().err == "", "a progress bar where there is no terminal"
    load_target(new_target(spec), text, spec, progress=True)
    drawn = capsys.readouterr().err
    assert "loading target: 100%" in drawn and "B/s]" in drawn


def test_config_of_the_hub_as_transformers_saves_it(saved, spec, tmp_path):
    sparse = {
        "sparse_num_index_heads": 2,
        "sparse_index_dim": 6,
        "sparse_block_size": 4,
        "sparse_topk_blocks": 3,
        "sparse_local_block": 1,
        "sparse_attention_freq": [0, 0, 1, 1],
    }
    hub = {k: v for k, v in TEXT.items() if not k.startswith("index_") and "layer_types" not in k}
    del hub["rope_parameters"]
    hub |= {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "hidden_act": "swigluoai"}
    hub |= {"moe_layer_freq": [0, 1, 0, 1], "sparse_attention_config": sparse}
    MiniMaxM3VLConfig(text_config=hub, vision_config=VISION).save_pretrained(tmp_path)
    for config in (
        read_checkpoint_config(tmp_path),
        {"model_type": "minimax_m3_vl", "text_config": hub},
    ):
        config["dtype"] = "float32"
        assert TargetSpec.from_config(config) == spec


def test_files_without_an_index(saved, spec, tmp_path):
    for file in saved[1].glob("*.safetensors"):
        (tmp_path / file.name).symlink_to(file)
    model = new_target(spec)
    load_target(model, tmp_path, spec)
    assert_holds(model, fused(saved[2]))


def test_the_router_stays_float32(saved, spec):
    model = new_target(spec, torch.bfloat16)
    load_target(model, saved[1], spec)
    assert_holds(model, fused(saved[2]))
    assert model.get_parameter("layers.1.mlp.gate.weight").dtype == torch.float32
    assert model.get_parameter("layers.0.self_attn.qkv_proj.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_widen(saved, spec, tmp_path, dtype):
    path = written(tmp_path, {n: t.to(dtype) for n, t in hub_tensors(saved[1]).items()})
    model = new_target(spec)
    load_target(model, path, spec)
    assert_holds(model, {name: t.to(dtype) for name, t in fused(saved[2]).items()})


def in_memory_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' VL state dict: model.language_model.*, everything fused, lm_head on top."""
    return {
        name
        if name.startswith("lm_head")
        else name.replace("model.", "model.language_model.", 1): t
        for name, t in tensors.items()
    }


def respelled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hub's file with the experts as gate/up/down, the other module names for the rest."""
    for old, new in (
        (r"experts\.(\d+)\.w1", r"experts.\1.gate_proj"),
        (r"experts\.(\d+)\.w2", r"experts.\1.down_proj"),
        (r"experts\.(\d+)\.w3", r"experts.\1.up_proj"),
        (r"block_sparse_moe\.e_score", "mlp.gate.e_score"),
        (r"block_sparse_moe", "mlp"),
        (r"self_attn\.index_", "self_attn.indexer."),
        (r"^language_model\.model", "model.language_model"),
    ):
        tensors = {re.sub(old, new, name): tensor for name, tensor in tensors.items()}
    return tensors


@pytest.mark.parametrize("layout", ["in memory", "respelled", "hub, gate/up/down", "no prefix"])
def test_other_spellings(saved, spec, tmp_path, layout):
    text, vl, state = saved
    tensors = {
        "in memory": lambda: in_memory_names(state),
        "respelled": lambda: respelled(hub_tensors(vl)),
        "hub, gate/up/down": lambda: {
            name.replace(".w1.", ".gate_proj.").replace(".w3.", ".up_proj."): t
            for name, t in hub_tensors(vl).items()
        },
        "no prefix": lambda: {name.removeprefix("model."): t for name, t in state.items()},
    }[layout]()
    model = new_target(spec)
    load_target(model, written(tmp_path, tensors), spec)
    assert_holds(model, fused(state))


def test_vision_and_mtp_are_skipped(saved, spec, tmp_path):
    junk = {
        name: torch.zeros(1, dtype=torch.uint8)
        for name in (
            "vision_tower.vision_model.pre_layrnorm.weight",
            "multi_modal_projector.linear_1.bias",
            "patch_merge_mlp.linear_2.weight",
            "model.vision_tower.layers.0.mlp.fc1.weight",
            "model.multi_modal_projector.merge_linear_1.weight",
            "mtp.layers.0.norm.weight",
        )
    }
    model = new_target(spec)
    load_target(model, written(tmp_path, saved[2] | junk), spec)
    assert_holds(model, fused(saved[2]))


def test_tied_and_without_bias(saved, spec, tmp_path):
    spec = replace(spec, tie_word_embeddings=True, use_routing_bias=False)
    state = {n: t for n, t in saved[2].items() if "lm_head" not in n and "e_score" not in n}
    model = new_target(spec)
    load_target(model, written(tmp_path, state), spec)
    expected = fused(state)
    assert_holds(model, expected | {"lm_head.weight": expected["embed_tokens.weight"]})
    assert model.lm_head.weight is model.embed_tokens.weight
    message = refusal(new_target(spec), written(tmp_path, saved[2]))
    assert "tensor lm_head.weight F32 (60, 32) belongs to no parameter" in message
    assert "e_score_correction_bias" in message


HUB = "language_model.model."


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (HUB + "norm.weight", "no tensor for parameter norm.weight"),
        (
            HUB + "layers.0.self_attn.v_proj.weight",
            "parameter layers.0.self_attn.qkv_proj.weight: layers.0.self_attn.v_proj.weight",
        ),
        (
            HUB + "layers.2.self_attn.index_k_proj.weight",
            "parameter layers.2.self_attn.qkv_proj.weight: layers.2.self_attn.index_k_proj.weight",
        ),
        (
            HUB + "layers.1.block_sparse_moe.experts.3.w3.weight",
            "parameter layers.1.mlp.experts.w13: layers.1.block_sparse_moe.experts.3.w3.weight",
        ),
        (
            HUB + "layers.3.block_sparse_moe.e_score_correction_bias",
            "no tensor for parameter layers.3.mlp.gate.e_score_correction_bias",
        ),
        ("language_model.lm_head.weight", "no tensor for parameter lm_head.weight"),
    ],
)
def test_a_parameter_without_a_tensor(saved, spec, tmp_path, name, message):
    tensors = hub_tensors(saved[1])
    del tensors[name]
    refused = refusal(new_target(spec), written(tmp_path, tensors))
    assert refused.startswith(f"{tmp_path}: ")
    assert message in refused
    assert ";" not in refused


@pytest.mark.parametrize(
    "name",
    [
        HUB + "layers.4.input_layernorm.weight",
        HUB + "layers.0.self_attn.q_proj.bias",
        HUB + "layers.0.self_attn.index_q_proj.weight",
        HUB + "layers.1.block_sparse_moe.experts.5.w1.weight",
        HUB + "layers.0.self_attn.q_proj.weight_scale_inv",
        "visual.norm.weight",
    ],
)
def test_a_tensor_without_a_parameter(saved, spec, tmp_path, name):
    path = written(tmp_path, hub_tensors(saved[1]) | {name: torch.zeros(3)})
    assert refusal(new_target(spec), path) == (
        f"{tmp_path / 'model.safetensors'}: tensor {name} F32 (3,) belongs to no parameter"
    )


def test_shapes_and_dtypes_are_checked(saved, spec, tmp_path):
    tensors = hub_tensors(saved[1])
    name = HUB + "layers.0.self_attn.k_proj.weight"
    tensors[name] = torch.zeros(8, 32)
    tensors[HUB + "norm.weight"] = torch.zeros(32, dtype=torch.float8_e4m3fn)
    message = refusal(new_target(spec), written(tmp_path, tensors))
    assert f"{name} has shape (8, 32): layers.0.self_attn.qkv_proj.weight takes (16, 32)" in message
    assert "norm.weight has dtype F8_E4M3: norm.weight takes BF16, F16, F32" in message


def test_a_part_that_comes_twice(saved, spec, tmp_path):
    tensors = hub_tensors(saved[1])
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = torch.zeros(80, 32)
    message = refusal(new_target(spec), written(tmp_path, tensors))
    assert "layers.0.mlp.gate_proj.weight again: model.safetensors has" in message


def test_a_long_list_of_faults_is_cut(saved, spec, tmp_path):
    tensors = {n: t for n, t in hub_tensors(saved[1]).items() if "experts" not in n}
    assert refusal(new_target(spec), written(tmp_path, tensors)).endswith("; and 28 more")


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite(saved, spec, tmp_path, value):
    tensors = load_file(saved[0] / "model.safetensors")
    name = next(name for name in tensors if "experts.1." in name or "mlp" in name)
    tensors[name].view(-1)[3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"model.safetensors: NaN or Inf.* in {name}$"):
        load_target(new_target(spec), tmp_path, spec)


def test_broken_files(saved, spec, tmp_path):
    model = new_target(spec)
    assert "holds no *.safetensors" in refusal(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0")
    assert "model.safetensors cannot be read as safetensors" in refusal(model, tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        assert "index.json is no index" in refusal(model, tmp_path)
    weight_map = {name: "model.safetensors" for name in hub_tensors(saved[1])}
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "b.safetensors"}}))
    message = refusal(model, tmp_path)
    assert "1 of the 2 files in model.safetensors.index.json are missing: b.safetensors" in message
    index.write_text(json.dumps({"weight_map": weight_map | {"x": "model.safetensors"}}))
    written(tmp_path, hub_tensors(saved[1]))
    assert "tensor x is missing, which model.safetensors.index.json" in refusal(model, tmp_path)


def test_a_model_of_another_spec_is_a_bug(saved, spec):
    with pytest.raises(ValueError, match=r"lm_head.weight: the spec has \(61, 32\), the model"):
        load_target(new_target(spec), saved[0], replace(spec, vocab_size=61))


def test_one_tensor_at_a_time(saved, spec, monkeypatch):
    """The fused experts of transformers are read matrix by matrix."""
    reads = Reads()
    monkeypatch.setattr(loading, "safe_open", reads)
    load_target(new_target(spec), saved[0], spec)
    assert reads.shapes and max(map(len, reads.shapes)) == 2


# The draft.


def draft_spec(target: TargetSpec, **changes: object) -> DraftSpec:
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
        "vocab_size": 60,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
        "fc_norm": True,
        "norm_output": True,
    }
    return DraftSpec.from_config(config | changes, target)


def draft_tensors(spec: DraftSpec) -> dict[str, Tensor]:
    """A draft's file with the names of the published ones, written by hand."""
    generator = torch.Generator().manual_seed(1)
    heads, groups = (
        spec.num_attention_heads * spec.head_dim,
        spec.num_key_value_heads * spec.head_dim,
    )
    hidden, chunks = spec.hidden_size, len(spec.taps)
    shapes = {
        "embed_tokens.weight": (spec.vocab_size, hidden),
        "fc.weight": (hidden, chunks * spec.target_hidden_size),
        "layers.0.input_layernorm.weight": (hidden,),
        "layers.0.hidden_norm.weight": (hidden,),
        "layers.0.post_attention_layernorm.weight": (hidden,),
        "layers.0.self_attn.q_proj.weight": (heads, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": (groups, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": (groups, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": (hidden, heads),
        "layers.0.mlp.gate_proj.weight": (spec.intermediate_size, hidden),
        "layers.0.mlp.up_proj.weight": (spec.intermediate_size, hidden),
        "layers.0.mlp.down_proj.weight": (hidden, spec.intermediate_size),
        "norm.weight": (hidden,),
        "lm_head.weight": (spec.draft_vocab_size, hidden),
    }
    if spec.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (spec.target_hidden_size,) for i in range(chunks)}
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (chunks * spec.target_hidden_size,)
    if spec.attention_bias:
        shapes |= {
            f"layers.0.self_attn.{letter}_proj.bias": (heads if letter == "q" else groups,)
            for letter in "qkv"
        }
    if not spec.use_aux_hidden_state:
        del shapes["fc.weight"]
    if spec.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fused_draft(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    attention = "layers.0.self_attn."
    for kind in ("weight", "bias"):
        rows = [
            t for t in (tensors.get(f"{attention}{i}_proj.{kind}") for i in "qkv") if t is not None
        ]
        if rows:
            found[f"layer.self_attn.qkv_proj.{kind}"] = torch.cat(rows)
    found["layer.mlp.gate_up_proj.weight"] = torch.cat(
        [tensors["layers.0.mlp.gate_proj.weight"], tensors["layers.0.mlp.up_proj.weight"]]
    )
    if "fc_norm.0.weight" in tensors:
        norms = [tensors[name] for name in sorted(tensors) if name.startswith("fc_norm.")]
        found["fc_norm.weight"] = torch.stack(norms)
    for name, tensor in tensors.items():
        if not re.search(r"[qkv]_proj|gate_proj|up_proj|fc_norm|t2d|mask_hidden", name):
            found[name.replace("layers.0.", "layer.")] = tensor
    return found


def new_draft(spec: DraftSpec) -> Eagle3Llama:
    model = Eagle3Llama(spec, device=CPU, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    return model


@pytest.fixture
def target(saved, spec) -> MiniMaxM3:
    model = new_target(spec)
    load_target(model, saved[0], spec)
    return model


TAP_IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"fc_norm": False},
        {"fc_norm": False, "norm_before_fc": True, TAP_IDS: [0, 3]},
        {"attention_bias": True},
        {"hidden_size": 16, "target_hidden_size": 32},
        {
            "fc_norm": False,
            "eagle_config": {"use_aux_hidden_state": False, TAP_IDS: [4]},
            TAP_IDS: [4],
        },
    ],
)
@pytest.mark.parametrize("module", ["layers.0.", "midlayer.", "model.layers.0."])
def test_draft_layouts(spec, target, tmp_path, changes, module):
    draft = draft_spec(spec, **changes)
    tensors = draft_tensors(draft)
    path = written(tmp_path, {n.replace("layers.0.", module): t for n, t in tensors.items()})
    model = new_draft(draft)
    assert load_draft(model, path, draft, target) == ()
    assert_holds(model, fused_draft(tensors))


def test_draft_vocabulary(spec, target, tmp_path):
    draft = draft_spec(spec, draft_vocab_size=20)
    d2t = torch.arange(20) * 2
    tensors = draft_tensors(draft) | {"d2t": d2t}
    ignored = {"t2d": torch.ones(60, dtype=torch.bool), "mask_hidden": torch.zeros(32)}
    model = new_draft(draft)
    load_draft(model, written(tmp_path, tensors | ignored), draft, target)
    assert_holds(model, fused_draft(tensors))

    def refused(**changes: Tensor) -> str:
        return refusal(new_draft(draft), written(tmp_path, tensors | changes), target)

    assert "d2t maps to target ids 0 .. 60: must lie in [0, 60)" in refused(d2t=d2t + d2t // 38 * 3)
    assert "d2t maps two draft ids to one target id" in refused(d2t=-(torch.arange(20) % 2))
    assert "d2t has dtype I32: d2t takes I64" in refused(d2t=d2t.int())
    del tensors["d2t"]
    assert "no tensor for parameter d2t" in refused()


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_full_vocabulary_draft_may_store_tables_of_ids(spec, target, tmp_path, prefix, dtype):
    draft = draft_spec(spec)
    tensors = draft_tensors(draft)
    d2t = torch.zeros(60, dtype=dtype)
    unused = {
        prefix + "d2t": d2t,
        prefix + "t2d": torch.ones(60, dtype=torch.bool),
        "midlayer.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    model = new_draft(draft)
    load_draft(model, written(tmp_path, tensors | unused), draft, target)
    assert_holds(model, fused_draft(tensors))
    d2t[3] = 1
    message = refusal(new_draft(draft), written(tmp_path, tensors | unused), target)
    assert f"tensor {prefix}d2t is not zero: the draft's vocabulary is the target's" in message


def test_rotary_tables_of_the_target_are_skipped(saved, spec, tmp_path):
    tables = {
        f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4)
        for i in range(spec.num_hidden_layers)
    }
    model = new_target(spec)
    load_target(model, written(tmp_path, saved[2] | tables), spec)
    assert_holds(model, fused(saved[2]))


EMBED, HEAD = "embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("shared", [(EMBED,), (HEAD,), (EMBED, HEAD)])
@pytest.mark.parametrize("stored", [False, True])
def test_what_the_draft_shares_is_the_targets(spec, target, tmp_path, shared, stored):
    draft = draft_spec(spec)
    tensors = draft_tensors(draft)
    for name in shared:
        tensors[name] = target.get_parameter(name)
    kept = {name: t for name, t in tensors.items() if stored or name not in shared}
    model = new_draft(draft)
    assert load_draft(model, written(tmp_path, kept), draft, target) == shared
    assert_holds(model, fused_draft(tensors))
    for name in (EMBED, HEAD):
        is_same = model.get_parameter(name) is target.get_parameter(name)
        assert is_same == (name in shared)


def test_tied_draft(spec, target, tmp_path):
    draft = draft_spec(spec, tie_word_embeddings=True)
    tensors = draft_tensors(draft)
    model = new_draft(draft)
    assert load_draft(model, written(tmp_path, tensors), draft, target) == ()
    assert model.lm_head.weight is model.embed_tokens.weight
    del tensors[EMBED]
    model = new_draft(draft)
    assert load_draft(model, written(tmp_path, tensors), draft, target) == (EMBED,)
    assert model.lm_head.weight is target.embed_tokens.weight


def test_draft_refusals(spec, target, tmp_path):
    draft = draft_spec(spec, draft_vocab_size=20)
    tensors = draft_tensors(draft) | {"d2t": torch.zeros(20, dtype=torch.int64)}
    del tensors[HEAD]
    message = refusal(new_draft(draft), written(tmp_path, tensors), target)
    assert "no tensor for lm_head.weight (20, 32) torch.float32 on cpu, and the target's" in (
        message
    )
    draft = draft_spec(spec)
    tensors = draft_tensors(draft)
    tensors["fc.weight"] = torch.zeros(32, 64)
    tensors["fc_norm.3.weight"] = torch.zeros(32)
    del tensors["layers.0.hidden_norm.weight"]
    message = refusal(new_draft(draft), written(tmp_path, tensors), target)
    assert "fc.weight has shape (32, 64): fc.weight takes (32, 96)" in message
    assert "tensor fc_norm.3.weight F32 (32,) belongs to no parameter" in message
    assert "parameter layer.hidden_norm.weight: layers.0.hidden_norm.weight is missing" in message


# The rest.


def test_the_budget_counts_what_checkpoints_hold(saved, spec):
    """Transformers' own model, and the draft's tensors as these tests make them."""
    tensors = saved[2]
    assert parameters_of(target_components(spec)) == sum(t.numel() for t in tensors.values())
    tied = parameters_of(target_components(replace(spec, tie_word_embeddings=True)))
    assert tied == sum(t.numel() for name, t in tensors.items() if name != "lm_head.weight")
    for changes in (
        {},
        {"fc_norm": False, "norm_before_fc": True},
        {"fc_norm": False, "attention_bias": True},
        {"hidden_size": 16, "target_hidden_size": 32},
        {"draft_vocab_size": 20},
    ):
        draft = draft_spec(spec, **changes)
        held = sum(t.numel() for t in draft_tensors(draft).values())
        assert parameters_of(draft_components(draft)) == held


def parameters_of(components: tuple[Component, ...]) -> int:
    return sum(c.num_parameters for c in components)


def test_dummy_weights(spec):
    first, again, other = (new_target(spec) for _ in range(3))
    for model, seed in ((first, 3), (again, 3), (other, 4)):
        fill_dummy(model, seed)
    assert_holds(again, dict(first.state_dict()))
    for name, parameter in first.named_parameters():
        assert not torch.equal(parameter, other.get_parameter(name)), name
        assert parameter.isfinite().all()
    # A parameter's values do not hang on the others.
    other = new_target(replace(spec, vocab_size=61))
    fill_dummy(other, 3)
    name = "layers.3.mlp.experts.w13"
    assert torch.equal(other.get_parameter(name), first.get_parameter(name))
    assert first.get_parameter("norm.weight").abs().max() < 0.3
    assert 0.8 < first.get_parameter(name).std() * 32**0.5 < 1.2
    assert first.get_parameter("layers.1.mlp.gate.weight").dtype == torch.float32


def test_dummy_draft(spec):
    draft = draft_spec(spec, draft_vocab_size=20, attention_bias=True)
    model = new_draft(draft)
    fill_dummy(model, 0)
    assert (model.norm.weight - 1).abs().max() < 0.3
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model.to_target_ids(torch.arange(20)).tolist() == list(range(0, 60, 3))
    tied = new_draft(draft_spec(spec, tie_word_embeddings=True))
    fill_dummy(tied, 0)
    assert tied.lm_head.weight is tied.embed_tokens.weight


def test_a_directory_is_taken_as_it_is(tmp_path):
    assert resolve_checkpoint(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    "name", ["./missing", "/no/such/place", "a/b/c", "model", "../x", "~/none"]
)
def test_neither_directory_nor_hub_id(name, monkeypatch):
    monkeypatch.delattr(loading, "snapshot_download")
    with pytest.raises(CheckpointError, match="is no directory here, and no hub id"):
        resolve_checkpoint(name)


def test_hub_id(tmp_path, monkeypatch):
    asked = {}

    def download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", download)
    assert resolve_checkpoint("MiniMaxAI/MiniMax-M3") == tmp_path
    assert asked == {"MiniMaxAI/MiniMax-M3": ["*.json", "*.safetensors", "*.jinja"]}


def test_hub_out_of_reach(monkeypatch):
    def download(name: str, allow_patterns: list[str]) -> str:
        raise LocalEntryNotFoundError("offline and not in the cache\nand more")

    monkeypatch.setattr(loading, "snapshot_download", download)
    with pytest.raises(CheckpointError) as error:
        resolve_checkpoint("MiniMaxAI/MiniMax-M3")
    assert str(error.value) == (
        "MiniMaxAI/MiniMax-M3 is no directory here, and the hub does not give it "
        "(LocalEntryNotFoundError: offline and not in the cache). On a machine that reaches the "
        "hub: hf download MiniMaxAI/MiniMax-M3 --local-dir DIR; then pass DIR"
    )
