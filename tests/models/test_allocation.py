"""A model allocates the weights of its table, in their formats, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import Share, draft_weights, target_weights
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3

M3_8L = Path(__file__).parents[2] / "configs" / "m3-8l"
TARGET = TargetSpec.from_config(read_checkpoint_config(M3_8L / "target"))
MHA, GQA = (
    DraftSpec.from_config(read_checkpoint_config(M3_8L / name), TARGET)
    for name in ("draft-mha", "draft-gqa")
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_model_allocates_its_table_and_nothing_else(dtype):
    meta = torch.device("meta")
    own = str(dtype).removeprefix("torch.")
    models = [
        (target_weights(spec), MiniMaxM3(spec, (), device=meta, dtype=dtype, max_positions=8))
        for spec in (
            TARGET,
            replace(TARGET, tie_word_embeddings=True, use_routing_bias=False),
            replace(TARGET, sparse_layers=(False,) * 8, moe_layers=(True,) * 8),
        )
    ]
    models += [
        (draft_weights(spec), Eagle3Llama(spec, device=meta, dtype=dtype, max_positions=8))
        for spec in (
            MHA,
            replace(GQA, fc_norm=False, norm_before_fc=True, attention_bias=True),
            replace(GQA, tie_word_embeddings=True),
            replace(GQA, draft_vocab_size=32000),
            replace(GQA, fc_norm=False, use_aux_hidden_state=False, taps=(8,)),
        )
    ]
    for table, model in models:
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {name: (tuple(t.shape), str(t.dtype)) for name, t in held.items()} == {
            weight.name: (weight.shape(), f"torch.{weight.format.held[own]}")
            for weight in table.weights.values()
        }
        assert sum(t.nbytes for t in held.values()) == sum(
            weight.format.num_bytes(held[weight.name].numel(), own)
            for weight in table.weights.values()
        )
    gate = models[0][1].get_parameter("layers.3.mlp.gate.weight")
    assert gate.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    d2t = models[6][1].get_buffer("d2t")
    assert (tuple(d2t.shape), d2t.dtype) == ((32000,), torch.int64)


@pytest.mark.parametrize("whole_experts", [False, True])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4), (7, 8)])
def test_a_rank_allocates_its_share(rank, size, whole_experts):
    """Of the published widths: the table's shapes, and the rows that a projection is cut at."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    share = Share(rank, size, whole_experts)
    target = MiniMaxM3(TARGET, (), device=meta, dtype=dtype, max_positions=8, share=share)
    drafts = [
        Eagle3Llama(spec, device=meta, dtype=dtype, max_positions=8, share=share)
        for spec in (MHA, GQA)
    ]
    tables = (
        target_weights(TARGET, whole_experts),
        *(draft_weights(spec, whole_embedding=True) for spec in (MHA, GQA)),
    )
    for table, model in zip(tables, (target, *drafts), strict=True):
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        assert {name: tuple(tensor.shape) for name, tensor in held.items()} == {
            weight.name: weight.shape(rank, size) for weight in table.weights.values()
        }
    q, kv = 8192 // size, max(512 // size, 128)
    attention = target.get_submodule("layers.5.self_attn")
    assert attention.main_rows == q + 2 * kv
    assert attention.qkv_proj.weight.shape[0] == q + 3 * kv + 128
    for draft, kv_rows in zip(drafts, (q, kv), strict=True):
        own = draft.layer.self_attn
        assert (own.q_rows, own.all_rows) == (q, q + 2 * kv_rows)
        assert draft.embed_tokens.weight.shape == (200064, 6144)
        assert draft.lm_head.weight.shape == (200064 // size, 6144)
