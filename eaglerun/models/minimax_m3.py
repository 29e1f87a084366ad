"""MiniMax-M3's text model over paged memory: token ids in, hidden states, aux taps, logits out."""

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.table import check_ranks
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import UNDIVIDED, Share, target_weights
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.index_topk import index_topk
from eaglerun.kernels.kv_store import kv_store
from eaglerun.kernels.rows import HeadNorms, LayerKV, Rows
from eaglerun.models.allocation import Allocation
from eaglerun.models.attention import TargetKV
from eaglerun.models.layers import Embedding, GemmaNorm, Linear, Rope
from eaglerun.models.moe import DenseMLP, MoE


class BlockSelector(nn.Module):
    """Which blocks of keys a row attends to; it has no weights."""

    def __init__(self, spec: TargetSpec) -> None:
        super().__init__()
        self.topk = spec.sparse_topk_blocks
        self.block_size = spec.sparse_block_size
        self.init_blocks = spec.sparse_init_blocks
        self.local_blocks = spec.sparse_local_blocks

    def forward(self, index_q: Tensor, kv: LayerKV, rows: Rows) -> Tensor | None:
        """index_q [N, G, Di] -> [N, G, topk] int32; None where no sequence has more blocks than
        a row may select: all are selected then, and no score is needed."""
        if rows.max_seq_len <= self.topk * self.block_size:
            return None
        return index_topk(index_q, kv, rows, self.topk, self.init_blocks, self.local_blocks)


class Attention(nn.Module):
    """One layer's attention: dense, sparse with its own selection, or sparse with a shared one.

    qkv_proj holds the rows q, k, v and, in a sparse layer, index q and index k. A layer that
    shares another's selection keeps its index weights (the checkpoint has them) and reads none.
    """

    def __init__(self, spec: TargetSpec, layer: int, weights: Allocation) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.sparse = spec.sparse_layers[layer]
        self.computes_index = self.sparse and not spec.index_shared[layer]
        eps = spec.rms_norm_eps
        self.main_rows = weights.rows("qkv_proj.weight", "q", "k", "v")
        self.qkv_proj = Linear(weights.parameter("qkv_proj.weight"))
        self.o_proj = Linear(weights.parameter("o_proj.weight"))
        self.q_norm = GemmaNorm(weights.parameter("q_norm.weight"), eps)
        self.k_norm = GemmaNorm(weights.parameter("k_norm.weight"), eps)
        if self.sparse:
            self.index_q_norm = GemmaNorm(weights.parameter("index_q_norm.weight"), eps)
            self.index_k_norm = GemmaNorm(weights.parameter("index_k_norm.weight"), eps)
            self.selector = BlockSelector(spec)

    def forward(
        self,
        x: Tensor,
        rows: Rows,
        kv: TargetKV,
        rope_table: Tensor,
        block_ids: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [N, hidden] -> ([N, hidden], the selection now in force).

        block_ids  selection of the last sparse layer that computed one; None before it, and
                   where all blocks are selected
        """
        own = kv.layers[self.layer]
        qkv: Tensor = (
            self.qkv_proj(x) if self.computes_index else self.qkv_proj.rows(x, 0, self.main_rows)
        )
        q, index_q = kv_store(qkv, rows, self._norms(), rope_table, own)
        if index_q is not None:
            block_ids = self.selector(index_q, own, rows)
        scale = self.spec.head_dim**-0.5
        if self.sparse and block_ids is not None:
            attended = attention_sparse(q, own, block_ids, rows, scale)
        else:
            attended = attention_dense(q, own, rows, scale)
        out: Tensor = self.o_proj(attended.flatten(1))
        return out, block_ids

    def _norms(self) -> HeadNorms:
        main = (self.q_norm.weight, self.k_norm.weight, self.spec.rms_norm_eps)
        if not self.computes_index:
            return HeadNorms(*main)
        return HeadNorms(*main, self.index_q_norm.weight, self.index_k_norm.weight)


class DecoderLayer(nn.Module):
    """norm, attention, norm, feed-forward over a residual stream handed on as (x, residual)."""

    def __init__(self, spec: TargetSpec, layer: int, weights: Allocation) -> None:
        super().__init__()
        eps, mlp = spec.rms_norm_eps, MoE if spec.moe_layers[layer] else DenseMLP
        self.input_layernorm = GemmaNorm(weights.parameter("input_layernorm.weight"), eps)
        self.self_attn = Attention(spec, layer, weights.under("self_attn"))
        self.post_attention_layernorm = GemmaNorm(
            weights.parameter("post_attention_layernorm.weight"), eps
        )
        self.mlp: MoE | DenseMLP = mlp(spec, weights.under("mlp"))

    def enter(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The normed input of attention, and the completed residual stream. x is the sublayer
        output not yet added; None where the stream is whole."""
        if x is None:
            normed: Tensor = self.input_layernorm(residual)
            return normed, residual
        return self.input_layernorm.add(x, residual)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rows: Rows,
        kv: TargetKV,
        rope_table: Tensor,
        block_ids: Tensor | None,
        num_experts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What enter returned -> (feed-forward output, residual, selection in force)."""
        x, block_ids = self.self_attn(x, rows, kv, rope_table, block_ids)
        x, residual = self.post_attention_layernorm.add(x, residual)
        if isinstance(self.mlp, MoE):
            return self.mlp(x, rows.positions, num_experts), residual, block_ids
        return self.mlp(x), residual, block_ids


class MiniMaxM3(nn.Module):
    """The target. Parameters are created empty; a loader fills them.

    taps           layers whose entering residual stream a forward copies out; num_hidden_layers
                   stands for the stream before the last norm
    max_positions  rows of the rope table; the checkpoint's own limit when None
    share          what this process holds of every weight. The modules compute with all of them
                   only: of a part there is no forward yet
    """

    def __init__(
        self,
        spec: TargetSpec,
        taps: tuple[int, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int | None = None,
        share: Share = UNDIVIDED,
    ) -> None:
        """Raises  ValueError on a tap outside 0 .. num_hidden_layers, index heads that are not
        the KV heads, or a layer that shares a selection nobody computed before it; ConfigError
        where so many ranks cannot divide the weights."""
        super().__init__()
        _check(spec, taps)
        self.spec = spec
        self.taps = taps
        self.share = share
        table = target_weights(spec, share.whole_experts)
        check_ranks(share.size, table)
        weights = Allocation(table, device, dtype, share.rank, share.size)
        self.embed_tokens = Embedding(weights.parameter("embed_tokens.weight"))
        self.layers = nn.ModuleList(
            DecoderLayer(spec, i, weights.under(f"layers.{i}"))
            for i in range(spec.num_hidden_layers)
        )
        self.norm = GemmaNorm(weights.parameter("norm.weight"), spec.rms_norm_eps)
        self.lm_head = Linear(
            self.embed_tokens.weight
            if spec.tie_word_embeddings
            else weights.parameter("lm_head.weight")
        )
        self.rope = Rope(
            max_positions or spec.max_position_embeddings,
            spec.rotary_dim,
            spec.rope_theta,
            dtype,
        )

    def forward(
        self,
        token_ids: Tensor,
        rows: Rows,
        kv: TargetKV,
        aux: Tensor | None = None,
        num_experts: Tensor | None = None,
    ) -> Tensor:
        """token_ids [N] -> hidden states after the last norm [N, hidden].

        Writes  K, V and index K of the rows with a kv_slot; aux[j, :N] = the residual stream
                entering layer taps[j], where aux is [num_taps, max_rows, hidden];
                num_experts [1] int64 += the distinct experts visited, layer by layer.
        Rows of padding (position -1) need valid token ids; they write no KV, visit no expert and
        change no other row.
        """
        residual: Tensor = self.embed_tokens(token_ids)
        x: Tensor | None = None
        block_ids: Tensor | None = None
        rope_table = self.rope.table(residual.device)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            x, residual = layer.enter(x, residual)
            self._tap(i, residual, aux)
            x, residual, block_ids = layer(
                x, residual, rows, kv, rope_table, block_ids, num_experts
            )
        assert x is not None, "a model of no layers"
        hidden, residual = self.norm.add(x, residual)
        self._tap(len(self.layers), residual, aux)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [M, hidden] -> [M, vocab] in the model's dtype: a greedy choice reads no more,
        and what computes with them widens them first."""
        logits: Tensor = self.lm_head(hidden)
        return logits

    def _tap(self, layer: int, residual: Tensor, aux: Tensor | None) -> None:
        if aux is not None and layer in self.taps:
            aux[self.taps.index(layer), : residual.shape[0]].copy_(residual)


def _check(spec: TargetSpec, taps: tuple[int, ...]) -> None:
    if any(not 0 <= tap <= spec.num_hidden_layers for tap in taps) or len(set(taps)) < len(taps):
        raise ValueError(f"taps {taps}: distinct layers of 0 .. {spec.num_hidden_layers}")
    if not any(spec.sparse_layers):
        return
    if spec.num_index_heads != spec.num_key_value_heads:
        raise ValueError(
            f"num_index_heads {spec.num_index_heads}: each of the "
            f"{spec.num_key_value_heads} KV heads has its own selection"
        )
    if spec.index_shared[spec.sparse_layers.index(True)]:
        raise ValueError("index_shared: the first sparse layer has no selection to share")
