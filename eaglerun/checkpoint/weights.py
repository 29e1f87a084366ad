"""Every tensor name a checkpoint may use, and the place in which parameter it fills.

Built from a spec alone, so that a loader can tell exactly what is missing and what is too much.
Sources of the names: the hub's files, transformers' minimax_m3_vl (module names, and its table of
conversions), vLLM's and ATOM's loaders.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec

Shape = tuple[int, ...]

# Tables of rotary embeddings, which older libraries saved beside the weights.
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of ``shape`` goes: it is copied to parameter[where].

    parts  what it brings, as names of the hub's layout: its own, or those that it fuses
    """

    parameter: str
    where: tuple[int | slice, ...]
    shape: Shape
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NameMap:
    """The parameters of a model and the tensors that fill them.

    shapes    parameter (or buffer) -> its shape
    pieces    tensor name without prefix -> its piece, all spellings
    parts     part -> parameter: each has to be brought by exactly one tensor
    prefixes  what may stand before a name
    skipped   beginnings of full names that belong to parts this build does not have
    zeros     tensors that say something only where they are not zero, without prefix
    """

    prefixes: tuple[str, ...]
    skipped: tuple[str, ...]
    shapes: dict[str, Shape] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    zeros: set[str] = field(default_factory=set)

    def is_skipped(self, name: str) -> bool:
        """A tensor without a place here: another part's, or a table that is computed."""
        return name.startswith(self.skipped) or name.endswith(COMPUTED)

    def must_be_zero(self, name: str) -> bool:
        return any(name == prefix + zero for prefix in self.prefixes for zero in self.zeros)

    def find(self, name: str) -> Piece | None:
        """The piece of a tensor by its full name."""
        for prefix in self.prefixes:
            if name.startswith(prefix) and (piece := self.pieces.get(name[len(prefix) :])):
                return piece
        return None

    def whole(self, parameter: str, shape: Shape, *names: str) -> None:
        """A parameter that is one tensor, under its own name unless there are ``names``."""
        self.shapes[parameter] = shape
        self._piece(names or (parameter,), parameter, (), shape)

    def stack(
        self,
        parameter: str,
        blocks: Iterable[tuple[tuple[str, ...], int]],
        *columns: int,
        fused: tuple[str, ...] = (),
    ) -> None:
        """A parameter of row blocks (spellings of the tensor, rows), in this order.

        ``fused`` names tensors that hold all of it.
        """
        start = 0
        parts = []
        for names, rows in blocks:
            where = (slice(start, start + rows),)
            self._piece(names, parameter, where, (rows, *columns))
            parts.append(names[0])
            start += rows
        self.shapes[parameter] = (start, *columns)
        self._fused(fused, parameter, parts)

    def experts(
        self,
        parameter: str,
        count: int,
        blocks: tuple[tuple[str, str], ...],
        shape: tuple[int, int],
        modules: tuple[str, ...],
        fused: str,
    ) -> None:
        """A stack [count, rows, columns] whose expert e is one matrix of ``shape`` per block.

        blocks  (the hub's name of the matrix, the other one), top rows first
        """
        rows, columns = shape
        parts = []
        for expert in range(count):
            for i, block in enumerate(blocks):
                names = tuple(
                    f"{module}.{expert}.{word}.weight" for module in modules for word in block
                )
                where = (expert, slice(i * rows, (i + 1) * rows))
                self._piece(names, parameter, where, shape)
                parts.append(names[0])
        self.shapes[parameter] = (count, len(blocks) * rows, columns)
        self._fused(tuple(f"{module}.{fused}" for module in modules), parameter, parts)

    def rows(self, parameter: str, names: Iterable[str], width: int) -> None:
        """A matrix [names, width] whose rows are vectors with a tensor each."""
        count = 0
        for count, name in enumerate(names, start=1):
            self._piece((name,), parameter, (count - 1,), (width,))
        self.shapes[parameter] = (count, width)

    def _piece(
        self, names: tuple[str, ...], parameter: str, where: tuple[int | slice, ...], shape: Shape
    ) -> None:
        self.parts[names[0]] = parameter
        piece = Piece(parameter, where, shape, (names[0],))
        for name in names:
            self.pieces[name] = piece

    def _fused(self, names: tuple[str, ...], parameter: str, parts: list[str]) -> None:
        for name in names:
            self.pieces[name] = Piece(parameter, (), self.shapes[parameter], tuple(parts))


def target_names(spec: TargetSpec) -> NameMap:
    """The names of the target: the hub's first, then those of transformers' modules."""
    names = NameMap(
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
    hidden = spec.hidden_size
    names.whole("embed_tokens.weight", (spec.vocab_size, hidden))
    for i in range(spec.num_hidden_layers):
        layer = f"layers.{i}."
        names.whole(layer + "input_layernorm.weight", (hidden,))
        names.whole(layer + "post_attention_layernorm.weight", (hidden,))
        _target_attention(names, spec, layer + "self_attn.", spec.sparse_layers[i])
        if spec.moe_layers[i]:
            _moe(names, spec, layer)
        else:
            module = layer + "mlp."
            _mlp(names, module, (module,), hidden, spec.dense_intermediate_size)
    names.whole("norm.weight", (hidden,))
    if not spec.tie_word_embeddings:
        names.whole("lm_head.weight", (spec.vocab_size, hidden))
    return names


def _spelled(modules: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(module + name for module in modules)


def _qkv(
    spec: TargetSpec | DraftSpec, modules: tuple[str, ...], kind: str
) -> list[tuple[tuple[str, ...], int]]:
    """Row blocks of a qkv projection's weight or bias."""
    heads = {
        "q": spec.num_attention_heads,
        "k": spec.num_key_value_heads,
        "v": spec.num_key_value_heads,
    }
    return [
        (_spelled(modules, f"{letter}_proj.{kind}"), count * spec.head_dim)
        for letter, count in heads.items()
    ]


def _target_attention(names: NameMap, spec: TargetSpec, module: str, sparse: bool) -> None:
    blocks = _qkv(spec, (module,), "weight")
    for letter in "qk":
        names.whole(f"{module}{letter}_norm.weight", (spec.head_dim,))
    if sparse:
        index = (module + "index_", module + "indexer.")
        for letter, count in (("q", spec.num_index_heads), ("k", 1)):
            proj = _spelled(index, f"{letter}_proj.weight")
            norm = _spelled(index, f"{letter}_norm.weight")
            blocks.append((proj, count * spec.index_head_dim))
            names.whole(norm[0], (spec.index_head_dim,), *norm)
    names.stack(module + "qkv_proj.weight", blocks, spec.hidden_size)
    heads = spec.num_attention_heads * spec.head_dim
    names.whole(module + "o_proj.weight", (spec.hidden_size, heads))


def _moe(names: NameMap, spec: TargetSpec, layer: str) -> None:
    count, hidden, width = spec.num_experts, spec.hidden_size, spec.expert_intermediate_size
    hub, module = layer + "block_sparse_moe.", layer + "mlp."
    gate, bias = module + "gate.weight", module + "gate.e_score_correction_bias"
    names.whole(gate, (count, hidden), hub + "gate.weight", gate)
    if spec.use_routing_bias:
        names.whole(bias, (count,), hub + "e_score_correction_bias", bias)
    experts = (hub + "experts", module + "experts")
    w13, w2 = (("w1", "gate_proj"), ("w3", "up_proj")), (("w2", "down_proj"),)
    up, down = (width, hidden), (hidden, width)
    names.experts(module + "experts.w13", count, w13, up, experts, "gate_up_proj")
    names.experts(module + "experts.w2", count, w2, down, experts, "down_proj")
    shared = _spelled((hub, module), "shared_experts.")
    _mlp(names, shared[1], shared, hidden, spec.shared_intermediate_size)


def _mlp(names: NameMap, parameter: str, modules: tuple[str, ...], hidden: int, width: int) -> None:
    names.stack(
        parameter + "gate_up_proj.weight",
        [(_spelled(modules, f"{half}_proj.weight"), width) for half in ("gate", "up")],
        hidden,
        fused=_spelled(modules, "gate_up_proj.weight"),
    )
    down = _spelled(modules, "down_proj.weight")
    names.whole(parameter + "down_proj.weight", (hidden, width), *down)


def draft_names(spec: DraftSpec) -> NameMap:
    """The names of the draft: TorchSpec's layers.0 and SafeAILab's midlayer.

    t2d is the inverse of d2t and mask_hidden serves parallel drafting: neither is used here. A
    draft whose vocabulary is the target's may store d2t too: its offsets must be zeros.
    """
    unused = ("t2d", "mask_hidden", "model.t2d", "model.mask_hidden")
    names = NameMap(prefixes=("", "model."), skipped=unused)
    hidden, chunk, chunks = spec.hidden_size, spec.target_hidden_size, len(spec.taps)
    names.whole("embed_tokens.weight", (spec.vocab_size, hidden))
    if spec.use_aux_hidden_state:
        names.whole("fc.weight", (hidden, chunks * chunk))
    if spec.fc_norm:
        names.rows("fc_norm.weight", (f"fc_norm.{i}.weight" for i in range(chunks)), chunk)
    if spec.norm_before_fc:
        names.whole("input_norm.weight", (chunks * chunk,))
    layer = ("layers.0.", "midlayer.")
    for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        names.whole(f"layer.{norm}.weight", (hidden,), *_spelled(layer, norm + ".weight"))
    attention, parameter = _spelled(layer, "self_attn."), "layer.self_attn."
    names.stack(parameter + "qkv_proj.weight", _qkv(spec, attention, "weight"), 2 * hidden)
    if spec.attention_bias:
        names.stack(parameter + "qkv_proj.bias", _qkv(spec, attention, "bias"))
    out = (hidden, spec.num_attention_heads * spec.head_dim)
    names.whole(parameter + "o_proj.weight", out, *_spelled(attention, "o_proj.weight"))
    _mlp(names, "layer.mlp.", _spelled(layer, "mlp."), hidden, spec.intermediate_size)
    names.whole("norm.weight", (hidden,))
    if not spec.tie_word_embeddings:
        names.whole("lm_head.weight", (spec.draft_vocab_size, hidden))
    if spec.draft_vocab_size < spec.vocab_size:
        names.whole("d2t", (spec.draft_vocab_size,))
    else:
        names.zeros.add("d2t")
    return names
