"""MiniMax-M3's text model as a trainer wants it: whole rows, masks instead of gathers.

Every product is dense: attention scores all keys and masks, the MoE runs all experts and weighs
them (16 narrow experts cost less so than the sorting that would skip twelve of them). The numbers
are those of the sparse forms; `check_target.py` compares with transformers' minimax_m3_vl.

Letters: B rows, S tokens of a row, Q query tokens, D hidden, H query heads, G KV heads (also index
heads), R = H / G, d head width, N key blocks, E experts, F expert width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """Sizes of the target; the defaults are tiny-m3's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_dense_layers: int = 2  # the first layers: full attention and a dense MLP
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    rotary_dim: int = 16
    rope_theta: float = 10_000.0
    dense_width: int = 320
    shared_width: int = 64
    expert_width: int = 64
    num_experts: int = 16
    experts_per_token: int = 4
    routed_scale: float = 2.0
    index_dim: int = 32
    block_size: int = 16
    topk_blocks: int = 4
    max_len: int = 2048
    norm_eps: float = 1e-6
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has block-sparse attention and routed experts."""
        return layer >= self.num_dense_layers


@dataclass(slots=True)
class LayerCache:
    """Keys and values by position, [B, G, max, d], and index keys [B, 1, max, index_dim]."""

    k: Tensor
    v: Tensor
    index_k: Tensor


class GemmaNorm(nn.Module):
    """x / rms(x) * (1 + w), in fp32, rounded once."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).to(x.dtype)


def rope_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, S, rotary_dim / 2] of positions [B, S]."""
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device).float() / rotary_dim
    angle = positions[:, None, :, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the first rotary dims of x [B, heads, S, d]: halves (j, j + rotary / 2)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def swiglu_oai(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """(clamp(up) + 1) * g * sigmoid(alpha g), g clamped from above only."""
    gate = gate.clamp(max=limit)
    up = up.clamp(-limit, limit)
    return (up + 1.0) * gate * torch.sigmoid(alpha * gate)


def among_top(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest of the last dim; of equal scores the lower index wins."""
    if not torch.compiler.is_compiling():
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, True)
    # Ranks by pairwise comparison fuse into one kernel, where a sort would not.
    index = torch.arange(scores.shape[-1], device=scores.device)
    other, mine = scores[..., None, :], scores[..., :, None]
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return before.sum(-1) < k


class DenseMlp(nn.Module):
    """SwiGLU-OAI MLP; gate rows first, then up rows."""

    def __init__(self, config: TargetConfig, width: int) -> None:
        super().__init__()
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(swiglu_oai(gate, up, self.alpha, self.limit))


class Moe(nn.Module):
    """Sigmoid router with a selection bias, E narrow experts, one shared expert."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        e, f, d = config.num_experts, config.expert_width, config.hidden_size
        self.gate = nn.Parameter(torch.empty(e, d))
        self.bias = nn.Buffer(torch.zeros(e))
        self.w13 = nn.Parameter(torch.empty(e, 2 * f, d))
        self.w2 = nn.Parameter(torch.empty(e, d, f))
        self.shared = DenseMlp(config, config.shared_width)

    def forward(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, S, D], counted [B, S] bool -> (output, counted tokens of each expert [E])."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            score = torch.sigmoid(x.float() @ self.gate.float().T)  # [B, S, E]
        chosen = among_top(score.detach() + self.bias, c.experts_per_token)
        weight = score * chosen
        weight = weight / weight.sum(-1, keepdim=True) * c.routed_scale
        gate_up = F.linear(x, self.w13.flatten(0, 1)).unflatten(-1, (c.num_experts, -1))
        gate, up = gate_up.chunk(2, -1)
        act = swiglu_oai(gate, up, c.swiglu_alpha, c.swiglu_limit) * weight[..., None].to(x.dtype)
        w2 = self.w2.transpose(0, 1).flatten(1)  # [D, E * F]
        load = (chosen & counted[..., None]).flatten(0, -2).sum(0)
        return F.linear(act.flatten(-2), w2) + self.shared(x), load


class Attention(nn.Module):
    """GQA with per-head norms and partial RoPE; with an indexer, over selected blocks only."""

    def __init__(self, config: TargetConfig, sparse: bool) -> None:
        super().__init__()
        self.config, self.sparse = config, sparse
        c = config
        self.q = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = GemmaNorm(c.head_dim, c.norm_eps)
        self.k_norm = GemmaNorm(c.head_dim, c.norm_eps)
        if sparse:
            self.index_q = nn.Linear(c.hidden_size, c.num_kv_heads * c.index_dim, bias=False)
            self.index_k = nn.Linear(c.hidden_size, c.index_dim, bias=False)
            self.index_q_norm = GemmaNorm(c.index_dim, c.norm_eps)
            self.index_k_norm = GemmaNorm(c.index_dim, c.norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor,
        query_block: Tensor,
        full_rows: Tensor,
        cache: LayerCache | None,
        write_at: Tensor | None,
        train_indexer: bool,
    ) -> tuple[Tensor, Tensor]:
        """x [B, Q, D] -> (output, loss of the indexer).

        visible [B, 1, Q, S] bool: same chat and causal;  query_block [B, Q]: key block of a query;
        full_rows [B] bool: rows that attend without block selection;  with a cache, keys are
        written at write_at [B, Q] and the whole cache is attended.
        """
        c = self.config
        q = rotate(self.q_norm(_heads(self.q(x), c.num_heads)), *rope)
        k = rotate(self.k_norm(_heads(self.k(x), c.num_kv_heads)), *rope)
        v = _heads(self.v(x), c.num_kv_heads)
        index_q = index_k = None
        if self.sparse:
            # The indexer learns from its own loss alone: the model never sees its gradient.
            y = x.detach()
            index_q = rotate(self.index_q_norm(_heads(self.index_q(y), c.num_kv_heads)), *rope)
            index_k = rotate(self.index_k_norm(_heads(self.index_k(y), 1)), *rope)
        if cache is not None:
            assert write_at is not None
            k, v = _write(cache.k, k, write_at), _write(cache.v, v, write_at)
            index_k = None if index_k is None else _write(cache.index_k, index_k, write_at)
        b, g, num_q = x.shape[0], c.num_kv_heads, x.shape[1]
        grouped = q.unflatten(1, (g, -1)).flatten(2, 3)  # [B, G, R * Q, d]
        scores = (grouped @ k.transpose(-1, -2)).unflatten(2, (-1, num_q))  # [B, G, R, Q, S]
        scores = scores.float() * c.head_dim**-0.5
        allowed = visible[:, :, None]
        loss = scores.new_zeros(())
        if index_q is not None and index_k is not None:
            block_scores = self._block_scores(index_q, index_k, visible)
            num_blocks = block_scores.shape[-1]
            blocks = torch.arange(num_blocks, device=x.device)
            local = blocks == query_block[:, None, :, None]
            forced = block_scores.detach().masked_fill(local, torch.inf)
            keep = among_top(forced, c.topk_blocks) | full_rows[:, None, None, None]
            keep = keep[..., None].expand(*keep.shape, c.block_size).flatten(-2)
            keep = keep[..., : visible.shape[-1]]
            if train_indexer:
                loss = self._index_loss(scores.detach(), visible, block_scores, local)
            allowed = allowed & keep[:, :, None]
        probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype)
        out = (probs.flatten(2, 3) @ v).unflatten(2, (-1, num_q))  # [B, G, R, Q, d]
        out = out.permute(0, 3, 1, 2, 4).reshape(b, num_q, -1)
        return self.o(out), loss

    def _block_scores(self, index_q: Tensor, index_k: Tensor, visible: Tensor) -> Tensor:
        """Best index score of every key block, [B, G, Q, N], -inf where nothing is visible."""
        scores = (index_q @ index_k.transpose(-1, -2)).float().masked_fill(~visible, -torch.inf)
        pad = -scores.shape[-1] % self.config.block_size
        scores = F.pad(scores, (0, pad), value=-torch.inf) if pad else scores
        return scores.unflatten(-1, (-1, self.config.block_size)).amax(-1)

    def _index_loss(
        self, scores: Tensor, visible: Tensor, block_scores: Tensor, local: Tensor
    ) -> Tensor:
        """Cross-entropy of the block scores against the attention mass of the blocks.

        The mass is that of full attention, so that a block which the selection misses still
        pulls; the local block is always selected and left out on both sides. A query counts by
        the mass that lies outside its local block.
        """
        c = self.config
        probs = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).mean(2)
        pad = -probs.shape[-1] % c.block_size
        probs = F.pad(probs, (0, pad)) if pad else probs
        mass = probs.unflatten(-1, (-1, c.block_size)).sum(-1)  # [B, G, Q, N]
        choices = ~local & (block_scores > -torch.inf)
        logits = (block_scores * c.index_dim**-0.5).masked_fill(~choices, -1e9)
        nats = -(mass * choices * logits.log_softmax(-1)).sum(-1)
        return nats.mean()


def _heads(x: Tensor, num: int) -> Tensor:
    """[B, S, num * d] -> [B, num, S, d]."""
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def _write(cache: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """cache [B, G, max, d][b, :, at[b, i]] = new [B, G, Q, d][b, :, i], in place."""
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None]
    cache.transpose(1, 2)[rows, at] = new.transpose(1, 2).to(cache.dtype)
    return cache


class Layer(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: TargetConfig, index: int) -> None:
        super().__init__()
        sparse = config.is_sparse(index)
        self.input_norm = GemmaNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, sparse)
        self.post_norm = GemmaNorm(config.hidden_size, config.norm_eps)
        self.mlp = Moe(config) if sparse else DenseMlp(config, config.dense_width)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        visible: Tensor,
        query_block: Tensor,
        full_rows: Tensor,
        counted: Tensor,
        cache: LayerCache | None = None,
        write_at: Tensor | None = None,
        train_indexer: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, Q, D] -> (x, index loss, expert loads [E] or empty)."""
        attended, loss = self.attention(
            self.input_norm(x), rope, visible, query_block, full_rows, cache, write_at,
            train_indexer,
        )  # fmt: skip
        x = x + attended
        y = self.post_norm(x)
        if isinstance(self.mlp, Moe):
            out, load = self.mlp(y, counted)
        else:
            out, load = self.mlp(y), torch.zeros(0, device=x.device)
        return x + out, loss, load


class TinyM3(nn.Module):
    """The target. `taps` of forward: layers whose input residual stream is returned."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_layers))
        self.norm = GemmaNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fan-in scaling; projections into the residual stream are smaller with depth."""
        generator = torch.Generator().manual_seed(seed)
        into_residual = (2 * self.config.num_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim < 2:
                # Sharp attention needs long queries and keys: start some of the way there.
                p.fill_(0.3 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0)
                continue
            std = p.shape[-1] ** -0.5
            if name == "embed.weight":
                std = 0.25
            elif name == "head.weight":
                std = 0.02
            elif name.endswith((".o.weight", ".down.weight", ".w2")):
                std *= into_residual
            p.copy_(torch.randn(p.shape, generator=generator) * std)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        full_rows: Tensor,
        taps: tuple[int, ...] = (),
        caches: list[LayerCache] | None = None,
        train_indexer: bool = False,
    ) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """ids, positions [B, S] -> (normed last hidden [B, S, D], taps, index loss, loads).

        Without caches a row may hold several chats (corpus.Rows); with caches a row is one chat
        and ids are its next tokens.
        """
        c = self.config
        x = self.embed(ids)
        rope = rope_tables(positions, c.rotary_dim, c.rope_theta)
        if caches is None:
            visible, query_block = packed_visibility(positions, c.block_size)
        else:
            keys = torch.arange(caches[0].k.shape[2], device=ids.device)
            visible = (keys <= positions[:, :, None])[:, None]
            query_block = positions // c.block_size
        tapped: list[Tensor] = []
        loads: list[Tensor] = []
        index_loss = torch.zeros((), device=ids.device)
        for i, layer in enumerate(self.layers):
            if i in taps:
                tapped.append(x)
            cache = caches[i] if caches is not None else None
            at = positions if caches is not None else None
            x, loss, load = layer(
                x, rope, visible, query_block, full_rows, positions > 0, cache, at,
                train_indexer and c.is_sparse(i),
            )  # fmt: skip
            index_loss = index_loss + loss
            if c.is_sparse(i):
                loads.append(load)
        return self.norm(x), tapped, index_loss, loads

    def make_caches(self, batch: int, max_len: int, device: torch.device) -> list[LayerCache]:
        """Empty fp32 caches for `batch` rows of at most max_len tokens."""
        c = self.config

        def zeros(heads: int, width: int) -> Tensor:
            return torch.zeros(batch, heads, max_len, width, device=device)

        return [
            LayerCache(
                zeros(c.num_kv_heads, c.head_dim),
                zeros(c.num_kv_heads, c.head_dim),
                zeros(1, c.index_dim if c.is_sparse(i) else 0),
            )
            for i in range(c.num_layers)
        ]


def packed_visibility(positions: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """(visible [B, 1, S, S], query_block [B, S]) of packed rows.

    Tokens of one chat share `index - position`. Chats start at block boundaries, so blocks of
    the row are blocks of the chat.
    """
    index = torch.arange(positions.shape[1], device=positions.device)
    start = index - positions
    same = start[:, :, None] == start[:, None, :]
    visible = same & (index[:, None] >= index[None, :])
    return visible[:, None], (index // block_size).expand_as(positions)
