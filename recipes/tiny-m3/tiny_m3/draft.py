"""The EAGLE3 draft: one Llama layer over (embedding of the next token, hidden state).

Parameter names are those of the hub's LlamaForCausalLMEagle3 checkpoints, so state_dict() is the
file. Letters as in model.py; T target taps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_m3.model import rope_tables, rotate


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """Sizes of the draft; the defaults are tiny-m3's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    taps: tuple[int, ...] = (2, 4, 7)
    width: int = 384
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    max_len: int = 2048
    norm_eps: float = 1e-6


class PlainNorm(nn.Module):
    """x / rms(x) * w, in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * self.weight.float()).to(x.dtype)


class DraftAttention(nn.Module):
    """Projections of the draft's attention; their input is twice as wide."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        c = config
        self.q_proj = nn.Linear(2 * c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)


class DraftMlp(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.width, bias=False)
        self.down_proj = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """The single layer; input_layernorm is for embeddings, hidden_norm for the carried state."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = PlainNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = PlainNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = PlainNorm(config.hidden_size, config.norm_eps)
        self.self_attn = DraftAttention(config)
        self.mlp = DraftMlp(config)

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        earlier: list[tuple[Tensor, Tensor]],
        visible: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """embedded, hidden [B, S, D] -> (output before the last norm, this pass's keys, values).

        earlier holds keys and values [B, G, S, d] of the passes before. A row of pass s attends
        to pass 0 where visible [B, 1, S, S] says, to one row of each pass between, and to itself:
        what a chain of s drafted tokens finds in the cache when it is served.
        """
        c, a = self.config, self.self_attn
        x = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], -1)
        q = rotate(_heads(a.q_proj(x), c.num_heads), *rope)
        k = rotate(_heads(a.k_proj(x), c.num_kv_heads), *rope)
        v = _heads(a.v_proj(x), c.num_kv_heads)
        passes = [*earlier, (k, v)]
        num_rows = q.shape[2]
        grouped = q.unflatten(1, (c.num_kv_heads, -1))  # [B, G, R, S, d]
        k0, v0 = passes[0]
        scores = (grouped.flatten(2, 3) @ k0.transpose(-1, -2)).unflatten(2, (-1, num_rows))
        scores = scores.float().masked_fill(~visible[:, :, None], -torch.inf)
        # Pass i of a chain whose pass s sits on row r sat on row r - s + i.
        diagonal = [_shift(ki, len(earlier) - i) for i, (ki, _) in enumerate(passes) if i > 0]
        columns = [(grouped * ki[:, :, None]).float().sum(-1, keepdim=True) for ki in diagonal]
        probs = (torch.cat([scores, *columns], -1) * c.head_dim**-0.5).softmax(-1).to(v.dtype)
        out = (probs[..., :num_rows].flatten(2, 3) @ v0).unflatten(2, (-1, num_rows))
        for i, (_, vi) in enumerate(passes[1:], 1):
            shifted = _shift(vi, len(earlier) - i)[:, :, None]
            out = out + probs[..., num_rows + i - 1, None] * shifted
        residual = hidden + a.o_proj(out.flatten(1, 2).transpose(1, 2).flatten(2))
        return residual + self.mlp(self.post_attention_layernorm(residual)), (k, v)


class Eagle3Draft(nn.Module):
    """LlamaForCausalLMEagle3 with fc_norm and norm_output."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.fc = nn.Linear(len(config.taps) * d, d, bias=False)
        self.fc_norm = nn.ModuleList(PlainNorm(d, config.norm_eps) for _ in config.taps)
        self.layers = nn.ModuleList([DraftLayer(config)])
        self.norm = PlainNorm(d, config.norm_eps)
        self.lm_head = nn.Linear(d, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, embed: Tensor, head: Tensor, seed: int) -> None:
        """The target's embedding and head; fan-in scaling elsewhere."""
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_(0.5)
        self.embed_tokens.weight.copy_(embed)
        self.lm_head.weight.copy_(head)

    def combine(self, aux: list[Tensor]) -> Tensor:
        """fc over the normed taps, T x [B, S, D] -> [B, S, D]."""
        normed = [n(a) for n, a in zip(self.fc_norm, aux, strict=True)]
        return self.fc(torch.cat(normed, -1))

    def passes(
        self,
        next_ids: Tensor,
        aux: list[Tensor],
        positions: Tensor,
        num_passes: int,
        run_layer: Callable[..., Any] | None = None,
    ) -> list[Tensor]:
        """Training-time test: the feedback states [B, S, D] of each pass, ready for lm_head.

        Row r holds next_ids[r] = x_{r+1} and, in pass 0, the taps of position r. In pass s it is
        the s-th step of the chain that began on row r - s, fed with that chain's own state of
        the pass before, never with the target's. run_layer: a compiled layer, to be faster.
        """
        c = self.config
        layer = run_layer or self.layers[0]
        embedded = self.embed_tokens(next_ids)
        rope = rope_tables(positions, c.head_dim, c.rope_theta)
        index = torch.arange(positions.shape[1], device=positions.device)
        start = index - positions
        same = start[:, :, None] == start[:, None, :]
        hidden = self.combine(aux)
        earlier: list[tuple[Tensor, Tensor]] = []
        states: list[Tensor] = []
        for s in range(num_passes):
            if s:
                hidden = F.pad(states[-1], (0, 0, 1, 0))[:, :-1]
            # A chain that would have begun before its chat sees the first row, to stay finite.
            reach = torch.maximum(index - s, start)
            visible = same & (index <= reach[:, :, None])
            z, kv = layer(embedded, hidden, rope, earlier, visible[:, None])
            earlier.append(kv)
            states.append(self.norm(z))
        return states


def _heads(x: Tensor, num: int) -> Tensor:
    """[B, S, num * d] -> [B, num, S, d]."""
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def _shift(x: Tensor, rows: int) -> Tensor:
    """Row r of the result is row r - rows of x [B, G, S, d]; the first rows are zero."""
    return F.pad(x, (0, 0, rows, 0))[:, :, : x.shape[2]] if rows else x
