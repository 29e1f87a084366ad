"""The budget is that of the published models: parameters, bytes on disk, KV bytes."""

from dataclasses import replace

import pytest

from eaglerun.checkpoint.budget import (
    MemoryUse,
    draft_components,
    format_budget,
    graph_outputs,
    kv_budget,
    size_kv,
    target_components,
)
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import Share
from eaglerun.errors import CapacityError

TARGET = TargetSpec(
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
GQA = replace(MHA, num_key_value_heads=4)


def parameters(components) -> dict[str, int]:
    return {c.name: c.num_parameters for c in components}


def total_bytes(components) -> int:
    return sum(c.num_bytes for c in components)


def test_target_parameters():
    counts = parameters(target_components(TARGET))
    assert counts == {
        "embedding": 1_229_193_216,
        "attention": 6_417_285_120,
        "index": 224_133_120,
        "dense MLP": 679_477_248,
        "routed experts": 413_122_166_784,
        "shared experts": 3_227_516_928,
        "router": 44_826_624 + 7_296,
        "norms": 773_376,
        "lm_head": 1_229_193_216,
    }
    assert sum(counts.values()) == 426_174_572_928


def test_target_bytes():
    gigabytes = {c.name: c.num_bytes / 1e9 for c in target_components(TARGET)}
    assert gigabytes["routed experts"] == pytest.approx(826.244, abs=5e-4)
    assert gigabytes["shared experts"] == pytest.approx(6.455, abs=5e-4)
    assert gigabytes["attention"] + gigabytes["index"] == pytest.approx(13.283, abs=5e-4)
    assert gigabytes["dense MLP"] == pytest.approx(1.359, abs=5e-4)
    assert gigabytes["embedding"] + gigabytes["lm_head"] == pytest.approx(4.917, abs=5e-4)
    assert gigabytes["router"] == pytest.approx(0.179, abs=5e-4)
    assert sum(gigabytes.values()) == pytest.approx(852.439, abs=5e-4)


def test_router_is_never_narrower_than_float32():
    for dtype, size in (("bfloat16", 4), ("float32", 4), ("float64", 8)):
        [router] = (c for c in target_components(TARGET, dtype) if c.name == "router")
        assert router.num_bytes == size * router.num_parameters
    assert total_bytes(target_components(TARGET, "float32")) == 4 * 426_174_572_928


def test_switches_of_the_target():
    counts = parameters(
        target_components(replace(TARGET, use_routing_bias=False, tie_word_embeddings=True))
    )
    assert counts["router"] == 44_826_624
    assert counts["lm_head"] == 0


@pytest.mark.parametrize(
    ("spec", "count", "num_bytes"),
    [(MHA, 3_263_735_808, 6_527_471_616), (GQA, 3_074_992_128, 6_149_984_256)],
)
def test_draft(spec, count, num_bytes):
    components = draft_components(spec)
    assert sum(c.num_parameters for c in components) == count
    assert total_bytes(components) == num_bytes
    assert parameters(components)["norms"] == 7 * 6144


def test_switches_of_the_draft():
    counts = parameters(draft_components(MHA))
    joined = replace(MHA, fc_norm=False, norm_before_fc=True)
    assert parameters(draft_components(joined)) == counts
    bare = replace(MHA, fc_norm=False, draft_vocab_size=32000, attention_bias=True)
    changes = parameters(draft_components(bare)).items() - counts.items()
    assert dict(changes) == {
        "norms": 4 * 6144,
        "head": 32000 * 6144,
        "attention": counts["attention"] + 3 * 8192,
    }
    no_fc = replace(MHA, fc_norm=False, use_aux_hidden_state=False, taps=(60,))
    assert parameters(draft_components(replace(no_fc, tie_word_embeddings=True))) == counts | {
        "fc": 0,
        "norms": 4 * 6144,
        "head": 0,
    }


def test_kv_bytes():
    kv = kv_budget(TARGET, MHA)
    assert (kv.block_size, kv.main_bytes, kv.index_bytes) == (128, 122_880, 14_592)
    # Four ranks hold 8192 bytes each.
    assert kv.draft_bytes == 4 * 8192
    assert kv_budget(TARGET, GQA).draft_bytes == 4 * 512
    assert kv.carry_bytes == 2 * 6144
    assert kv.token_bytes == 122_880 + 14_592 + 32_768
    assert kv.block_bytes == 128 * kv.token_bytes + 12_288
    plain = kv_budget(TARGET, None)
    assert (plain.draft_bytes, plain.carry_bytes) == (0, 0)
    assert kv_budget(TARGET, MHA, dtype="float32").block_bytes == 2 * kv.block_bytes


def test_caches_of_their_own_dtype():
    kv = kv_budget(TARGET, MHA, None, "bfloat16", "float8_e4m3fn", "bfloat16")
    assert (kv.main_bytes, kv.index_bytes) == (61_440, 14_592)
    assert (kv.draft_bytes, kv.carry_bytes) == (4 * 4096, 12_288)
    kv = kv_budget(TARGET, None, index_dtype="float8_e4m3fn")
    assert (kv.main_bytes, kv.index_bytes) == (122_880, 7_296)


def test_shared_selections_need_no_index_keys():
    shared = tuple(i > 3 and (i - 3) % 4 != 0 for i in range(60))
    kv = kv_budget(replace(TARGET, index_shared=shared), None)
    assert kv.index_bytes == 15 * 128 * 2


def test_how_much_fits():
    kv = kv_budget(TARGET, GQA)
    assert kv.num_blocks(10 * kv.block_bytes) == 10
    assert kv.num_tokens(10 * kv.block_bytes - 1) == 9 * 128
    assert kv.num_tokens(-1) == 0
    small = kv_budget(replace(TARGET, sparse_layers=(False,) * 60), None, block_size=16)
    assert small.num_tokens(small.block_bytes) == 16


def test_format():
    text = format_budget(TARGET, GQA, kv_budget(TARGET, GQA), kv_bytes=2**30)
    lines = {tuple(line.split()) for line in text.splitlines()}
    assert ("routed", "experts", "413,122,166,784", "769.500", "GiB") in lines
    assert ("total", "426,174,572,928", "793.896", "GiB") in lines
    assert ("total", "3,074,992,128", "5.728", "GiB") in lines
    assert ("index", "14,592", "1,867,776") in lines
    assert ("carry", "12,288") in lines
    assert text.endswith("1.000 GiB hold 60 blocks of 128 = 7,680 tokens")
    assert max(map(len, text.splitlines())) < 80
    plain = format_budget(TARGET, None, kv_budget(TARGET, None), dtype="float32")
    assert "target, float32" in plain and "fc" not in plain


GIB = 2**30
# Two thirds of an H200 hold weights; the rest is what 64 sequences might leave.
H200 = MemoryUse(
    total=140 * GIB,
    utilization=0.9,
    other=GIB,
    weights=90 * GIB,
    state=2 * GIB,
    activations=3 * GIB,
    graphs=4 * GIB,
)
KV = kv_budget(TARGET, GQA)


def test_kv_gets_what_is_left():
    assert H200.left == 126 * GIB - 100 * GIB
    blocks = size_kv(H200, KV, 131072)
    assert blocks == 26 * GIB // KV.block_bytes
    assert size_kv(H200, KV, None) == blocks
    assert size_kv(H200, KV, blocks * 128) == blocks
    unmeasured = replace(H200, state=None, activations=None, graphs=None)
    assert unmeasured.left == H200.left + 9 * GIB


def test_a_refusal_shows_the_budget_and_what_to_change():
    blocks = size_kv(H200, KV, None)
    half = kv_budget(TARGET, GQA, dtype="bfloat16")
    half = replace(half, main_bytes=half.main_bytes // 2)
    with pytest.raises(CapacityError) as refused:
        size_kv(H200, KV, blocks * 128 + 1, half)
    assert str(refused.value).splitlines() == [
        f"max_model_len = {blocks * 128 + 1} does not fit the GPU:",
        "  0.9 of 140.000 GiB             126.000 GiB",
        "  - other processes, driver        1.000 GiB",
        "  - weights                       90.000 GiB",
        "  - state of the slots             2.000 GiB",
        "  - activations                    3.000 GiB",
        "  - graphs                         4.000 GiB",
        "  left for KV                     26.000 GiB",
        f"  one sequence of {blocks * 128 + 1:,}         26.014 GiB",
        "Change one or more of:",
        f"  max_model_len: {blocks * 128} fits",
        "  gpu_memory_utilization: 0.901 fits",
        "  kv_cache_dtype, index_cache_dtype = fp8: it then takes 14.566 GiB",
        "  max_num_batched_tokens, max_num_seqs: a step then needs less",
    ]


def test_what_can_never_fit():
    unmeasured = replace(H200, weights=139 * GIB, state=None, activations=None, graphs=None)
    with pytest.raises(CapacityError) as refused:
        size_kv(unmeasured, KV, None)
    lines = str(refused.value).splitlines()
    assert lines[0] == "one KV block does not fit the GPU:"
    assert "  left for KV                    -14.000 GiB" in lines
    assert lines[-1] == "  a GPU with more memory, or fewer processes on it"
    assert not any("max_model_len" in line or "activations" in line for line in lines)
    assert not any("gpu_memory_utilization: 1.0" in line for line in lines)


def test_graphs_keep_logits_of_the_sizes_that_are_captured():
    assert graph_outputs((1, 8, 64), 4, 512, 10) == (1 + 8 + 64) * 4 * 10
    assert graph_outputs((1, 8, 64), 9, 512, 10) == (1 + 8) * 9 * 10
    assert graph_outputs((), 4, 512, 10) == 0


# By hand, from the widths of the published models: what one rank of several holds.


@pytest.mark.parametrize("size", [2, 8])
def test_what_a_rank_holds_of_the_pair(size):
    whole = parameters(target_components(TARGET))
    held = parameters(target_components(TARGET, share=Share(size - 1, size)))
    layers, kv_rows = 60, 2 * max(512 // size, 128)
    assert held == {
        "embedding": whole["embedding"] // size,
        "attention": layers * 6144 * (2 * 8192 // size + kv_rows),
        "index": 57 * 6144 * (kv_rows // 2 + 128),
        "dense MLP": whole["dense MLP"] // size,
        "routed experts": whole["routed experts"] // size,
        "shared experts": whole["shared experts"] // size,
        "router": whole["router"],
        "norms": whole["norms"],
        "lm_head": whole["lm_head"] // size,
    }
    assert held == parameters(target_components(TARGET, share=Share(0, size, whole_experts=True)))
    for spec, rows in ((MHA, 3 * 8192 // size), (GQA, 8192 // size + kv_rows)):
        whole = parameters(draft_components(spec))
        assert parameters(draft_components(spec, share=Share(0, size))) == {
            "embedding": whole["embedding"],
            "fc": whole["fc"],
            "attention": 2 * 6144 * rows + 6144 * 8192 // size,
            "MLP": whole["MLP"] // size,
            "norms": whole["norms"],
            "head": whole["head"] // size,
        }
        divided = draft_components(spec, share=Share(0, size, whole_embedding=False))
        assert parameters(divided)["embedding"] == whole["embedding"] // size


def test_bytes_of_a_rank():
    """In all, of the published model: each of 2 and of 8 ranks."""
    bytes_of = {
        size: total_bytes(target_components(TARGET, share=Share(0, size))) for size in (1, 2, 8)
    }
    # Replicated: router and norms, the index key's rows; with 8 ranks each KV head twice.
    fixed = 4 * (44_826_624 + 7_296) + 2 * 773_376 + 2 * 57 * 6144 * 128
    heads = 2 * 6144 * (60 * 2 * 512 + 57 * 512)
    assert bytes_of[2] == (bytes_of[1] - fixed) // 2 + fixed
    assert bytes_of[8] == (bytes_of[1] - fixed - heads) // 8 + heads // 4 + fixed


@pytest.mark.parametrize(
    ("size", "heads", "mha_heads"), [(1, 4, 64), (2, 2, 32), (4, 1, 16), (8, 1, 8), (16, 1, 4)]
)
def test_kv_of_a_rank(size, heads, mha_heads):
    for spec, own in ((GQA, heads), (MHA, mha_heads)):
        kv = kv_budget(TARGET, spec, size=size)
        assert kv.main_bytes == 60 * 2 * heads * 128 * 2
        assert kv.index_bytes == 57 * 128 * 2
        assert kv.draft_bytes == 2 * own * 128 * 2
        assert kv.carry_bytes == 6144 * 2


def test_the_table_of_several_ranks():
    kv = kv_budget(TARGET, GQA, size=8)
    lines = format_budget(TARGET, GQA, kv, size=8).splitlines()
    assert lines[:3] == ["one rank of 8; each holds as much", "", format_title("target, bfloat16")]
    total = sum(parameters(target_components(TARGET, share=Share(0, 8))).values())
    assert any(line.startswith("  total") and f"{total:,}" in line for line in lines)
    assert format_budget(TARGET, GQA, kv, size=1) == format_budget(TARGET, GQA, kv)
    # A vocabulary of 200,067 in eighths of 25,009, of which the last lacks 5.
    uneven = replace(TARGET, vocab_size=200_067)
    draft = replace(GQA, vocab_size=200_067, draft_vocab_size=200_067)
    told = format_budget(uneven, draft, kv, size=8).splitlines()[0]
    assert told == (
        "rank 0 of 8, which holds the most; rank 7 the least: "
        f"{3 * 5 * 6144 * 2:,} bytes less of weights"
    )


def format_title(title: str) -> str:
    return f"{title:<20}{'parameters':>19}{'memory':>16}"
