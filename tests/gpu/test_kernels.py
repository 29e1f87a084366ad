"""Kernels on a GPU at M3's shapes: against references, alone and among others, and in a graph.

tests/kernels runs there too, on small and odd shapes.
"""

import pytest
import torch
from paged import cut

from eaglerun.bench.kernels import (
    DIM,
    EXPERTS,
    FAMILIES,
    GROUPS,
    HEADS,
    HIDDEN,
    WIDTH,
    error_of,
    new_layer,
    paged,
    randn,
)
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.launch import overlapping
from eaglerun.kernels.linear import linear
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rmsnorm import add_gemma_rmsnorm
from eaglerun.kernels.rows import Experts, Routing

pytestmark = pytest.mark.gpu
ACTIVATION = (1.702, 7.0, 1.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_case_of_the_benchmark(family):
    red = []
    for case in family():
        error = error_of(case, case.inputs[0])
        if error > case.tolerance:
            red.append(f"{case.name}: {error:.2g}")
    assert not red


def experts(count):
    w13 = torch.stack([randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5) for _ in range(count)])
    w2 = torch.stack([randn(HIDDEN, WIDTH, scale=WIDTH**-0.5) for _ in range(count)])
    return Experts(w13, w2)


def shared_expert():
    up = randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    return up, randn(HIDDEN, WIDTH, scale=WIDTH**-0.5)


def routing(rows, count):
    ids = torch.rand(rows, count, device="cuda").argsort(dim=1)[:, :4].int().contiguous()
    return Routing(ids, torch.rand(rows, 4, device="cuda"))


def first(routing, rows):
    return Routing(*(t[rows] for t in routing))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_an_moe_row_does_not_depend_on_its_neighbours(rows):
    layer, x, routed = experts(16), randn(32, HIDDEN), routing(32, 16)
    whole = moe_gemm.kernel(x, routed, layer, *ACTIVATION)
    part = slice(5, 5 + rows)
    some = moe_gemm.kernel(x[part], first(routed, part), layer, *ACTIVATION)
    assert torch.equal(some, whole[part])


@pytest.mark.parametrize("uneven", [False, True])
def test_bits_do_not_depend_on_tiles_nor_on_the_shared_experts_way(uneven):
    """Up to 16 rows the shared expert is one tile, then a layer of its own, of more than 64 by the
    library; tiles grow from 33 rows of 64 experts on."""
    layer = experts(64)
    both = Experts(*layer[:2], *shared_expert())
    x, (ids, weights) = randn(128, HIDDEN), routing(128, 64)
    if uneven:
        # Expert 3 in every row: more than a tile of it.
        ids = torch.where(ids == 3, ids[:, :1], ids)
        ids[:, 0] = 3
    routed = Routing(ids, weights)
    whole = moe_gemm.kernel(x, routed, layer, *ACTIVATION)
    layered = moe_gemm.kernel(x[:64], first(routed, slice(64)), both, *ACTIVATION)
    for n in (1, 2, 16, 17, 64, 65, 128):
        some = (x[:n], first(routed, slice(n)))
        assert torch.equal(moe_gemm.kernel(*some, layer, *ACTIVATION), whole[:n]), n
        if n <= 64:
            assert torch.equal(moe_gemm.kernel(*some, both, *ACTIVATION), layered[:n]), n


@pytest.mark.parametrize("rows", [1, 4])
def test_overlapping_kernels_say_the_same(rows):
    """A chain of small kernels and products, eager and in a graph, with and without."""
    weight, back = randn(9856, HIDDEN, scale=0.02), randn(HIDDEN, 9856, scale=0.01)
    layer = Experts(*experts(8)[:2], *shared_expert())
    gate, norm = randn(8, HIDDEN, dtype=torch.float32), randn(HIDDEN, scale=0.1)
    first = randn(rows, HIDDEN)
    positions = torch.arange(rows, device="cuda")

    def chain():
        x, residual = first, first
        for _ in range(6):
            y, residual = add_gemma_rmsnorm.kernel(x, residual, norm, 1e-6)
            x = linear.kernel(linear.kernel(y, weight), back)
            y, residual = add_gemma_rmsnorm.kernel(x, residual, norm, 1e-6)
            routed = moe_route.kernel(y, gate, None, positions, 4, 2.0)
            x = moe_gemm.kernel(y, routed, layer, *ACTIVATION)
        return x

    expected = chain()
    with overlapping(True):
        for _ in range(5):
            assert torch.equal(chain(), expected)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = chain()
    for seed in range(20):
        if seed % 2:
            first.copy_(randn(rows, HIDDEN))
        graph.replay()
        assert torch.equal(out, chain()), seed


@pytest.mark.parametrize("columns", [HIDDEN, 9856, 24576])
def test_a_projected_row_does_not_depend_on_its_neighbours(columns):
    """Of one round of programs, of two, and of more."""
    x, weight = randn(64, HIDDEN), randn(columns, HIDDEN, scale=0.02)
    whole = linear.kernel(x, weight)
    for n in (1, 4, 16, 17, 40):
        assert torch.equal(linear.kernel(x[:n], weight), whole[:n]), n


def test_a_routed_row_does_not_depend_on_its_neighbours():
    x, gate = randn(64, HIDDEN), randn(EXPERTS, HIDDEN, scale=0.02, dtype=torch.float32)
    positions = torch.arange(64, device="cuda")
    ids, weights = moe_route.kernel(x, gate, None, positions, 4, 2.0)
    for n in (1, 7, 33):
        part = moe_route.kernel(x[:n], gate, None, positions[:n], 4, 2.0)
        assert torch.equal(part[0], ids[:n]) and torch.equal(part[1], weights[:n])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_sequence_does_not_depend_on_its_neighbours(rows):
    (where,), order = paged(8, rows, 3000, GROUPS, 1)
    kv = new_layer(len(order), GROUPS)
    q = randn(8 * rows, HEADS, DIM)
    whole = attention_dense.kernel(q, kv, where, 0.1)
    first = cut(where, slice(rows), slice(1))._replace(max_seq_len=100_000)
    alone = attention_dense.kernel(q[:rows], kv, first, 0.1)
    assert torch.equal(alone, whole[:rows])


def test_routing_differs_only_where_scores_are_as_close_as_their_error():
    x, gate = randn(8192, HIDDEN), randn(EXPERTS, HIDDEN, scale=0.02, dtype=torch.float32)
    positions = torch.arange(8192, device="cuda")
    ids, _ = moe_route.kernel(x, gate, None, positions, 4, 2.0)
    scores = (x.double() @ gate.double().t()).sigmoid()
    best = scores.topk(4, dim=1).values
    chosen = scores.gather(1, ids.long())
    assert (best - chosen).abs().max() < 1e-6


def test_a_graph_replays_with_new_inputs():
    """Routing and lengths change between replays; no launch depends on them."""
    layer, x, routed = experts(16), randn(8, HIDDEN), routing(8, 16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        moe_gemm.kernel(x, routed, layer, *ACTIVATION)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = moe_gemm.kernel(x, routed, layer, *ACTIVATION)
    for _ in range(3):
        fresh, (new_ids, new_weights) = randn(8, HIDDEN), routing(8, 16)
        new_ids[-2:] = -1
        x.copy_(fresh), routed.ids.copy_(new_ids), routed.weights.copy_(new_weights)
        graph.replay()
        assert torch.equal(out, moe_gemm.kernel(x, routed, layer, *ACTIVATION))
        assert out[-2:].eq(0).all()
