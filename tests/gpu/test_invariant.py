"""A batch-invariant engine at M3's shapes: bits of rows, and whole answers in bf16."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpu.test_kernels import ACTIVATION, experts, first, routing, shared_expert
from lossless_check import check
from paged import cut
from pairs import draft_spec, target_spec, tiny_draft, tiny_target

from eaglerun.bench.kernels import (
    DIM,
    EXPERTS,
    GROUPS,
    HEADS,
    HIDDEN,
    new_layer,
    paged,
    randn,
)
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.launch import invariant
from eaglerun.kernels.linear import linear
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rows import Experts
from eaglerun.loader import Models

pytestmark = pytest.mark.gpu
# Products of a layer (qkv, o_proj, shared, dense) by output and input width.
PRODUCTS = ((9856, 6144), (9216, 6144), (6144, 8192), (6144, 6144), (6144, 3072), (24576, 6144),
            (6144, 12288))  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize("out, width", PRODUCTS)
def test_products(out: int, width: int):
    """The kernel's rows up to 64, the library's above, however many."""
    x, weight = randn(8192, width), randn(out, width, scale=width**-0.5)
    with invariant(True):
        few = torch.cat([linear.kernel(x[n : n + 64], weight) for n in range(0, 512, 64)])
        chosen = torch.randint(65, 8192, (40,), generator=torch.Generator().manual_seed(1)).tolist()
        for rows in (65, 72, 96, 100, 128, 160, 200, 256, 320, 400, 512, *chosen, 8192):
            some = linear.kernel(x[:rows], weight)[:512]
            assert torch.equal(some, few[:rows]), rows
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction_split_k
    assert torch.backends.cuda.preferred_blas_library() == torch._C._BlasBackend.Cublas


def test_the_head():
    x, weight = randn(512, HIDDEN), randn(200064, HIDDEN, scale=HIDDEN**-0.5)
    with invariant(True):
        few = torch.cat([linear.kernel(x[n : n + 64], weight) for n in range(0, 512, 64)])
        for rows in (65, 96, 256, 512):
            assert torch.equal(linear.kernel(x[:rows], weight), few[:rows]), rows


@pytest.mark.parametrize("rows", [2, 4, 8])
def test_drafted_rows_are_plain_rows(rows: int):
    for length, bound in ((1280, 2048), (1280, 131072), (20000, 131072)):
        (where,), order = paged(16, rows, length, GROUPS, 1)
        kv, bounded = new_layer(len(order), GROUPS), where._replace(max_seq_len=bound)
        q = randn(16 * rows, HEADS, DIM)
        with invariant(True):
            whole = attention_dense.kernel(q, kv, bounded, 0.1)
            for row in range(rows):
                one = slice(row, None, rows)
                alone = attention_dense.kernel(q[one], kv, cut(where, one), 0.1)
                assert torch.equal(alone, whole[one]), (length, row)
            if length <= 2048:
                c = torch.arange(16, device="cuda")
                ids = torch.where(c <= where.positions[:, None] // 128, c, -1).int()
                ids = ids[:, None].expand(-1, GROUPS, -1).contiguous()
                sparse = attention_sparse.kernel(q, kv, ids, bounded, 0.1)
                assert torch.equal(sparse, whole)


def test_routed_rows():
    x, gate = randn(8192, HIDDEN), randn(EXPERTS, HIDDEN, scale=0.02, dtype=torch.float32)
    positions = torch.arange(8192, device="cuda")
    with invariant(True):
        ids, weights = moe_route.kernel(x, gate, None, positions, 4, 2.0)
        for n in (1, 16, 64, 65, 256, 1000):
            some = moe_route.kernel(x[:n], gate, None, positions[:n], 4, 2.0)
            assert torch.equal(some[0], ids[:n]) and torch.equal(some[1], weights[:n]), n


def test_rows_of_experts():
    layer = Experts(*experts(32)[:2], *shared_expert())
    x, routed = randn(4096, HIDDEN), routing(4096, 32)
    with invariant(True):
        whole = moe_gemm.kernel(x, routed, layer, *ACTIVATION)
        for n in (1, 4, 16, 17, 64, 65, 256, 300, 700, 1000):
            some = moe_gemm.kernel(x[:n], first(routed, slice(n)), layer, *ACTIVATION)
            assert torch.equal(some, whole[:n]), n


def wide_pair() -> Models:
    """In bf16, sparse blocks of M3's size, widths for which the library takes its own kernels."""
    target = replace(
        target_spec(vocab_size=4096, block_size=128, num_layers=4, hidden_size=1024),
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=128,
        rotary_dim=64,
        index_head_dim=128,
        num_experts=16,
        num_experts_per_tok=4,
        expert_intermediate_size=512,
        shared_intermediate_size=512,
        dense_intermediate_size=2048,
        max_position_embeddings=4096,
    )
    draft = draft_spec(target, head_dim=128, intermediate_size=1024, max_position_embeddings=4096)
    made = tiny_target(0, target, draft.taps, torch.bfloat16, context=1.0)
    drafts = tiny_draft(1, draft, made, torch.bfloat16)
    return Models("tiny", made.to("cuda"), drafts.to("cuda"), (0,))


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_answers_in_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, eager: bool):
    """Contexts from one block to ten, of which three are selected; prompts in chunks that other
    sequences' rows cut differently with each K."""
    models = wide_pair()
    flags = ["--num-drafts=0,1,3,7", "--acceptance=0.7", "--num-prompts=48", "--max-num-seqs=24"]
    flags += ["--input-lens=20,1200", "--output-len=32", "--max-num-batched-tokens=1024"]
    flags += ["--batch-invariant"] + ["--enforce-eager"] * eager
    code, rows = check(monkeypatch, tmp_path, torch.bfloat16, *flags, device="cuda", models=models)
    assert code == 0
    assert [row["identical"] for row in rows] == [48] * 4
