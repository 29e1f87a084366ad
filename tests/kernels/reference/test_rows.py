"""Norms, rotation and activations against torch.nn.functional, transformers and the fact sheet."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLDenseMLP,
    MiniMaxM3VLRMSNorm,
    MiniMaxM3VLRotaryEmbedding,
    apply_rotary_pos_emb,
)

from eaglerun.kernels.reference import remember_last
from eaglerun.kernels.reference.draft_fuse import embed_dual_rmsnorm, group_rmsnorm
from eaglerun.kernels.reference.rmsnorm import (
    add_gemma_rmsnorm,
    add_rmsnorm,
    gemma_rmsnorm,
    rmsnorm,
)
from eaglerun.kernels.reference.rope import rope, rope_table
from eaglerun.kernels.reference.swiglu_oai import swiglu, swiglu_oai

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def close(ours, theirs):
    """Equal to one unit in the last place of a 16-bit float, to rounding for the wide ones."""
    assert ours.dtype == theirs.dtype
    wide = {torch.float64: 1e-12, torch.float32: 2e-6}
    tolerance = wide.get(ours.dtype, 2 * torch.finfo(ours.dtype).eps)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 7), (3, 128), (2, 5, 16)])
def test_norms(shape, dtype):
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1:]).to(dtype)
    theirs = F.rms_norm(x.double(), shape[-1:], weight.double(), 1e-6)
    close(rmsnorm(x, weight, 1e-6), theirs.to(dtype))
    module = MiniMaxM3VLRMSNorm(shape[-1], 1e-6)
    with torch.no_grad():
        module.weight.copy_(weight)
        theirs = module(x.float() if dtype == torch.float64 else x)
        if dtype == torch.float64:  # transformers computes in float32
            close(gemma_rmsnorm(x, weight, 1e-6).float(), theirs)
        else:
            close(gemma_rmsnorm(x, weight, 1e-6), theirs)
    ours = gemma_rmsnorm(x, torch.zeros_like(weight), 1e-6)
    assert torch.equal(ours, rmsnorm(x, torch.ones_like(weight), 1e-6)), "zero is the identity"


@pytest.mark.parametrize("dtype", DTYPES)
def test_added_norms_read_the_rounded_sum(dtype):
    x, residual = torch.randn(2, 5, 24).to(dtype)
    weight = torch.randn(24).to(dtype)
    total = (x.double() + residual.double()).to(dtype)
    for add, norm in ((add_rmsnorm, rmsnorm), (add_gemma_rmsnorm, gemma_rmsnorm)):
        y, completed = add(x, residual, weight, 1e-5)
        assert torch.equal(completed, total)
        assert torch.equal(y, norm(total, weight, 1e-5))


def test_fused_norms_are_norms_side_by_side():
    aux, weight = torch.randn(3, 9, 16)[:, :5], torch.randn(3, 16)
    theirs = [F.rms_norm(a, (16,), w, 1e-6) for a, w in zip(aux, weight, strict=True)]
    ours = group_rmsnorm(aux.transpose(0, 1), weight, 1e-6)
    assert ours.is_contiguous()
    close(ours, torch.cat(theirs, dim=1))
    ids = torch.tensor([2, 0, 4, 4, 1])
    embeds = F.rms_norm(aux[0][ids], (16,), weight[0], 1e-6)
    joined = embed_dual_rmsnorm(ids, aux[0], aux[1], *weight[:2], 1e-6)
    close(joined, torch.cat((embeds, theirs[1]), dim=1))


@pytest.mark.parametrize(
    "call",
    [
        lambda: rmsnorm(torch.ones(2, 4), torch.ones(3), 1e-6),
        lambda: gemma_rmsnorm(torch.ones(2, 4), torch.ones(1, 1, 4), 1e-6),
        lambda: add_rmsnorm(torch.ones(2, 4), torch.ones(1, 4), torch.ones(4), 1e-6),
        lambda: group_rmsnorm(torch.ones(2, 3, 4), torch.ones(2, 4), 1e-6),
        lambda: embed_dual_rmsnorm(
            torch.zeros(2).long(),
            torch.ones(3, 4),
            torch.ones(2, 5),
            torch.ones(4),
            torch.ones(4),
            1,
        ),
        lambda: rope(torch.ones(1, 1, 4), torch.zeros(1).long(), torch.ones(3, 6)),
        lambda: rope_table(4, 5, 1e4, CPU, torch.float32),
        lambda: swiglu_oai(torch.ones(1, 3), 1.0, 1.0, 1.0),
    ],
)
def test_shapes_that_do_not_fit(call):
    with pytest.raises(ValueError, match=r"\d"):
        call()


def test_angles_of_the_fact_sheet():
    table = rope_table(2, 64, 5e6, CPU, torch.float64)
    angles = torch.atan2(table[1, 32:], table[1, :32])
    known = {0: 1.0, 1: 0.6175287581263234, 2: 0.38134176711303913, 16: 4.472135955e-04}
    known[31] = 3.2387155637387736e-07
    for j, angle in known.items():
        assert angles[j].item() == pytest.approx(angle, rel=1e-9)
    table = rope_table(2, 128, 5e6, CPU, torch.float64)
    assert torch.atan2(table[1, 65], table[1, 1]).item() == pytest.approx(0.7858299804196346)
    assert table[1, 127].asin().item() == pytest.approx(2.545079788e-07)
    assert table[0].tolist() == [1.0] * 64 + [0.0] * 64


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_rope_is_that_of_transformers(factor):
    config = MiniMaxM3VLTextConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": factor,
        },
    )
    positions = torch.tensor([0, 1, 17, 3000])
    q, k = torch.randn(4, 4, 16), torch.randn(4, 2, 16)
    cos, sin = MiniMaxM3VLRotaryEmbedding(config)(q, positions[None])
    theirs = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    table = rope_table(4096, int(16 * factor), 1e4, CPU, torch.float32)
    for ours, other in zip((q, k), theirs, strict=True):
        close(rope(ours, positions, table), other[0].transpose(0, 1))


def test_rope_turns_complex_numbers_and_clamps_positions():
    table = rope_table(10, 6, 100.0, CPU, torch.float64)
    x = torch.randn(4, 2, 9).double()
    rows = [0, 3, 9, 9]
    turned = rope(x, torch.tensor([-1, 3, 9, 40]), table)
    for n, position in enumerate(rows):
        for j in range(3):
            pair = torch.complex(x[n, :, j], x[n, :, j + 3])
            pair = pair * cmath.exp(1j * position * 100.0 ** (-2 * j / 6))
            close(turned[n, :, j], pair.real)
            close(turned[n, :, j + 3], pair.imag)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    low = x.bfloat16()
    theirs = rope(low.double(), torch.tensor(rows), table).bfloat16()
    close(rope(low, torch.tensor(rows), rope_table(10, 6, 100.0, CPU, torch.float32)), theirs)


@pytest.mark.parametrize(
    "gate, up, value",
    [
        (1, 1, 1.6915915318656425),
        (10, 9, 55.99962502642654),
        (-3, 2, -0.0542139291233579),
        (0.5, -1, 0.0),
        (-20, -9, 1.9760461448396248e-13),
    ],
)
def test_swiglu_oai_of_the_fact_sheet(gate, up, value):
    row = torch.tensor([[gate, up]], dtype=torch.float64)
    assert swiglu_oai(row, 1.702, 7.0, 1.0).item() == pytest.approx(value, rel=1e-12, abs=1e-18)


def test_swiglu_is_that_of_transformers_and_of_llama():
    config = MiniMaxM3VLTextConfig(hidden_size=8, swiglu_alpha=1.3, swiglu_limit=0.9)
    mlp = MiniMaxM3VLDenseMLP(config, intermediate_size=4)
    x = torch.randn(6, 8) * 3
    with torch.no_grad():
        gate_up = mlp.gate_up_proj(x)
        close(mlp.down_proj(swiglu_oai(gate_up, 1.3, 0.9, 1.0)), mlp(x))
    close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_remember_last_answers_as_the_function(questions):
    tensors = [torch.tensor(float(i)) for i in range(3)]
    calls = []

    @remember_last
    def pair(t, n):
        calls.append((t, n))
        return t.item(), n

    for i, n in questions:
        assert pair(tensors[i], n) == (float(i), n)
    repeats = sum(a == b for a, b in zip(questions, questions[1:], strict=False))
    assert len(calls) == len(questions) - repeats
