"""The least that a step must do: bytes of a decode step, and what its arithmetic takes beyond the
time to read them; floating-point operations of a prefill.

Weights are read once, of the experts those that were really hit; of the draft's layer and head
once a pass. KV bytes are counted apart from the weights, each key once a sequence: the rows of one
sequence are taken to select the same blocks, so that what they select apart comes on top.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from eaglerun.checkpoint.budget import KVBudget, components, draft_components, target_components
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import draft_weights


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a decode step reads at least, by the kernels that read them."""

    linear: float
    moe: float
    dense_attention: float
    index_scan: float
    sparse_attention: float

    @property
    def weights(self) -> float:
        return self.linear + self.moe

    @property
    def kv(self) -> float:
        return self.dense_attention + self.index_scan + self.sparse_attention

    def by_group(self) -> dict[str, float]:
        """By the groups of a profile (see trace.GROUPS)."""
        return {
            "linear": self.linear,
            "MoE": self.moe,
            "dense attention": self.dense_attention,
            "index scan": self.index_scan,
            "sparse attention": self.sparse_attention,
        }


def step_bytes(
    target: TargetSpec,
    draft: DraftSpec | None,
    kv: KVBudget,
    dtype: str,
    num_draft_tokens: int,
    experts: float,
    num_sequences: int,
    context: float,
) -> StepBytes:
    """Of one decode step.

    draft    None or num_draft_tokens = 0: the draft reads nothing (its KV fill is left out)
    experts  distinct experts hit in each MoE layer, mean over the layers
    context  keys that a sequence sees, mean over the sequences
    """
    parts = {c.name: c.num_bytes for c in target_components(target, dtype)}
    moe = parts.pop("routed experts") * experts / target.num_experts if target.num_experts else 0.0
    # The shared expert is part of the grouped product (kernels/moe_gemm.py).
    moe += parts.pop("router") + parts.pop("shared experts")
    del parts["embedding"]  # a few rows of it
    linear = float(sum(parts.values()))
    layers, sparse = target.num_hidden_layers, sum(target.sparse_layers)
    selected = target.sparse_topk_blocks * target.sparse_block_size
    keys, layer_bytes = num_sequences * context, kv.main_bytes / layers
    dense_attention = (layers - sparse) * keys * layer_bytes
    index_scan = sparse_attention = 0.0
    if context > selected:
        index_scan = keys * kv.index_bytes
        sparse_attention = sparse * num_sequences * selected * layer_bytes
    else:
        dense_attention += sparse * keys * layer_bytes
    if draft is not None and num_draft_tokens:
        own = {c.name: c.num_bytes for c in draft_components(draft, dtype)}
        del own["embedding"]
        linear += own.pop("fc") + num_draft_tokens * sum(own.values())
        seen = context if draft.sliding_window is None else min(context, draft.sliding_window)
        dense_attention += num_draft_tokens * num_sequences * seen * kv.draft_bytes
    return StepBytes(linear, moe, dense_attention, index_scan, sparse_attention)


@dataclass(frozen=True, slots=True)
class Product:
    """A part of the weights that rows go through: its bytes, and the operations on them."""

    num_bytes: float
    num_flops: float


def step_products(
    target: TargetSpec,
    draft: DraftSpec | None,
    dtype: str,
    num_draft_tokens: int,
    num_sequences: int,
) -> tuple[Product, ...]:
    """What all rows of a decode step go through, part by part: no routed experts, of which a row
    sees few. The draft's fc takes every verified row, its layer and head a row a sequence."""
    rows = num_sequences * (num_draft_tokens + 1)
    left_out = ("embedding", "norms", "routed experts")
    found = [
        Product(c.num_bytes, 2.0 * rows * c.num_parameters)
        for c in target_components(target, dtype)
        if c.name not in left_out
    ]
    if draft is not None and num_draft_tokens:
        for c in draft_components(draft, dtype):
            if c.name not in left_out:
                times, each = (1, rows) if c.name == "fc" else (num_draft_tokens, num_sequences)
                flops = 2.0 * times * each * c.num_parameters
                found.append(Product(times * c.num_bytes, flops))
    return tuple(found)


def arithmetic_s(products: Iterable[Product], bandwidth: float, flops: float) -> float:
    """Seconds that products take for their operations beyond those for their bytes, at so many
    bytes and operations a second."""
    return sum(max(0.0, p.num_flops / flops - p.num_bytes / bandwidth) for p in products)


@dataclass(frozen=True, slots=True)
class PrefillFlops:
    """Floating-point operations of a prompt, a multiply and an add counted as two."""

    linear: float
    moe: float
    dense_attention: float
    index_scan: float
    sparse_attention: float

    @property
    def total(self) -> float:
        attention = self.dense_attention + self.index_scan + self.sparse_attention
        return self.linear + self.moe + attention


def prefill_flops(target: TargetSpec, draft: DraftSpec | None, length: int) -> PrefillFlops:
    """Of a prompt of ``length`` tokens whose last row alone needs logits.

    A row scores the blocks before it only where there are more than it may select. ``draft``: its
    KV fill is counted, fc and the k and v projection of every row.
    """
    parts = {c.name: c.num_parameters for c in target_components(target)}
    head = parts.pop("lm_head") or parts["embedding"]
    routed = parts.pop("routed experts")
    for name in ("embedding", "norms"):
        del parts[name]
    moe = parts.pop("router") + parts.pop("shared experts")
    if target.num_experts:
        moe += routed * target.num_experts_per_tok // target.num_experts
    linear = sum(parts.values())
    if draft is not None:
        table = draft_weights(draft)
        own = {c.name: c.num_parameters for c in components(table, draft.dtype)}
        linear += own["fc"] + table.num_parameters("layer.self_attn.qkv_proj.weight", "k", "v")
    layers, sparse = target.num_hidden_layers, sum(target.sparse_layers)
    num_index = sum(
        own and not shared
        for own, shared in zip(target.sparse_layers, target.index_shared, strict=True)
    )
    selected = min(target.sparse_topk_blocks * target.sparse_block_size, length)
    pairs = length * (length + 1) / 2
    near = selected * (selected + 1) / 2  # of rows that select everything before them
    pair = 4.0 * target.num_attention_heads * target.head_dim
    scored = 2.0 * target.num_index_heads * target.index_head_dim
    return PrefillFlops(
        linear=2.0 * (length * linear + head),
        moe=2.0 * length * moe,
        dense_attention=(layers - sparse) * pair * pairs,
        index_scan=num_index * scored * (pairs - near),
        sparse_attention=sparse * pair * (near + (length - selected) * selected),
    )
