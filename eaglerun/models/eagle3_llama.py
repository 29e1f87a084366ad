"""The EAGLE3 draft: one Llama layer over the target's hidden states."""

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.table import check_ranks
from eaglerun.checkpoint.weights import UNDIVIDED, Share, draft_weights
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.draft_fuse import embed_dual_rmsnorm, group_rmsnorm
from eaglerun.kernels.kv_store import draft_kv_fill, draft_kv_store
from eaglerun.kernels.reference import wide
from eaglerun.kernels.rows import LayerKV, Rows
from eaglerun.kernels.swiglu_oai import swiglu
from eaglerun.models.allocation import Allocation
from eaglerun.models.layers import Embedding, Linear, Norm, Rope


class DraftAttention(nn.Module):
    """qkv_proj over [embedding | hidden] (rows q, k, v) and o_proj."""

    def __init__(self, weights: Allocation) -> None:
        super().__init__()
        bias = "qkv_proj.bias"
        self.q_rows = weights.rows("qkv_proj.weight", "q")
        self.all_rows = weights.rows("qkv_proj.weight", "q", "k", "v")
        self.qkv_proj = Linear(
            weights.parameter("qkv_proj.weight"),
            weights.parameter(bias) if bias in weights else None,
        )
        self.o_proj = Linear(weights.parameter("o_proj.weight"))


class DraftMLP(nn.Module):
    """down(silu(gate) * up); gate rows, then up rows."""

    def __init__(self, weights: Allocation) -> None:
        super().__init__()
        self.gate_up_proj = Linear(weights.parameter("gate_up_proj.weight"))
        self.down_proj = Linear(weights.parameter("down_proj.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        out: Tensor = self.down_proj(swiglu(self.gate_up_proj(x)))
        return out


class DraftLayer(nn.Module):
    def __init__(self, weights: Allocation, eps: float) -> None:
        super().__init__()
        self.hidden_norm = Norm(weights.parameter("hidden_norm.weight"), eps)
        self.input_layernorm = Norm(weights.parameter("input_layernorm.weight"), eps)
        self.self_attn = DraftAttention(weights.under("self_attn"))
        self.post_attention_layernorm = Norm(
            weights.parameter("post_attention_layernorm.weight"), eps
        )
        self.mlp = DraftMLP(weights.under("mlp"))


class Eagle3Llama(nn.Module):
    """The draft. A row at position p >= 1 pairs the token of p with the hidden state of p - 1
    (the target's, through combine, or its own feedback) and predicts the token of p + 1. Its
    K and V lie at the kv_slot of p, it rotates by p - 1, and it sees the rows 1 .. p.

    max_positions  rows of the rope table; the checkpoint's own limit when None. Positions past
                   the table rotate as its last.
    share          what this process holds of every weight. The modules compute with all of them
                   only: of a part there is no forward yet
    """

    d2t: Tensor | None

    def __init__(
        self,
        spec: DraftSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int | None = None,
        share: Share = UNDIVIDED,
    ) -> None:
        """Raises  ValueError on toggles that exclude one another; ConfigError where so many
        ranks cannot divide the weights."""
        super().__init__()
        _check(spec)
        self.spec = spec
        self.share = share
        table, eps = draft_weights(spec, share.whole_embedding), spec.rms_norm_eps
        check_ranks(share.size, table)
        weights = Allocation(table, device, dtype, share.rank, share.size)

        def norm(name: str) -> Norm | None:
            return Norm(weights.parameter(name), eps) if name in weights else None

        self.embed_tokens = Embedding(weights.parameter("embed_tokens.weight"))
        self.fc = Linear(weights.parameter("fc.weight")) if "fc.weight" in weights else None
        self.fc_norm = norm("fc_norm.weight")
        self.input_norm = norm("input_norm.weight")
        self.layer = DraftLayer(weights.under("layer"), eps)
        self.norm = Norm(weights.parameter("norm.weight"), eps)
        self.lm_head = Linear(
            self.embed_tokens.weight
            if spec.tie_word_embeddings
            else weights.parameter("lm_head.weight")
        )
        self.register_buffer("d2t", weights.tensor("d2t") if "d2t" in weights else None)
        self.rope = Rope(
            max_positions or spec.max_position_embeddings,
            spec.head_dim,
            spec.rope_theta,
            dtype,
        )

    def combine(self, aux: Tensor) -> Tensor:
        """The target's tapped states, aux [taps, N, target hidden] -> hidden [N, hidden]."""
        if self.fc is None:
            return aux[0]
        chunks = aux.transpose(0, 1)
        if self.fc_norm is not None:
            joined = group_rmsnorm(chunks, self.fc_norm.weight, self.fc_norm.eps)
        else:
            joined = chunks.flatten(1)
        if self.input_norm is not None:
            joined = self.input_norm(joined)
        hidden: Tensor = self.fc(joined)
        return hidden

    def fill_kv(
        self, token_ids: Tensor, hidden: Tensor, positions: Tensor, kv_slots: Tensor, kv: LayerKV
    ) -> None:
        """Write K and V of the rows (token_ids [N], hidden [N, hidden]) with a kv_slot.

        One layer's K and V depend on its input alone, so no attention, MLP or head runs.
        """
        attention = self.layer.self_attn
        joined = self._join(token_ids, hidden)
        weight, bias = attention.qkv_proj.rows_of(attention.q_rows, attention.all_rows)
        table = self.rope.table(joined.device)
        draft_kv_fill(joined, weight, bias, positions, kv_slots, table, kv)

    def forward(
        self, token_ids: Tensor, hidden: Tensor, rows: Rows, kv: LayerKV
    ) -> tuple[Tensor, Tensor]:
        """token_ids [N], hidden [N, hidden] -> (normed f, feedback), both [N, hidden].

        f goes to logits, feedback is the hidden of the next pass. Rows of padding (position -1)
        give some finite numbers; their hidden must be finite too.
        Writes  K and V of the rows with a kv_slot.
        """
        joined = self._join(token_ids, hidden)
        if self.spec.norm_before_residual:
            hidden = joined[:, self.spec.hidden_size :]
        attention = self.layer.self_attn
        table = self.rope.table(joined.device)
        qkv: Tensor = attention.qkv_proj(joined)
        q = draft_kv_store(qkv, rows, table, kv)
        scale = self.spec.head_dim**-0.5
        attended = attention_dense(q, kv, rows, scale, 1, self.spec.sliding_window)
        x: Tensor = attention.o_proj(attended.flatten(1))
        x, residual = self.layer.post_attention_layernorm.add(x, hidden)
        x = self.layer.mlp(x)
        normed, residual = self.norm.add(x, residual)
        return normed, normed if self.spec.norm_output else residual

    def logits(self, normed: Tensor) -> Tensor:
        """normed [M, hidden] -> [M, draft_vocab] in the model's dtype; times logit_scale, where
        that is not 1, in float32 (float64 in a float64 model)."""
        logits: Tensor = self.lm_head(normed)
        scale = self.spec.logit_scale
        return logits if scale == 1.0 else wide(logits) * scale

    def to_target_ids(self, ids: Tensor) -> Tensor:
        """Draft vocabulary ids as the target's: id + d2t[id]."""
        return ids if self.d2t is None else ids + self.d2t[ids]

    def _join(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        layer = self.layer
        return embed_dual_rmsnorm(
            token_ids,
            self.embed_tokens.weight,
            hidden,
            layer.input_layernorm.weight,
            layer.hidden_norm.weight,
            layer.hidden_norm.eps,
        )


def _check(spec: DraftSpec) -> None:
    if spec.fc_norm and spec.norm_before_fc:
        raise ValueError("fc_norm and norm_before_fc: one norm stands before fc, not two")
    if not spec.use_aux_hidden_state:
        if spec.fc_norm or spec.norm_before_fc:
            raise ValueError("use_aux_hidden_state is false: there is no fc to norm before")
        if len(spec.taps) != 1 or spec.target_hidden_size != spec.hidden_size:
            raise ValueError(
                f"use_aux_hidden_state is false: one tap of width {spec.hidden_size} is the "
                f"hidden state, got {len(spec.taps)} of width {spec.target_hidden_size}"
            )
    if spec.tie_word_embeddings and spec.draft_vocab_size != spec.vocab_size:
        raise ValueError(
            f"tie_word_embeddings: a head of {spec.draft_vocab_size} rows is not the embedding "
            f"of {spec.vocab_size}"
        )
