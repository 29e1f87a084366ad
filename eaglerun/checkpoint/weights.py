"""The tables of weights of the two models: the one place where a weight is described.

Name, shape, split over ranks, format and spellings. Sources of the names: the hub's files,
transformers' minimax_m3_vl (module names, and its table of conversions), vLLM's and ATOM's loaders.
"""

from dataclasses import dataclass

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.formats import IDS, WIDE
from eaglerun.checkpoint.table import Part, Split, Weight, WeightTable, single, spelled
from eaglerun.checkpoint.target import TargetSpec

INDEX_HEADS = "index_n_heads / sparse_num_index_heads"


@dataclass(frozen=True, slots=True)
class Share:
    """The part of both models that a process holds: rank ``rank``'s of ``size``.

    whole_experts    see target_weights
    whole_embedding  see draft_weights
    """

    rank: int = 0
    size: int = 1
    whole_experts: bool = False
    whole_embedding: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} of {self.size}: ranks count from 0")


UNDIVIDED = Share()


def target_weights(spec: TargetSpec, whole_experts: bool = False) -> WeightTable:
    """The target's weights; of several spellings the hub's first, then transformers'.

    whole_experts  ranks divide the experts among them, instead of the width of every expert
    """
    table = WeightTable(
        model="target",
        components=(
            *("embedding", "attention", "index", "dense MLP", "routed experts"),
            *("shared experts", "router", "norms", "lm_head"),
        ),
        prefixes=(
            "language_model.model.",
            "model.language_model.",
            "language_model.",
            "model.",
            "",
        ),
        skipped=(
            *("vision_tower.", "multi_modal_projector.", "patch_merge_mlp.", "mtp."),
            *("model.vision_tower.", "model.multi_modal_projector."),
        ),
    )
    hidden, vocab = (spec.hidden_size,), (spec.vocab_size, spec.hidden_size)
    by_id = Split(0, spec.vocab_size, "vocab_size", uneven=True)
    table.add([single("embed_tokens.weight", vocab, "embedding", by_id)])
    for i in range(spec.num_hidden_layers):
        layer = f"layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            table.add([single(f"{layer}{norm}.weight", hidden, "norms")])
        table.add(_target_attention(spec, layer + "self_attn.", spec.sparse_layers[i]))
        if spec.moe_layers[i]:
            table.add(_moe(spec, layer, whole_experts))
        else:
            module, width = (
                layer + "mlp.",
                (spec.dense_intermediate_size, "dense_intermediate_size"),
            )
            table.add(_mlp(module, (module,), spec.hidden_size, *width, "dense MLP"))
    table.add([single("norm.weight", hidden, "norms")])
    if not spec.tie_word_embeddings:
        table.add([single("lm_head.weight", vocab, "lm_head", by_id)])
    return table


def _target_attention(spec: TargetSpec, module: str, sparse: bool) -> list[Weight]:
    """The projection's rows are q, k, v and, in a sparse layer, index q and index k."""
    hidden, heads, dim = spec.hidden_size, spec.num_attention_heads, spec.head_dim
    parts = _qkv(spec, (module,), "weight", hidden)
    weights = [single(f"{module}{letter}_norm.weight", (dim,), "norms") for letter in "qk"]
    if sparse:
        index = (module + "index_", module + "indexer.")
        index_heads, width = spec.num_index_heads, spec.index_head_dim
        # An index head chooses for one KV head and goes where that goes. All share one key.
        for letter, count, split in (
            ("q", index_heads, Split(0, index_heads, INDEX_HEADS, copies=True)),
            ("k", 1, None),
        ):
            names = spelled(index, f"{letter}_proj.weight")
            parts.append(Part(f"index_{letter}", (count * width, hidden), "index", names, split))
            norm = spelled(index, f"{letter}_norm.weight")
            weights.append(single(norm[0], (width,), "norms", spellings=norm))
    by_head = Split(1, heads, "num_attention_heads")
    out = single(module + "o_proj.weight", (hidden, heads * dim), "attention", by_head)
    return [*weights, Weight(module + "qkv_proj.weight", tuple(parts)), out]


def _qkv(
    spec: TargetSpec | DraftSpec, modules: tuple[str, ...], kind: str, *columns: int
) -> list[Part]:
    """The rows q, k and v of a projection's weight or bias, by head."""
    by_group = Split(0, spec.num_key_value_heads, "num_key_value_heads", copies=True)
    return [
        Part(
            letter,
            (split.units * spec.head_dim, *columns),
            "attention",
            spelled(modules, f"{letter}_proj.{kind}"),
            split,
        )
        for letter, split in (
            ("q", Split(0, spec.num_attention_heads, "num_attention_heads")),
            ("k", by_group),
            ("v", by_group),
        )
    ]


def _moe(spec: TargetSpec, layer: str, whole_experts: bool) -> list[Weight]:
    count, hidden, width = spec.num_experts, spec.hidden_size, spec.expert_intermediate_size
    hub, module = layer + "block_sparse_moe.", layer + "mlp."
    modules = (hub, module)
    gate, bias = "gate.weight", "gate.e_score_correction_bias"
    names = spelled(modules, gate)
    weights = [single(module + gate, (count, hidden), "router", None, names, WIDE)]
    if spec.use_routing_bias:
        names = (hub + "e_score_correction_bias", module + bias)
        weights.append(single(module + bias, (count,), "router", None, names, WIDE))
    experts = spelled(modules, "experts.")

    def part(name: str, other: str, shape: tuple[int, int], axis: int) -> Part:
        """The matrix of every expert, which is stored expert by expert."""
        names = tuple(f"{m}{{}}.{word}.weight" for m in experts for word in (name, other))
        by_width = Split(axis, width, "intermediate_size")
        split = Split(0, count, "num_local_experts") if whole_experts else by_width
        return Part(name, (count, *shape), "routed experts", names, split)

    up = (part("w1", "gate_proj", (width, hidden), 1), part("w3", "up_proj", (width, hidden), 1))
    down = (part("w2", "down_proj", (hidden, width), 2),)
    names = spelled(experts, "gate_up_proj")
    weights.append(Weight(module + "experts.w13", up, axis=1, fused=names))
    names = spelled(experts, "down_proj")
    weights.append(Weight(module + "experts.w2", down, axis=1, fused=names))
    shared = spelled(modules, "shared_experts.")
    own = (spec.shared_intermediate_size, "shared_intermediate_size")
    return [*weights, *_mlp(shared[1], shared, hidden, *own, "shared experts")]


def _mlp(
    parameter: str, modules: tuple[str, ...], hidden: int, width: int, key: str, component: str
) -> list[Weight]:
    """gate_up_proj, whose rows are gate, then up; and down_proj. ``key`` names the width."""
    halves = tuple(
        Part(
            half,
            (width, hidden),
            component,
            spelled(modules, f"{half}_proj.weight"),
            Split(0, width, key),
        )
        for half in ("gate", "up")
    )
    names = spelled(modules, "gate_up_proj.weight")
    down = spelled(modules, "down_proj.weight")
    name, split = parameter + "down_proj.weight", Split(1, width, key)
    return [
        Weight(parameter + "gate_up_proj.weight", halves, fused=names),
        single(name, (hidden, width), component, split, down),
    ]


def draft_weights(spec: DraftSpec, whole_embedding: bool = False) -> WeightTable:
    """The draft's weights; of several spellings TorchSpec's layers.0, then SafeAILab's midlayer.

    t2d is the inverse of d2t and mask_hidden serves parallel drafting: neither is used here. A
    draft whose vocabulary is the target's may store d2t too: its offsets must be zeros.

    whole_embedding  every rank holds all of the embedding, which spares a sum in each pass
    """
    is_short = spec.draft_vocab_size < spec.vocab_size
    table = WeightTable(
        model="draft",
        components=("embedding", "fc", "attention", "MLP", "norms", "head"),
        prefixes=("", "model."),
        skipped=("t2d", "mask_hidden", "model.t2d", "model.mask_hidden"),
        zeros=frozenset() if is_short else frozenset({"d2t"}),
    )
    hidden, chunk, chunks = spec.hidden_size, spec.target_hidden_size, len(spec.taps)
    by_id = None if whole_embedding else Split(0, spec.vocab_size, "vocab_size", uneven=True)
    table.add([single("embed_tokens.weight", (spec.vocab_size, hidden), "embedding", by_id)])
    if spec.use_aux_hidden_state:
        table.add([single("fc.weight", (hidden, chunks * chunk), "fc")])
    if spec.fc_norm:
        names = ("fc_norm.{}.weight",)
        table.add([single("fc_norm.weight", (chunks, chunk), "norms", spellings=names)])
    if spec.norm_before_fc:
        table.add([single("input_norm.weight", (chunks * chunk,), "norms")])
    table.add(_draft_layer(spec))
    table.add([single("norm.weight", (hidden,), "norms")])
    if not spec.tie_word_embeddings:
        ids = spec.draft_vocab_size
        split = Split(0, ids, "draft_vocab_size", uneven=True)
        table.add([single("lm_head.weight", (ids, hidden), "head", split)])
    if is_short:
        table.add([single("d2t", (spec.draft_vocab_size,), None, format=IDS)])
    return table


def _draft_layer(spec: DraftSpec) -> list[Weight]:
    hidden, heads = spec.hidden_size, spec.num_attention_heads
    layer = ("layers.0.", "midlayer.")
    attention, name = spelled(layer, "self_attn."), "layer.self_attn."
    weights = [
        single(
            f"layer.{norm}.weight", (hidden,), "norms", spellings=spelled(layer, norm + ".weight")
        )
        for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    ]
    qkv = _qkv(spec, attention, "weight", 2 * hidden)
    weights.append(Weight(name + "qkv_proj.weight", tuple(qkv)))
    if spec.attention_bias:
        bias = _qkv(spec, attention, "bias")
        weights.append(Weight(name + "qkv_proj.bias", tuple(bias)))
    out, split = (hidden, heads * spec.head_dim), Split(1, heads, "num_attention_heads")
    names = spelled(attention, "o_proj.weight")
    weights.append(single(name + "o_proj.weight", out, "attention", split, names))
    mlp = spelled(layer, "mlp.")
    width = (spec.intermediate_size, "intermediate_size")
    return [*weights, *_mlp("layer.mlp.", mlp, hidden, *width, "MLP")]
