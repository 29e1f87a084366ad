"""Router and experts against transformers' modules and against loops."""

import pytest
import torch
from torch.nn import functional as F
from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLSparseMoeBlock

from eaglerun.kernels.reference.moe_gemm import moe_gemm
from eaglerun.kernels.reference.moe_route import moe_route
from eaglerun.kernels.reference.swiglu_oai import swiglu_oai
from eaglerun.kernels.rows import Experts, Routing

ACTIVATION = (1.702, 7.0, 1.0)


def test_router_of_the_fact_sheet():
    logits = torch.tensor([[2.0, 1, 0, -1, 3, -2]], dtype=torch.float64)
    bias = torch.tensor([0, 0, 0.5, 0, -1, 0.9], dtype=torch.float64)
    ids, weights = moe_route(
        logits, torch.eye(6, dtype=torch.float64), bias, torch.tensor([0]), 4, 2.0
    )
    assert ids.dtype == torch.int32 and weights.dtype == torch.float64
    known = {5: 0.1069, 2: 0.4482, 0: 0.7896, 1: 0.6553}
    for e, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True):
        assert w == pytest.approx(known.pop(e), abs=5e-5)
    assert not known
    assert weights.sum().item() == pytest.approx(2.0)


def test_lower_ids_win_ties_and_padding_visits_nothing():
    x = torch.randn(5, 3)
    x[1] = torch.nan
    positions = torch.tensor([4, -1, 0, 2, 9])
    count = torch.tensor([10])
    ids, weights = moe_route(x, torch.zeros(7, 3), None, positions, 3, 1.5, count)
    assert ids.tolist() == [[0, 1, 2], [-1, -1, -1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert weights.tolist() == [[0.5] * 3, [0.0] * 3, [0.5] * 3, [0.5] * 3, [0.5] * 3]
    assert count.item() == 13
    moe_route(x, torch.zeros(7, 3), None, torch.full((5,), -1), 3, 1.5, count)
    assert count.item() == 13


def test_distinct_experts_are_counted():
    gate = torch.randn(16, 8)
    x, positions = torch.randn(6, 8), torch.tensor([0, 1, -1, 3, -1, 5])
    count = torch.zeros(1, dtype=torch.int64)
    ids, _ = moe_route(x, gate, torch.randn(16), positions, 4, 1.0, count)
    assert count.item() == len(set(ids.flatten().tolist()) - {-1})


def test_more_experts_than_there_are():
    with pytest.raises(ValueError, match="top 5 of 4"):
        moe_route(torch.ones(1, 2), torch.ones(4, 2), None, torch.zeros(1).long(), 5, 1.0)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("experts, topk", [(8, 2), (5, 5), (16, 4)])
def test_block_of_transformers(rows, experts, topk):
    config = MiniMaxM3VLTextConfig(
        hidden_size=24,
        intermediate_size=12,
        shared_intermediate_size=20,
        num_local_experts=experts,
        num_experts_per_tok=topk,
        routed_scaling_factor=2.0,
        swiglu_limit=1.0,
    )
    block = MiniMaxM3VLSparseMoeBlock(config)
    x, positions = torch.randn(rows, 24), torch.arange(rows)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.5)
        block.gate.e_score_correction_bias.normal_(0, 0.3)
        theirs = block(x[None])[0]
        gate, routed = block.gate, block.experts
        routing = moe_route(x, gate.weight, gate.e_score_correction_bias, positions, topk, 2.0)
        w13, w2 = routed.gate_up_proj, routed.down_proj
        own = block.shared_experts
        layer = (own.gate_up_proj.weight, own.down_proj.weight)
        ours = moe_gemm(x, routing, Experts(w13, w2, *layer), 1.702, 1.0, 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        alone = moe_gemm(x, routing, Experts(w13, w2), 1.702, 1.0, 1.0)
        torch.testing.assert_close(alone + own(x), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_one_pair_at_a_time(dtype):
    """Padding, an expert twice in a row, unused experts, rounding of the activation and the sum."""
    w13, w2 = torch.randn(6, 10, 8).to(dtype), torch.randn(6, 8, 5).to(dtype)
    x = torch.randn(4, 8).to(dtype)
    layer = (torch.randn(6, 8).to(dtype), torch.randn(8, 3).to(dtype))
    # The shared expert: each step of a layer rounds.
    gate_up = F.linear(x.double(), layer[0].double()).to(dtype).double()
    shared = swiglu_oai(gate_up, *ACTIVATION).to(dtype).double()
    shared = F.linear(shared, layer[1].double()).to(dtype)
    ids = torch.tensor([[5, 0], [3, 3], [-1, -1], [0, -1]], dtype=torch.int32)
    weights = torch.rand(4, 2, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weights[ids < 0] = 0
    expected = shared.double().clone()
    for n, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            if e >= 0:
                gate_up = F.linear(x[n].double(), w13[e].double())
                a = swiglu_oai(gate_up[None], *ACTIVATION)[0].to(dtype).double()
                expected[n] += weights[n, j].double() * F.linear(a, w2[e].double())
    routing = Routing(ids, weights)
    ours = moe_gemm(x, routing, Experts(w13, w2, *layer), *ACTIVATION)
    assert ours.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2**-7
    torch.testing.assert_close(ours, expected.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours[2], shared[2], rtol=tolerance, atol=tolerance)
    x[2] = torch.nan
    assert moe_gemm(x, routing, Experts(w13, w2), *ACTIVATION)[2].eq(0).all()


def test_no_pairs_at_all():
    layer = Experts(torch.randn(3, 4, 8), torch.randn(3, 8, 2))
    for x in (torch.randn(0, 8), torch.full((2, 8), torch.nan)):
        ids = torch.full((len(x), 2), -1, dtype=torch.int32)
        out = moe_gemm(x, Routing(ids, torch.zeros(len(x), 2)), layer, *ACTIVATION)
        assert out.shape == x.shape and out.eq(0).all()
    with pytest.raises(ValueError, match="moe_gemm"):
        moe_gemm(torch.ones(1, 8), Routing(ids[:1], torch.zeros(1, 3)), layer, *ACTIVATION)
