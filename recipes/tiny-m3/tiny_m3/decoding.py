"""Batched generation with a cache, for evaluation and for the draft's training text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_m3.model import LayerCache, TinyM3


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0 is greedy; seed makes the draws of a batch repeatable."""

    max_new: int
    temperature: float = 0.0
    seed: int = 0
    full_attention: bool = False


# Attention scores of one layer of a prompt's forward: what limits a batch of long prompts.
MAX_SCORES = 2_000_000_000


@torch.no_grad()
def generate(
    model: TinyM3, prompts: Sequence[Sequence[int]], sampling: Sampling, eos: int, batch: int
) -> list[list[int]]:
    """Continuations of `prompts`, each up to and including eos, at most max_new tokens.

    Prompts of similar length share a batch; the order of the result is that of the input.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        longest = len(prompts[order[start]])
        scores = model.config.num_heads * longest * longest
        size = max(1, min(batch, MAX_SCORES // scores))
        part = order[start : start + size]
        texts = _generate_batch(model, [prompts[i] for i in part], sampling, eos)
        for i, text in zip(part, texts, strict=True):
            out[i] = text
        start += size
    return out


def _generate_batch(
    model: TinyM3, prompts: list[Sequence[int]], sampling: Sampling, eos: int
) -> list[list[int]]:
    device = model.embed.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = max(len(p) for p in prompts)
    b = len(prompts)
    ids = torch.full((b, longest), eos, device=device)
    for i, p in enumerate(prompts):
        ids[i, : len(p)] = torch.tensor(list(p), device=device)
    rows = torch.arange(b, device=device)
    full = torch.full((b,), sampling.full_attention, device=device)
    table = torch.full((b, sampling.max_new), eos, device=device)
    # Padding behind a short prompt writes keys that no query sees before they are overwritten.
    caches = model.make_caches(b, _round_up(longest + sampling.max_new), device)
    positions = torch.arange(longest, device=device).expand(b, -1)
    used = _first(caches, longest)
    hidden = model(ids, positions, full, caches=used)[0][rows, lengths - 1]
    generator = torch.Generator(device).manual_seed(sampling.seed)
    done = torch.zeros(b, dtype=torch.bool, device=device)
    for i in range(sampling.max_new):
        token = choose(model.head(hidden), sampling.temperature, generator)
        table[rows, i] = torch.where(done, eos, token)
        done |= token == eos
        if i % 16 == 15 and (left := int((~done).sum())) < 0.7 * len(rows):
            if not left:
                break
            # Finished rows leave the batch: outputs differ widely in length.
            keep = (~done).nonzero()[:, 0]
            rows, lengths, full, token, done = (t[keep] for t in (rows, lengths, full, token, done))
            caches = [LayerCache(c.k[keep], c.v[keep], c.index_k[keep]) for c in caches]
        used = _first(caches, longest + i + 1)
        hidden = model(token[:, None], (lengths + i)[:, None], full, caches=used)[0][:, 0]
    return [_until(row, eos) for row in table.tolist()]


def _round_up(n: int) -> int:
    return -(-n // 64) * 64


def _first(caches: list[LayerCache], n: int) -> list[LayerCache]:
    """Views of the first n positions, and a few more: later ones are not used yet."""
    n = _round_up(n)
    return [LayerCache(c.k[:, :, :n], c.v[:, :, :n], c.index_k[:, :, :n]) for c in caches]


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token a row from logits [B, V]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    probs = (logits.float() / temperature).softmax(-1)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def _until(row: list[int], eos: int) -> list[int]:
    return row[: row.index(eos) + 1] if eos in row else row
