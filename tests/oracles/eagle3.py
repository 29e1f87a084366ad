"""The EAGLE3 draft as loops over rows, heads and keys, in float64, without a batch or a cache.

Written from the architecture's definition (embeds first, hidden second; one Llama layer; the
state fed back) and from a checkpoint's own keys and tensor names. Nothing of the engine is
imported. Every call begins at the first row of the sequence and computes all keys anew.

Row j pairs the embedding of x[j + 1] with the fused hidden states of position j, rotates by j and
predicts x[j + 2]. Proposing after the newest token x[p] begins at row p - 1; each further pass
adds one row, its token the last draft and its hidden state the last feedback.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = np.ndarray
Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class RowState:
    """What one row gives: the normed state, the state fed back, and the head's logits."""

    normed: Vector
    feedback: Vector
    logits: Vector


@dataclass(frozen=True)
class Proposal:
    """Drafts in the target's vocabulary, and the row behind each."""

    tokens: list[int]
    rows: list[RowState]


def rms_norm(x: Vector, weight: Vector, eps: float) -> Vector:
    return x / math.sqrt(float(x @ x) / len(x) + eps) * weight


def silu(x: Vector) -> Vector:
    return x / (1.0 + np.exp(-x))


def rotate(x: Vector, position: int, theta: float) -> Vector:
    """All dims of every head x[..., dim], in halves (j, j + dim / 2)."""
    half = x.shape[-1] // 2
    angles = position * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Eagle3Oracle:
    """One draft: its config.json and its tensors under the names of its checkpoint.

    ``shared``: the target's embedding and head, for a checkpoint that brings none.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Weights, shared: Weights | None = None
    ) -> None:
        self.config = config
        found = dict(shared or {})
        for name, tensor in weights.items():
            found[name.replace("midlayer.", "layers.0.")] = np.asarray(tensor)
        if config.get("tie_word_embeddings", False):
            found["lm_head.weight"] = found["embed_tokens.weight"]
        self.weights = {
            name: tensor if name == "d2t" else tensor.astype(np.float64)
            for name, tensor in found.items()
        }
        self.hidden_size = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads", self.heads)
        self.head_dim = config.get("head_dim", self.hidden_size // self.heads)
        self.eps = config.get("rms_norm_eps", 1e-6)
        self.theta = config.get("rope_theta", 10000.0)
        self.window = None
        if config.get("use_sliding_window", False):
            self.window = config["sliding_window"]
        eagle = config.get("eagle_config", {})
        self.has_fc = eagle.get("use_aux_hidden_state", True)

    def norm(self, x: Vector, name: str) -> Vector:
        return rms_norm(x, self.weights[name + ".weight"], self.eps)

    def linear(self, x: Vector, name: str) -> Vector:
        out = self.weights[name + ".weight"] @ x
        bias = self.weights.get(name + ".bias")
        return out if bias is None else out + bias

    def fuse(self, chunks: Sequence[Vector]) -> Vector:
        """The hidden state of pass 0 from the target's tapped states of one position."""
        if not self.has_fc:
            (only,) = chunks
            return only
        if self.config.get("fc_norm", False):
            chunks = [self.norm(chunk, f"fc_norm.{g}") for g, chunk in enumerate(chunks)]
        joined = np.concatenate(list(chunks))
        if self.config.get("norm_before_fc", False):
            joined = self.norm(joined, "input_norm")
        return self.linear(joined, "fc")

    def layer_input(self, token: int, hidden: Vector) -> Vector:
        embedding = self.weights["embed_tokens.weight"][token]
        return np.concatenate(
            [
                self.norm(embedding, "layers.0.input_layernorm"),
                self.norm(hidden, "layers.0.hidden_norm"),
            ]
        )

    def key_value(self, x: Vector, position: int) -> tuple[Vector, Vector]:
        """Rotated keys and plain values of one row, [KV heads, dim] each."""
        keys = self.linear(x, "layers.0.self_attn.k_proj").reshape(self.groups, self.head_dim)
        values = self.linear(x, "layers.0.self_attn.v_proj").reshape(self.groups, self.head_dim)
        return rotate(keys, position, self.theta), values

    def attention(self, x: Vector, row: int, cells: Sequence[tuple[Vector, Vector]]) -> Vector:
        """Row ``row`` over the keys and values of rows 0 .. row, or the last of them."""
        first = 0 if self.window is None else max(0, row - self.window + 1)
        queries = self.linear(x, "layers.0.self_attn.q_proj").reshape(self.heads, self.head_dim)
        outputs = []
        for head, query in enumerate(rotate(queries, row, self.theta)):
            group = head // (self.heads // self.groups)
            scores = [
                float(query @ cells[t][0][group]) * self.head_dim**-0.5
                for t in range(first, row + 1)
            ]
            top = max(scores)
            powers = [math.exp(score - top) for score in scores]
            total = sum(powers)
            mixed = np.zeros(self.head_dim)
            for t, power in zip(range(first, row + 1), powers, strict=True):
                mixed = mixed + power / total * cells[t][1][group]
            outputs.append(mixed)
        return self.linear(np.concatenate(outputs), "layers.0.self_attn.o_proj")

    def rows(
        self, tokens: Sequence[int], hiddens: Sequence[Vector], wanted: Iterable[int]
    ) -> list[RowState]:
        """The states of the wanted rows; tokens[j] and hiddens[j] are row j's."""
        inputs = [self.layer_input(t, h) for t, h in zip(tokens, hiddens, strict=True)]
        cells = [self.key_value(x, j) for j, x in enumerate(inputs)]
        return [self._row(j, inputs[j], hiddens[j], cells) for j in wanted]

    def _row(
        self,
        row: int,
        x: Vector,
        hidden: Vector,
        cells: Sequence[tuple[Vector, Vector]],
    ) -> RowState:
        residual = hidden
        if self.config.get("norm_before_residual", False):
            residual = self.norm(hidden, "layers.0.hidden_norm")
        residual = residual + self.attention(x, row, cells)
        n = self.norm(residual, "layers.0.post_attention_layernorm")
        gate = silu(self.linear(n, "layers.0.mlp.gate_proj"))
        up = self.linear(n, "layers.0.mlp.up_proj")
        z = residual + self.linear(gate * up, "layers.0.mlp.down_proj")
        normed = self.norm(z, "norm")
        logits = self.linear(normed, "lm_head") * self.config.get("logit_scale", 1.0)
        feedback = normed if self.config.get("norm_output", False) else z
        return RowState(normed, feedback, logits)

    def target_id(self, draft_id: int) -> int:
        d2t = self.weights.get("d2t")
        return draft_id if d2t is None else draft_id + int(d2t[draft_id])

    def propose(
        self,
        tokens: Sequence[int],
        aux: Sequence[Sequence[Vector]],
        num_drafts: int,
        drawn: Sequence[int] | None = None,
    ) -> Proposal:
        """The drafts after tokens x[0 .. p]; aux[j] are the chunks of position j, j < p at least.

        Every pass starts from nothing: true rows 0 .. p - 1 and the rows fed back so far.
        ``drawn``: drafts that someone sampled, to be followed in place of the best ones.
        """
        last = len(tokens) - 1
        row_tokens = list(tokens[1:])
        hiddens = [self.fuse(aux[j]) for j in range(last)]
        drafts, states = [], []
        for s in range(num_drafts):
            (state,) = self.rows(row_tokens, hiddens, [last - 1 + s])
            best = self.target_id(int(np.argmax(state.logits)))
            drafts.append(best if drawn is None else drawn[s])
            states.append(state)
            row_tokens.append(drafts[-1])
            hiddens.append(state.feedback)
        return Proposal(drafts, states)
