"""Ranks load their shares of both models: together the whole, and nothing is read for nothing."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_reads import Reads
from pairs import draft_spec, target_spec
from safetensors.torch import save_file
from torch import Tensor

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import UNDIVIDED, Share
from eaglerun.errors import CheckpointError, ConfigError
from eaglerun.models import loading
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.loading import load_draft, load_target
from eaglerun.models.minimax_m3 import MiniMaxM3

CPU = torch.device("cpu")
SIZES = (1, 2, 4, 8)
# Two KV heads, which four and eight ranks share, and a vocabulary that does not divide.
TARGET = replace(
    target_spec(vocab_size=61, num_layers=3),
    num_attention_heads=8,
    num_experts=8,
    shared_intermediate_size=24,
)
GQA = draft_spec(
    TARGET, num_attention_heads=8, num_key_value_heads=2, head_dim=6, intermediate_size=40
)
MHA = replace(GQA, num_key_value_heads=8)
DRAFTS = {
    "GQA": GQA,
    "MHA": MHA,
    "biases, short vocabulary": replace(
        GQA, attention_bias=True, draft_vocab_size=30, fc_norm=False, norm_before_fc=True
    ),
    "tied": replace(GQA, tie_word_embeddings=True),
}


def made(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def target_file(spec: TargetSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a target by the hub's names."""
    hidden, dim, index = spec.hidden_size, spec.head_dim, spec.index_head_dim
    heads, groups = spec.num_attention_heads * dim, spec.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (spec.vocab_size, hidden),
    }
    for i in range(spec.num_hidden_layers):
        layer, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes |= {f"{layer}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        shapes |= {f"{attention}{n}_proj.weight": (groups, hidden) for n in "kv"}
        shapes |= {f"{attention}{n}_norm.weight": (dim,) for n in "qk"}
        shapes[attention + "q_proj.weight"] = (heads, hidden)
        shapes[attention + "o_proj.weight"] = (hidden, heads)
        if spec.sparse_layers[i]:
            shapes[attention + "index_q_proj.weight"] = (spec.num_index_heads * index, hidden)
            shapes[attention + "index_k_proj.weight"] = (index, hidden)
            shapes |= {f"{attention}index_{n}_norm.weight": (index,) for n in "qk"}
        if not spec.moe_layers[i]:
            shapes |= mlp_shapes(f"{layer}mlp.", spec.dense_intermediate_size, hidden)
            continue
        moe, width = layer + "block_sparse_moe.", spec.expert_intermediate_size
        shapes[moe + "gate.weight"] = (spec.num_experts, hidden)
        shapes[moe + "e_score_correction_bias"] = (spec.num_experts,)
        shapes |= mlp_shapes(f"{moe}shared_experts.", spec.shared_intermediate_size, hidden)
        for e in range(spec.num_experts):
            shapes |= {f"{moe}experts.{e}.{n}.weight": (width, hidden) for n in ("w1", "w3")}
            shapes[f"{moe}experts.{e}.w2.weight"] = (hidden, width)
    return {f"language_model.{n}": tensor for n, tensor in made(shapes, dtype).items()}


def mlp_shapes(module: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        module + "gate_proj.weight": (width, hidden),
        module + "up_proj.weight": (width, hidden),
        module + "down_proj.weight": (hidden, width),
    }


def fused(tensors: dict[str, Tensor], spec: TargetSpec) -> dict[str, Tensor]:
    """The same with gate and up, and the experts, each in one tensor."""
    found = dict(tensors)
    for i in range(spec.num_hidden_layers):
        layer = f"language_model.model.layers.{i}."
        dense = f"{layer}{'block_sparse_moe.shared_experts' if spec.moe_layers[i] else 'mlp'}."
        halves = [found.pop(f"{dense}{half}_proj.weight") for half in ("gate", "up")]
        found[dense + "gate_up_proj.weight"] = torch.cat(halves)
        if spec.moe_layers[i]:
            experts = layer + "block_sparse_moe.experts."
            w1, w3, w2 = (
                torch.stack([found.pop(f"{experts}{e}.{n}.weight") for e in range(8)])
                for n in ("w1", "w3", "w2")
            )
            found[experts + "gate_up_proj"] = torch.cat([w1, w3], 1)
            found[experts + "down_proj"] = w2
    return found


def draft_file(spec: DraftSpec) -> dict[str, Tensor]:
    hidden, groups = spec.hidden_size, spec.num_key_value_heads * spec.head_dim
    heads, taps, layer = spec.num_attention_heads * spec.head_dim, len(spec.taps), "layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (spec.vocab_size, hidden),
        "fc.weight": (hidden, taps * hidden),
        "norm.weight": (hidden,),
        layer + "self_attn.o_proj.weight": (hidden, heads),
        **mlp_shapes(f"{layer}mlp.", spec.intermediate_size, hidden),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in norms}
    for letter, rows in (("q", heads), ("k", groups), ("v", groups)):
        shapes[f"{layer}self_attn.{letter}_proj.weight"] = (rows, 2 * hidden)
        if spec.attention_bias:
            shapes[f"{layer}self_attn.{letter}_proj.bias"] = (rows,)
    if spec.fc_norm:
        shapes |= {f"fc_norm.{i}.weight": (hidden,) for i in range(taps)}
    if spec.norm_before_fc:
        shapes["input_norm.weight"] = (taps * hidden,)
    if not spec.tie_word_embeddings:
        shapes["lm_head.weight"] = (spec.draft_vocab_size, hidden)
    tensors = made(shapes, torch.float32)
    if spec.draft_vocab_size < spec.vocab_size:
        tensors["d2t"] = torch.arange(spec.draft_vocab_size)
    return tensors


def written(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """In two files, as a checkpoint of many."""
    folder.mkdir()
    names = sorted(tensors)
    for i in range(2):
        part = {n: tensors[n].contiguous() for n in names[i::2]}
        save_file(part, folder / f"model-{i}.safetensors")
    return folder


def read_target(
    path: Path, share: Share, dtype: torch.dtype = torch.float32, spec: TargetSpec = TARGET
) -> MiniMaxM3:
    model = MiniMaxM3(spec, (), device=CPU, dtype=dtype, share=share)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    load_target(model, path, spec)
    return model


def read_draft(
    path: Path, spec: DraftSpec, target: MiniMaxM3, target_path: Path | None = None, **how: Any
) -> Eagle3Llama:
    """The draft of the target's rank."""
    share = replace(target.share, **how)
    model = Eagle3Llama(spec, device=CPU, dtype=torch.float32, share=share)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    load_draft(model, path, spec, target, target_path=target_path)
    return model


def shares(size: int, **how: bool) -> Iterator[Share]:
    for rank in range(size):
        yield Share(rank, size, **how)


# How ranks divide a weight, by hand: by the shapes that tensor-parallel layers compute with.


def joined(name: str, shards: list[Tensor], spec: TargetSpec | DraftSpec, how: Share) -> Tensor:
    """The whole weight, from the shards of all ranks; what they share has to be equal."""
    if "qkv_proj" in name:
        return join_heads(shards, spec)
    if name.endswith(("w13", "w2")) and how.whole_experts:
        return torch.cat(shards)
    if name.endswith("w13"):
        return join_halves(shards, 1)
    if "gate_up_proj" in name:
        return join_halves(shards, 0)
    if name.endswith(("o_proj.weight", "down_proj.weight", "w2")):
        return torch.cat(shards, dim=-1)
    is_whole = isinstance(spec, DraftSpec) and how.whole_embedding
    if name == "lm_head.weight" or (name == "embed_tokens.weight" and not is_whole):
        return torch.cat(shards)
    return same(shards)


def join_halves(shards: list[Tensor], axis: int) -> Tensor:
    first, second = zip(*(shard.chunk(2, axis) for shard in shards), strict=True)
    return torch.cat([*first, *second], axis)


def join_heads(shards: list[Tensor], spec: TargetSpec | DraftSpec) -> Tensor:
    size, groups, dim = len(shards), spec.num_key_value_heads, spec.head_dim
    q = spec.num_attention_heads // size * dim
    kv = max(1, groups // size) * dim
    rows = [q, kv, kv]
    if isinstance(spec, TargetSpec) and shards[0].shape[0] > q + 2 * kv:
        rows += [max(1, spec.num_index_heads // size) * spec.index_head_dim, spec.index_head_dim]
    parts = [torch.split(shard, rows) for shard in shards]
    whole = [torch.cat([part[0] for part in parts])]
    copies = max(1, size // groups)
    for i in (1, 2, 3)[: min(3, len(rows) - 1)]:
        held = [part[i] for part in parts]
        whole.append(torch.cat([same(held[r : r + copies]) for r in range(0, size, copies)]))
    if len(rows) == 5:
        whole.append(same([part[4] for part in parts]))
    return torch.cat(whole)


def same(shards: list[Tensor]) -> Tensor:
    assert all(torch.equal(shards[0], shard) for shard in shards[1:])
    return shards[0]


def assert_together(
    whole: torch.nn.Module, ranks: list[Any], spec: TargetSpec | DraftSpec, how: Share
) -> None:
    expected = whole.state_dict()
    held = [rank.state_dict() for rank in ranks]
    for name, tensor in expected.items():
        shards = [state[name] for state in held]
        together = joined(name, shards, spec, how)
        assert together.dtype == tensor.dtype
        assert torch.equal(together, tensor), name
        for shard in shards:
            assert shard.untyped_storage().nbytes() == shard.nbytes, "a part of more memory"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target as the hub stores it and with fused tensors, and its drafts by name."""
    folder, tensors = tmp_path_factory.mktemp("saved"), target_file(TARGET)
    written_ = {
        "hub": written(folder / "hub", tensors),
        "fused": written(folder / "fused", fused(tensors, TARGET)),
    }
    for i, (name, spec) in enumerate(DRAFTS.items()):
        written_[name] = written(folder / f"draft-{i}", draft_file(spec))
    return written_


@pytest.fixture(scope="module")
def targets(files) -> dict[int, list[MiniMaxM3]]:
    """The ranks of a group of each size."""
    return {size: [read_target(files["hub"], share) for share in shares(size)] for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize("layout", ["hub", "fused"])
def test_the_shares_of_a_target_are_the_whole(files, targets, size, whole_experts, layout):
    how = Share(0, size, whole_experts)
    ranks = [read_target(files[layout], s) for s in shares(size, whole_experts=whole_experts)]
    assert_together(targets[1][0], ranks, TARGET, how)
    experts = [rank.get_parameter("layers.1.mlp.experts.w2").shape for rank in ranks]
    one = (8 // size, 32, 16) if whole_experts else (8, 32, 16 // size)
    assert set(experts) == {one}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_every_format(tmp_path, stored, dtype):
    """The router in float32 or wider, and the rest in the model's dtype."""
    path = written(tmp_path / "t", target_file(TARGET, stored))
    ranks = [read_target(path, share, dtype) for share in shares(4)]
    gate = ranks[0].get_parameter("layers.1.mlp.gate.weight")
    assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_together(read_target(path, UNDIVIDED, dtype), ranks, TARGET, Share(0, 4))


def test_a_tied_target(tmp_path):
    spec = replace(TARGET, tie_word_embeddings=True)
    tensors = target_file(spec)
    del tensors["language_model.lm_head.weight"]
    path = written(tmp_path / "t", tensors)
    ranks = [read_target(path, share, spec=spec) for share in shares(8)]
    assert_together(read_target(path, UNDIVIDED, spec=spec), ranks, spec, Share(0, 8))
    assert all(rank.lm_head.weight is rank.embed_tokens.weight for rank in ranks)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("name", "whole"),
    # A head that is tied to a whole embedding is whole: test_a_tied_draft.
    [(name, whole) for name in DRAFTS for whole in (True, False) if not (whole and name == "tied")],
)
def test_the_shares_of_a_draft_are_the_whole(files, targets, name, size, whole):
    spec, how = DRAFTS[name], Share(0, size, whole_embedding=whole)
    ranks = [read_draft(files[name], spec, t, whole_embedding=whole) for t in targets[size]]
    undivided = read_draft(files[name], spec, targets[1][0])
    assert_together(undivided, ranks, spec, how)
    last = 61 if whole else 61 - (size - 1) * -(-61 // size)
    assert ranks[-1].embed_tokens.weight.shape[0] == last


def test_a_tied_draft(files, targets):
    spec = DRAFTS["tied"]
    for target in targets[8]:
        draft = read_draft(files["tied"], spec, target)
        assert draft.lm_head.weight is draft.embed_tokens.weight
        assert torch.equal(draft.embed_tokens.weight, draft_file(spec)["embed_tokens.weight"])


@pytest.mark.parametrize("size", [2, 8])
def test_a_draft_without_embedding_and_head(files, targets, tmp_path, size):
    """The head is the target's shard. The whole embedding is read from the target's files."""
    tensors = draft_file(GQA)
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    path = written(tmp_path / "d", tensors)
    whole = targets[1][0].embed_tokens.weight
    for target in targets[size]:
        draft = read_draft(path, GQA, target, files["hub"])
        assert draft.lm_head.weight is target.lm_head.weight
        assert torch.equal(draft.embed_tokens.weight, whole)
        draft = read_draft(path, GQA, target, files["hub"], whole_embedding=False)
        assert draft.embed_tokens.weight is target.embed_tokens.weight
    # Of one rank it is the target's own, as ever.
    draft = read_draft(path, GQA, targets[1][0], files["hub"])
    assert draft.embed_tokens.weight is whole
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(61, 32\) .* so that the dr"):
        read_draft(path, GQA, targets[size][0])
    wider = replace(GQA, hidden_size=40, target_hidden_size=32)
    tensors = draft_file(wider)
    tensors["fc.weight"] = torch.zeros(40, 96)
    tensors |= {f"fc_norm.{i}.weight": torch.zeros(32) for i in range(3)}
    del tensors["embed_tokens.weight"]
    path = written(tmp_path / "wider", tensors)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight \(61, 40\) .* so that the dr"):
        read_draft(path, wider, targets[size][0], files["hub"])


def test_what_a_draft_stores_of_the_targets_head_is_shared(files, targets, tmp_path):
    tensors = draft_file(GQA)
    tensors["lm_head.weight"] = targets[1][0].lm_head.weight
    path = written(tmp_path / "d", tensors)
    for target in targets[4]:
        assert read_draft(path, GQA, target).lm_head.weight is target.lm_head.weight


# What is read.


def bytes_of(tensors: dict[str, Tensor]) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in tensors.items()}


REPLICATED = ("norm", "index_k", "gate.weight", "e_score", "fc.", "d2t")
BY_GROUP = ("k_proj", "v_proj", "index_q")


def expected_bytes(
    name: str, whole: int, share: Share, groups: int, embedding: bool = False
) -> int | None:
    """The bytes that a rank has to read of a tensor; None: of a vocabulary, which is not even."""
    if any(word in name for word in REPLICATED) or (embedding and "embed_tokens" in name):
        return whole
    if "embed_tokens" in name or "lm_head" in name:
        return None
    if ".experts." in name and share.whole_experts:
        expert = int(name.split(".experts.")[1].split(".")[0])
        return whole if expert // (8 // share.size) == share.rank else 0
    if any(word in name for word in BY_GROUP):
        return whole // min(share.size, groups)
    return whole // share.size


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("whole_experts", [False, True])
def test_a_rank_reads_its_part_alone(files, monkeypatch, size, whole_experts):
    stored = bytes_of(target_file(TARGET))
    vocabulary = dict.fromkeys((name for name in stored if "embed" in name or "head" in name), 0)
    for share in shares(size, whole_experts=whole_experts):
        reads = Reads()
        monkeypatch.setattr(loading, "safe_open", reads)
        model = read_target(files["hub"], share)
        for name, whole in stored.items():
            expected = expected_bytes(name, whole, share, TARGET.num_key_value_heads)
            if expected is None:
                vocabulary[name] += reads.num_bytes[name]
                assert reads.num_bytes[name] <= whole // 61 * -(-61 // size)
            else:
                assert reads.num_bytes[name] == expected, name
        # All that was read is held, and nothing else.
        held = sum(parameter.nbytes for parameter in model.parameters())
        assert sum(reads.num_bytes.values()) == held
    assert vocabulary == {name: stored[name] for name in vocabulary}


@pytest.mark.parametrize("size", [2, 8])
def test_a_rank_reads_its_part_of_fused_tensors(files, monkeypatch, size):
    """Half by half, and of the experts one by one."""
    stored = bytes_of(fused(target_file(TARGET), TARGET))
    moe = "language_model.model.layers.1.block_sparse_moe."
    pieces = {
        "language_model.model.layers.0.mlp.gate_up_proj.weight": 2,
        moe + "shared_experts.gate_up_proj.weight": 2,
        moe + "experts.gate_up_proj": 2 * 8,
        moe + "experts.down_proj": 8,
    }
    for share in shares(size):
        reads = Reads()
        monkeypatch.setattr(loading, "safe_open", reads)
        read_target(files["fused"], share)
        for name, count in pieces.items():
            assert reads.num_bytes[name] == stored[name] // size
            assert reads.largest[name] == stored[name] // size // count


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", ["GQA", "MHA", "biases, short vocabulary"])
def test_a_rank_reads_its_part_of_a_draft(files, targets, monkeypatch, name, size):
    spec = DRAFTS[name]
    stored = bytes_of(draft_file(spec))
    head = 0
    for target in targets[size]:
        reads = Reads()
        monkeypatch.setattr(loading, "safe_open", reads)
        draft = read_draft(files[name], spec, target)
        for tensor, whole in stored.items():
            expected = expected_bytes(tensor, whole, target.share, spec.num_key_value_heads, True)
            assert expected is None or reads.num_bytes[tensor] == expected, tensor
        head += reads.num_bytes["lm_head.weight"]
        held = [*draft.parameters(), *draft.buffers()]
        assert sum(reads.num_bytes.values()) == sum(t.nbytes for t in held)
    assert head == stored["lm_head.weight"]


def test_one_rank_reads_everything_once(files, monkeypatch):
    reads = Reads()
    monkeypatch.setattr(loading, "safe_open", reads)
    read_target(files["hub"], UNDIVIDED)
    assert reads.num_bytes == bytes_of(target_file(TARGET))


# What is refused.


def test_numbers_of_ranks_that_do_not_divide_a_model():
    meta = torch.device("meta")
    with pytest.raises(ConfigError, match=r"= 3: target num_attention_heads = 8 cannot .* 1, 2, 4"):
        MiniMaxM3(TARGET, (), device=meta, dtype=torch.float32, share=Share(0, 3))
    with pytest.raises(ConfigError, match=r"= 16: draft num_attention_heads = 8 cannot .* 1, 2, 4"):
        Eagle3Llama(GQA, device=meta, dtype=torch.float32, share=Share(15, 16))


def test_a_rank_checks_all_of_a_checkpoint(tmp_path):
    """Also what others read: a tensor that is missing, misshapen or too much."""
    tensors = target_file(TARGET)
    experts = "language_model.model.layers.1.block_sparse_moe.experts."
    del tensors[experts + "7.w1.weight"]
    tensors[experts + "6.w1.weight"] = torch.zeros(8, 32)
    tensors[experts + "8.w1.weight"] = torch.zeros(16, 32)
    path = written(tmp_path / "t", tensors)
    with pytest.raises(CheckpointError) as error:
        read_target(path, Share(0, 8, whole_experts=True))
    assert "experts.6.w1.weight has shape (8, 32): layers.1.mlp.experts.w13 takes (16, 32)" in str(
        error.value
    )
    assert "experts.7.w1.weight is missing" in str(error.value)
    assert "experts.8.w1.weight F32 (16, 32) belongs to no parameter" in str(error.value)


def test_numbers_that_are_not_finite_are_told_by_the_rank_that_holds_them(tmp_path):
    tensors = target_file(TARGET)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name][31, 0] = math.nan
    path = written(tmp_path / "t", tensors)
    read_target(path, Share(0, 2))
    with pytest.raises(CheckpointError, match=f"NaN or Inf.* in {name}$"):
        read_target(path, Share(1, 2))


def test_a_model_of_another_share_is_a_bug(files):
    model = MiniMaxM3(TARGET, (), device=CPU, dtype=torch.float32, share=Share(0, 2))
    model.share = Share(0, 4)
    with pytest.raises(ValueError, match=r"lm_head.weight: the spec has \(16, 32\), the model"):
        load_target(model, files["hub"], TARGET)
