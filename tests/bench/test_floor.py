"""Bytes and operations, against figures worked out by hand from the model's widths."""

from pathlib import Path

import pytest

from eaglerun.bench.floor import Product, arithmetic_s, prefill_flops, step_bytes, step_products
from eaglerun.checkpoint.budget import kv_budget
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.target import TargetSpec

M3_8L = Path(__file__).parents[2] / "configs" / "m3-8l"
TARGET = TargetSpec.from_config(read_checkpoint_config(M3_8L / "target"))
DRAFT = DraftSpec.from_config(read_checkpoint_config(M3_8L / "draft-gqa"), TARGET)
KV = kv_budget(TARGET, DRAFT)
EXPERT = 3 * 6144 * 3072 * 2
MAIN = 2 * 4 * 128 * 2  # K and V of a token in a layer


def test_a_plain_step_reads_its_weights_once_and_the_experts_it_hits():
    least = step_bytes(TARGET, None, KV, "bfloat16", 0, 4.0, 1, 1000)
    assert least.weights == pytest.approx(6.15e9 + 5 * 4 * EXPERT, rel=2e-3)
    more = step_bytes(TARGET, None, KV, "bfloat16", 0, 5.0, 1, 1000)
    assert more.weights - least.weights == pytest.approx(5 * EXPERT)
    assert least.moe == pytest.approx(5 * (4 + 1) * EXPERT, rel=2e-2), "and the shared one"
    assert sum(least.by_group().values()) == least.weights + least.kv


def test_a_round_of_the_draft_reads_fc_once_and_its_layer_and_head_each_pass():
    plain = step_bytes(TARGET, DRAFT, KV, "bfloat16", 0, 4.0, 1, 1000)
    three = step_bytes(TARGET, DRAFT, KV, "bfloat16", 3, 4.0, 1, 1000)
    assert three.weights - plain.weights == pytest.approx(10.6e9, rel=5e-3)
    assert plain == step_bytes(TARGET, None, KV, "bfloat16", 0, 4.0, 1, 1000)


def test_keys_are_read_whole_by_dense_layers_and_as_selected_by_sparse_ones():
    short = step_bytes(TARGET, None, KV, "bfloat16", 0, 4.0, 2, 2048)
    assert (short.index_scan, short.sparse_attention) == (0, 0)
    assert short.dense_attention == 2 * 2048 * 8 * MAIN
    long = step_bytes(TARGET, None, KV, "bfloat16", 0, 4.0, 2, 8192)
    assert long.dense_attention == 2 * 8192 * 3 * MAIN
    assert long.sparse_attention == 2 * 2048 * 5 * MAIN
    assert long.index_scan == 2 * 8192 * 5 * 128 * 2
    drafting = step_bytes(TARGET, DRAFT, KV, "bfloat16", 3, 4.0, 2, 8192)
    assert drafting.kv - long.kv == 3 * 2 * 8192 * MAIN


def test_many_rows_cost_arithmetic_beyond_their_bytes():
    """All of the target but its experts takes every row; the draft's layer one a sequence."""
    found = step_products(TARGET, None, "bfloat16", 3, 64)
    attention = 8 * 6144 * (8192 * 2 + 512 * 2) + 5 * 6144 * 640
    mlp = 3 * 3 * 6144 * 12288 + 5 * 3 * 6144 * 3072
    router = 5 * (128 * 6144 + 128)
    weights = attention + mlp + router + 6144 * 200064
    assert sum(p.num_flops for p in found) == pytest.approx(2 * 256 * weights)
    both = step_products(TARGET, DRAFT, "bfloat16", 3, 64)
    fc, rest = 3 * 6144 * 6144, sum(p.num_flops for p in both) - sum(p.num_flops for p in found)
    layer = 2 * 6144 * (8192 + 1024) + 6144 * 8192 + 3 * 6144 * 18432 + 6144 * 200064
    assert rest == pytest.approx(2 * 256 * fc + 3 * 2 * 64 * layer)
    # Of a weight 2 * 256 / 790 TFLOP/s against 2 bytes / 4350 GB/s; the router's are 4 bytes.
    exact = (weights - router) * (512 / 790e12 - 2 / 4.35e12)
    assert arithmetic_s(found, 4.35e12, 790e12) == pytest.approx(exact)
    assert arithmetic_s(step_products(TARGET, DRAFT, "bfloat16", 3, 16), 4.35e12, 790e12) == 0
    assert arithmetic_s([Product(10, 4), Product(1, 8)], 1, 2) == pytest.approx(3)


def test_a_prefill_by_hand():
    """Row by row over 2,060 tokens, the last 12 of which score the blocks before them."""
    length = 2060
    dense = sparse = scan = 0.0
    for t in range(length):
        seen = t + 1
        dense += 3 * 4 * 64 * 128 * seen
        sparse += 5 * 4 * 64 * 128 * min(seen, 2048)
        scan += 5 * 2 * 4 * 128 * seen if seen > 2048 else 0
    found = prefill_flops(TARGET, None, length)
    assert found.dense_attention == pytest.approx(dense)
    assert found.sparse_attention == pytest.approx(sparse)
    assert found.index_scan == pytest.approx(scan)
    attention = 8 * 6144 * (8192 * 2 + 512 * 2) + 5 * 6144 * 640
    shared = 5 * 3 * 6144 * 3072
    mlp = 3 * 3 * 6144 * 12288
    head = 6144 * 200064
    assert found.linear == pytest.approx(2 * (length * (attention + mlp) + head))
    router = 5 * (128 * 6144 + 128)
    assert found.moe == pytest.approx(2 * length * (5 * 4 * 3 * 6144 * 3072 + shared + router))
    parts = found.linear + found.moe + dense + sparse + scan
    assert found.total == pytest.approx(parts)


def test_the_drafts_kv_costs_fc_and_its_keys_and_values():
    more = prefill_flops(TARGET, DRAFT, 100).total - prefill_flops(TARGET, None, 100).total
    assert more == pytest.approx(2 * 100 * (3 * 6144 * 6144 + 2 * 6144 * 2 * 512))
