"""The tables of weights: what each rank of a group holds, on the widths of the published models."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.names import TensorNames
from eaglerun.checkpoint.table import Part, Split, Weight, WeightTable, check_ranks
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import Share, draft_weights, target_weights
from eaglerun.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
EIGHT_LAYERS = TargetSpec.from_config(read_checkpoint_config(CONFIGS / "m3-8l" / "target"))
SPARSE = (False,) * 3 + (True,) * 57
M3 = replace(
    EIGHT_LAYERS,
    num_hidden_layers=60,
    moe_layers=SPARSE,
    sparse_layers=SPARSE,
    index_shared=(False,) * 60,
)
MHA, GQA = (
    DraftSpec.from_config(read_checkpoint_config(CONFIGS / "m3-8l" / name), EIGHT_LAYERS)
    for name in ("draft-mha", "draft-gqa")
)
TABLES = {
    "M3": target_weights(M3),
    "M3, whole experts": target_weights(M3, whole_experts=True),
    "MHA draft": draft_weights(MHA),
    "GQA draft": draft_weights(GQA),
    "GQA draft, whole embedding": draft_weights(GQA, whole_embedding=True),
    "draft of 32,000 ids with biases": draft_weights(
        replace(GQA, draft_vocab_size=32000, attention_bias=True, fc_norm=False)
    ),
}
SPARSE_QKV, DENSE_QKV = (f"layers.{i}.self_attn.qkv_proj.weight" for i in (3, 0))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("name", TABLES)
def test_shards_tile_the_whole(name, size):
    table: WeightTable = TABLES[name]
    for weight in table.weights.values():
        for part in weight.parts:
            assert_tiled(part, size)
        for rank in range(size):
            # Joined along the axis, the shares of the parts are the shard.
            shares = [[s.stop - s.start for s in p.share(rank, size)] for p in weight.parts]
            rows = sum(share[weight.axis] for share in shares)
            for share in shares:
                share[weight.axis] = rows
                assert weight.shape(rank, size) == tuple(share), weight.name


def assert_tiled(part: Part, size: int) -> None:
    """Every number of the part is held, and each by the same number of ranks."""
    shares = [part.share(rank, size) for rank in range(size)]
    split = -1 if part.split is None else part.split.axis
    for axis, extent in enumerate(part.shape):
        runs = Counter((share[axis].start, share[axis].stop) for share in shares)
        if axis != split:
            assert runs == {(0, extent): size}
            continue
        assert len(set(runs.values())) == 1, "as many copies of one run as of another"
        ends = [0, *(stop for _, stop in sorted(runs))]
        assert [start for start, _ in sorted(runs)] == ends[:-1] and ends[-1] == extent


@pytest.mark.parametrize(("name", "size"), [("M3", 8), ("M3, whole experts", 4), ("GQA draft", 8)])
def test_the_tensors_of_a_checkpoint_fill_a_rank(name, size):
    """Under the hub's names, the blocks that a rank takes are as many numbers as it holds."""
    table: WeightTable = TABLES[name]
    names = TensorNames(table, size - 1, size)
    filled: Counter[str] = Counter()
    for part in names.parts:
        piece = names.pieces[part]
        for run in piece.runs:
            block = [s.stop - s.start for s in run.source]
            places = [place for place in run.where if isinstance(place, slice)]
            assert block == [place.stop - place.start for place in places], part
            assert all(s.stop <= n for s, n in zip(run.source, piece.shape, strict=True)), part
            filled[piece.parameter] += math.prod(block)
    assert filled == {
        weight.name: math.prod(weight.shape(size - 1, size)) for weight in table.weights.values()
    }


def test_what_a_rank_holds_of_m3():
    """By hand, from the published widths: the shapes that a tensor-parallel rank computes with."""
    table = TABLES["M3"].weights

    def shapes(name: str) -> list[tuple[int, ...]]:
        return [table[name].shape(size - 1, size) for size in (1, 2, 4, 8)]

    # q by heads; k, v and index q by KV head, of which two ranks of eight share one; index k whole.
    rows = [8192 + 3 * 512, 4096 + 3 * 256, 2048 + 3 * 128, 1024 + 3 * 128]
    assert shapes(SPARSE_QKV) == [(n + 128, 6144) for n in rows]
    assert shapes(DENSE_QKV) == [(n, 6144) for n in (9216, 4608, 2304, 1280)]
    attention, mlp = "layers.3.self_attn.", "layers.3.mlp."
    assert shapes(attention + "o_proj.weight") == [(6144, 8192 // n) for n in (1, 2, 4, 8)]
    assert shapes(attention + "index_k_norm.weight") == [(128,)] * 4
    widths = (3072, 1536, 768, 384)
    assert shapes(mlp + "experts.w13") == [(128, 2 * n, 6144) for n in widths]
    assert shapes(mlp + "experts.w2") == [(128, 6144, n) for n in widths]
    assert shapes(mlp + "shared_experts.gate_up_proj.weight") == [(2 * n, 6144) for n in widths]
    assert shapes(mlp + "shared_experts.down_proj.weight") == [(6144, n) for n in widths]
    assert shapes(mlp + "gate.weight") == [(128, 6144)] * 4
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert shapes(name) == [(n, 6144) for n in (200064, 100032, 50016, 25008)]
    own = TABLES["M3, whole experts"].weights[mlp + "experts.w2"]
    assert [own.shape(0, size)[0] for size in (1, 2, 4, 8)] == [128, 64, 32, 16]


def test_what_a_rank_holds_of_the_drafts():
    qkv = "layer.self_attn.qkv_proj.weight"
    assert TABLES["MHA draft"].weights[qkv].shape(3, 4) == (3 * 2048, 12288)
    assert TABLES["GQA draft"].weights[qkv].shape(3, 4) == (2048 + 2 * 128, 12288)
    assert TABLES["GQA draft"].weights[qkv].shape(7, 8) == (1024 + 2 * 128, 12288)
    for name, rows in (("GQA draft", 50016), ("GQA draft, whole embedding", 200064)):
        assert TABLES[name].weights["embed_tokens.weight"].shape(3, 4) == (rows, 6144)
    short = TABLES["draft of 32,000 ids with biases"].weights
    assert short["lm_head.weight"].shape(0, 8) == (4000, 6144)
    assert short["d2t"].shape(0, 8) == (32000,)
    assert short["layer.self_attn.qkv_proj.bias"].shape(7, 8) == (1024 + 2 * 128,)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_a_query_head_lies_with_its_kv_head_and_its_index_head(size):
    parts = {part.name: part for part in TABLES["M3"].weights[SPARSE_QKV].parts}
    for rank in range(size):
        q, k, v, index_q = (parts[n].share(rank, size)[0] for n in ("q", "k", "v", "index_q"))
        assert k == v == index_q
        # In heads of 128: query head h attends to the keys of KV head h // 16.
        first, last = q.start // 128, q.stop // 128 - 1
        assert (first // 16, last // 16) == (k.start // 128, k.stop // 128 - 1)


def test_the_shards_of_a_rank_are_contents_of_the_whole():
    """The rows themselves, of a weight small enough to write down."""
    parts = (
        Part("q", (8, 1), "attention", ("q",), Split(0, 4, "heads")),
        Part("k", (4, 1), "attention", ("k",), Split(0, 2, "kv_heads", copies=True)),
        Part("i", (1, 1), "index", ("i",)),
    )
    weight = Weight("qkv", parts)
    whole = [list(range(100, 108)), list(range(200, 204)), [300]]

    def shard(rank: int) -> list[int]:
        """The rows of the parts that the rank holds."""
        runs = (part.share(rank, 4)[0] for part in parts)
        return [row for rows, run in zip(whole, runs, strict=True) for row in rows[run]]

    assert [shard(rank) for rank in range(4)] == [
        [100, 101, 200, 201, 300],
        [102, 103, 200, 201, 300],
        [104, 105, 202, 203, 300],
        [106, 107, 202, 203, 300],
    ]
    assert [weight.shape(r, 4) for r in range(4)] == [(5, 1)] * 4
    assert (weight.rows("q", "k"), weight.rows("q", "k", rank=1, size=4)) == (12, 4)


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("embed_tokens.weight", 200065, "embed_tokens.weight: 200064 cannot be divided among 2"),
        (SPARSE_QKV, 3, f"{SPARSE_QKV} q: 64 cannot be divided among 3 ranks"),
        (SPARSE_QKV, 128, f"{SPARSE_QKV} q: 64 cannot be divided among 128 ranks"),
        (
            "layers.3.mlp.experts.w2",
            5,
            "layers.3.mlp.experts.w2 w2: 3072 cannot be divided among 5",
        ),
    ],
)
def test_a_group_that_does_not_fit_is_refused_by_name(name, size, told):
    with pytest.raises(ValueError, match=told):
        TABLES["M3"].weights[name].shape(0, size)
    six = Split(0, 4, "kv_heads", copies=True)
    with pytest.raises(ValueError, match="4 cannot be divided among 6 ranks"):
        six.share(512, 0, 6)


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("M3", 3, "target num_attention_heads = 64 cannot be divided among 3 ranks; allowed "),
        ("M3", 128, "target num_attention_heads = 64 cannot be divided among 128 ranks; allowed "),
        ("GQA draft", 6, "draft num_attention_heads = 64 cannot be divided among 6 ranks; allo"),
    ],
)
def test_a_group_that_does_not_fit_is_refused_with_what_does(name, size, told):
    with pytest.raises(ConfigError) as error:
        check_ranks(size, TABLES[name])
    assert str(error.value).startswith(f"tensor_parallel_size = {size}: {told}")
    assert str(error.value).endswith("allowed 1, 2, 4, 8, 16, 32, 64")


@pytest.mark.parametrize(
    ("change", "told", "allowed"),
    [
        (
            {"num_attention_heads": 72, "num_key_value_heads": 8},
            "num_attention_heads = 72",
            "1, 2, 4, 8, 24",
        ),
        (
            {"num_attention_heads": 96, "num_key_value_heads": 6},
            "num_key_value_heads = 6",
            "1, 2, 12, 24, 48, 96",
        ),
        ({"num_index_heads": 3}, "index_n_heads / sparse_num_index_heads = 3", "1"),
        ({"expert_intermediate_size": 1000}, "intermediate_size = 1000", "1, 2, 4, 8"),
        ({"shared_intermediate_size": 1020}, "shared_intermediate_size = 1020", "1, 2, 4"),
        ({"dense_intermediate_size": 10}, "dense_intermediate_size = 10", "1, 2"),
        ({"vocab_size": 17}, "vocab_size = 17", "1, 2, 4"),
    ],
)
def test_each_key_that_does_not_divide_is_named(change, told, allowed):
    with pytest.raises(ConfigError) as error:
        check_ranks(16, target_weights(replace(M3, **change)))
    assert str(error.value) == (
        f"tensor_parallel_size = 16: target {told} cannot be divided among 16 ranks; "
        f"allowed {allowed}"
    )


def test_whole_experts_are_counted_and_the_pair_has_to_fit():
    few = target_weights(replace(M3, num_experts=12), whole_experts=True)
    with pytest.raises(ConfigError, match="target num_local_experts = 12 cannot be .* among 8 "):
        check_ranks(8, few)
    drafts = [
        (replace(GQA, num_attention_heads=4), "num_attention_heads = 4"),
        (replace(GQA, num_key_value_heads=5), "num_key_value_heads = 5"),
        (replace(GQA, intermediate_size=12), "intermediate_size = 12"),
        (replace(GQA, draft_vocab_size=9), "draft_vocab_size = 9"),
    ]
    for draft, told in drafts:
        with pytest.raises(ConfigError, match=f"= 8: draft {told} cannot be divided among 8 "):
            check_ranks(8, TABLES["M3"], draft_weights(draft, whole_embedding=True))
    check_ranks(8, TABLES["M3"], TABLES["MHA draft"])


@pytest.mark.parametrize(("vocab_size", "size"), [(60, 8), (200064, 5), (4097, 2), (17, 9)])
def test_the_last_part_of_a_vocabulary_may_be_shorter(vocab_size, size):
    runs = [
        Split(0, vocab_size, "ids", uneven=True).share(vocab_size, r, size) for r in range(size)
    ]
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])]
    assert runs[-1].stop == vocab_size
    lengths = [run.stop - run.start for run in runs]
    assert set(lengths[:-1]) == {-(-vocab_size // size)}
    assert 0 < lengths[-1] < lengths[0]


def test_a_rank_is_one_of_its_group():
    for rank, size in ((2, 2), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"rank {rank} of {size}"):
            Share(rank, size)
