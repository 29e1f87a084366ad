"""Accept: judge the drafts of a step against the target's logits, and choose what is emitted.

Two lossless rules. *invariant* (default): a draft stands iff it is the token that sampling
without a draft would have chosen at its place; the same seed gives the same output at any K.
*rejection*: the classic rule of speculative sampling; the same distribution, but what a seed gives
depends on K. Synthetic acceptance forces a given mean length for benchmarks; its text means
nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eaglerun.errors import ConfigError
from eaglerun.kernels.accept import accept
from eaglerun.kernels.noise import ACCEPT, RECOVER, SYNTHETIC, gumbel_argmax, uniform
from eaglerun.sampling import SlotRows, adjust, draw, filtered, greedy


def synthetic_rates(length: float, num_draft_tokens: int) -> tuple[float, ...]:
    """Conditional acceptance probability of each position for a mean acceptance length.

    The minimum-variance schedule: with x = length - 1 and f = floor(x), f positions always
    stand, the next with probability x - f, the others never.
    Raises  ConfigError if length is not in [1, K + 1].
    Source  vLLM 0.33, vllm/config/speculative.py, the unconditional rates [1]*f + [x-f] + [0]...
    """
    k = num_draft_tokens
    if not 1 <= length <= k + 1:
        raise ConfigError(f"synthetic_acceptance_length = {length}: allowed 1 to {k + 1} (K + 1)")
    whole = int(length - 1)
    rates = ([1.0] * whole + [length - 1 - whole] + [0.0] * k)[:k]
    before = [1.0, *rates]
    return tuple(r / b if b else 0.0 for r, b in zip(rates, before, strict=False))


@dataclass(frozen=True, slots=True)
class Verified:
    """emitted [B, Q] int64 (-1: none), accepted [B] int64, scored [B, Q, V]: the logits after
    penalties and filters, for processed log-probabilities."""

    emitted: Tensor
    accepted: Tensor
    scored: Tensor


class Drafts(NamedTuple):
    """The drafts to be judged: up to K of B sequences.

    tokens      [B, K] int64
    num_drafts  [B] int64, how many of them are drafts; -1 on padding sequences
    probs       [B, K, V], what sampled drafts were drawn from; None where drafts are one-hot
    """

    tokens: Tensor
    num_drafts: Tensor
    probs: Tensor | None = None


def verify(
    logits: Tensor,
    drafts: Drafts,
    length: Tensor,
    rows: SlotRows,
    rejection: bool,
    synthetic: Tensor | None,
    script: Tensor | None = None,
) -> Verified:
    """Judge the drafts.

    Shapes  logits [B, K + 1, V], row j after the last token and d1 .. dj; length [B] int64, last
            token included; synthetic [K] float64, conditional acceptance rates that replace
            judgement; script [B, K + 1] int64, tokens that take the place of the target's choices.
    """
    Q, tokens = logits.shape[1], drafts.tokens
    logits = adjust(logits, rows, tokens)
    logp = filtered(logits, rows) if rows.features.sampled else None
    scored = logits if logp is None else logp
    if synthetic is None and logp is None:
        targets = greedy(logits)
        matches = (targets if script is None else script)[:, :-1] == tokens
    elif synthetic is not None:
        positions = length[:, None] + torch.arange(Q, device=logits.device)
        targets, matches = _synthetic(logits, tokens, positions, rows, synthetic)
    else:
        positions = length[:, None] + torch.arange(Q, device=logits.device)
        targets = draw(logits, logp, rows, positions)
        matches = (targets if script is None else script)[:, :-1] == tokens
        if rejection and logp is not None and Q > 1:
            stands, recovered = _reject(logp, drafts, positions, rows)
            sampled = rows.sampled[:, None]
            matches = torch.where(sampled, stands, matches)
            judged = torch.arange(Q - 1, device=logits.device) < drafts.num_drafts[:, None]
            chosen = torch.where(stands, tokens, recovered)
            targets = torch.cat(
                [torch.where(sampled & judged, chosen, targets[:, :-1]), targets[:, -1:]], dim=1
            )
    if script is not None:
        targets = script
    emitted, accepted = accept(targets, matches, drafts.num_drafts)
    return Verified(emitted, accepted, scored)


def _reject(
    logp: Tensor, drafts: Drafts, positions: Tensor, rows: SlotRows
) -> tuple[Tensor, Tensor]:
    """The classic rule: a draft d stands iff u * q(d) < p(d), else a token of max(p - q, 0).

    With one-hot drafts q(d) = 1 and the rest is p without d. Returns matches [B, K] bool and
    recovered [B, K] int64.
    Source  Leviathan et al. 2023, arXiv:2211.17192, section 2.3.
    """
    tokens, probs = drafts.tokens, drafts.probs
    B, K = tokens.shape
    V = logp.shape[-1]
    p = logp[:, :-1].exp()
    at, seeds = positions[:, :-1].reshape(-1), rows.seeds(K)
    u = uniform(seeds, at, ACCEPT).view(B, K)
    p_draft = p.gather(2, tokens[:, :, None])[:, :, 0]
    if probs is None:
        q_draft = torch.ones_like(p_draft)
        rest = p.scatter(2, tokens[:, :, None], 0.0)
    else:
        q_draft = probs.gather(2, tokens[:, :, None])[:, :, 0].to(p.dtype)
        rest = (p - probs.to(p.dtype)).clamp(min=0)
    recovered = gumbel_argmax(rest.log().view(-1, V), seeds, at, RECOVER)
    return u * q_draft < p_draft, recovered.view(B, K)


def _synthetic(
    logits: Tensor, tokens: Tensor, positions: Tensor, rows: SlotRows, rates: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept draft j with probability rates[j] whatever the target says; else its argmax."""
    best = greedy(logits)
    B, K = tokens.shape
    u = uniform(rows.seeds(K), positions[:, :-1].reshape(-1), SYNTHETIC).view(B, K)
    matches = u < rates[:K]
    targets = torch.cat([torch.where(matches, tokens, best[:, :-1]), best[:, -1:]], dim=1)
    return targets, matches
