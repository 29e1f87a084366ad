"""Accept: judge the drafts of a step against the target's logits, and choose what is emitted.

Two lossless judges. *Invariant* (default): a draft stands iff it is the token that sampling
without a draft would have chosen at its place; the same seed gives the same output at any K.
*Rejection*: the classic rule of speculative sampling; the same distribution, but what a seed gives
depends on K. *Forced*, for benchmarks and tests, accepts by given rates or takes tokens from a
script; its text means nothing.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eaglerun.errors import ConfigError
from eaglerun.head import Head
from eaglerun.kernels.accept import accept, window
from eaglerun.kernels.noise import ACCEPT, RECOVER, SYNTHETIC, uniform
from eaglerun.kernels.rows import Emitted
from eaglerun.plan.step import Admission
from eaglerun.sampling import Scored, SlotRows, places, score
from eaglerun.staging import to_device


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


class Drafts(NamedTuple):
    """The drafts to be judged: up to K of B sequences.

    tokens      [B, K] int64
    num_drafts  [B] int64, how many of them are drafts; -1 on padding sequences
    probs       [B, K, V], what sampled drafts were drawn from; None where drafts are one-hot
    """

    tokens: Tensor
    num_drafts: Tensor
    probs: Tensor | None = None


class Verified(NamedTuple):
    """``final`` [B, Q, V]: what the tokens were chosen from, for processed log-probabilities."""

    emitted: Emitted
    final: Tensor


class Judge(Protocol):
    """Decides which tokens a step emits. One is chosen at start."""

    def admit(self, admission: Admission) -> None:
        """A sequence takes a slot."""

    def first(self, logits: Tensor, rows: SlotRows, start: Tensor) -> tuple[Tensor, Scored]:
        """The token [B] after each prompt, and what it was chosen from.

        Shapes  logits [B, 1, V]; start [B] int64, where the token will stand.
        """

    def judge(self, logits: Tensor, drafts: Drafts, start: Tensor, rows: SlotRows) -> Verified:
        """The drafts that stand, then the target's own token.

        Shapes  logits [B, K + 1, V], row j after the last token and d1 .. dj; start [B] int64,
                position of d1.
        """

    def drafted(self, tokens: Tensor, slots: Tensor, newest: Tensor) -> Tensor:
        """The drafts [B, K] to remember where ``tokens`` were proposed after position newest[b]."""


class Invariant:
    """A draft stands iff it is the token that the target itself would have chosen."""

    def __init__(self, head: Head) -> None:
        self.head = head

    def admit(self, admission: Admission) -> None:
        """Nothing is kept of a sequence."""

    def first(self, logits: Tensor, rows: SlotRows, start: Tensor) -> tuple[Tensor, Scored]:
        none = logits.new_zeros(logits.shape[0], 0, dtype=torch.int64)
        scored = score(logits, rows, none, start)
        return self.head.best(scored, rows).ids[:, 0], scored

    def judge(self, logits: Tensor, drafts: Drafts, start: Tensor, rows: SlotRows) -> Verified:
        scored = score(logits, rows, drafts.tokens, start)
        best = self.head.best(scored, rows)
        matches = best.ids[:, :-1] == drafts.tokens
        targets, matches = self._settle(best.ids, matches, scored, drafts, rows)
        return Verified(accept(targets, best.values, matches, drafts.num_drafts), scored.final)

    def _settle(
        self, targets: Tensor, matches: Tensor, scored: Scored, drafts: Drafts, rows: SlotRows
    ) -> tuple[Tensor, Tensor]:
        """The tokens [B, K + 1] and which drafts [B, K] match them, from the target's choices."""
        return targets, matches

    def drafted(self, tokens: Tensor, slots: Tensor, newest: Tensor) -> Tensor:
        return tokens


class Rejection(Invariant):
    """The classic rule for sampled sequences; greedy ones as Invariant."""

    def _settle(
        self, targets: Tensor, matches: Tensor, scored: Scored, drafts: Drafts, rows: SlotRows
    ) -> tuple[Tensor, Tensor]:
        K = drafts.tokens.shape[1]
        if scored.logp is None or scored.positions is None or not K:
            return targets, matches
        stands, recovered = _reject(self.head, scored.logp, drafts, scored.positions, rows)
        sampled = rows.sampled[:, None]
        matches = torch.where(sampled, stands, matches)
        judged = torch.arange(K, device=targets.device) < drafts.num_drafts[:, None]
        chosen = torch.where(stands, drafts.tokens, recovered)
        own = torch.where(sampled & judged, chosen, targets[:, :-1])
        return torch.cat([own, targets[:, -1:]], dim=1), matches


def _reject(
    head: Head, logp: Tensor, drafts: Drafts, positions: Tensor, rows: SlotRows
) -> tuple[Tensor, Tensor]:
    """The classic rule: a draft d stands iff u * q(d) < p(d), else a token of max(p - q, 0).

    With one-hot drafts q(d) = 1 and the rest is p without d. Returns matches [B, K] bool and
    recovered [B, K] int64.
    Source  Leviathan et al. 2023, arXiv:2211.17192, section 2.3.
    """
    tokens, probs = drafts.tokens, drafts.probs
    B, K = tokens.shape
    p, at = logp[:, :-1].exp(), positions[:, :-1]
    u = uniform(rows.seeds(K), at.reshape(-1), ACCEPT).view(B, K)
    p_draft = p.gather(2, tokens[:, :, None])[:, :, 0]
    if probs is None:
        q_draft = torch.ones_like(p_draft)
        rest = p.scatter(2, tokens[:, :, None], 0.0)
    else:
        q_draft = probs.gather(2, tokens[:, :, None])[:, :, 0].to(p.dtype)
        rest = (p - probs.to(p.dtype)).clamp(min=0)
    return u * q_draft < p_draft, head.draw(rest.log(), at, rows, RECOVER).ids


class Script:
    """Tokens by position for the sequence in each slot.

    tokens  [S, L] int64
    write   (seed, L) -> the script of a sequence: seeded random tokens. Tests and benchmarks put
            their own here.
    """

    def __init__(self, num_slots: int, length: int, vocab_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_slots, length, dtype=torch.int64, device=device)
        self.write: Callable[[int, int], Tensor] = partial(random_script, vocab_size)

    def admit(self, admission: Admission) -> None:
        written = self.write(admission.seed, self.tokens.shape[1])
        self.tokens[admission.slot_id] = to_device(written, self.tokens.device)

    def read(self, slots: Tensor, start: Tensor, count: int) -> Tensor:
        """``count`` tokens from position ``start`` [B] on: [B, count]."""
        return window(self.tokens, slots, start, count)


def random_script(vocab_size: int, seed: int, length: int) -> Tensor:
    """``length`` seeded random tokens."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randint(vocab_size, (length,), generator=generator)


class Forced:
    """Takes acceptance, drafts or tokens from elsewhere, for benchmarks and tests.

    rates   [K] float64, the conditional acceptance probability of each draft, whatever the target
            says; None: the drafts are judged
    script  stands in for the drafts; None: they are the draft's
    tokens  the script also takes the place of the target's choices
    """

    def __init__(
        self, rule: Invariant, rates: Tensor | None, script: Script | None, tokens: bool
    ) -> None:
        self._rule = rule
        self._rates = rates
        self._script = script
        self._tokens = script if tokens else None

    def admit(self, admission: Admission) -> None:
        if self._script is not None:
            self._script.admit(admission)

    def first(self, logits: Tensor, rows: SlotRows, start: Tensor) -> tuple[Tensor, Scored]:
        chosen, scored = self._rule.first(logits, rows, start)
        if self._tokens is not None:
            chosen = self._tokens.read(rows.slots, start, 1)[:, 0]
        return chosen, scored

    def judge(self, logits: Tensor, drafts: Drafts, start: Tensor, rows: SlotRows) -> Verified:
        if self._rates is None and self._tokens is None:
            return self._rule.judge(logits, drafts, start, rows)
        Q, head = logits.shape[1], self._rule.head
        scored = score(logits, rows, drafts.tokens, start)
        if self._rates is None:
            best = head.best(scored, rows)
        else:
            best = head.greedy(scored.logits)
        targets = best.ids if self._tokens is None else self._tokens.read(rows.slots, start, Q)
        if self._rates is None:
            matches = targets[:, :-1] == drafts.tokens
        else:
            positions = places(start, Q) if scored.positions is None else scored.positions
            u = uniform(rows.seeds(Q - 1), positions[:, :-1].reshape(-1), SYNTHETIC)
            matches = u.view(drafts.tokens.shape) < self._rates[: Q - 1]
            if self._tokens is None:
                own = torch.where(matches, drafts.tokens, targets[:, :-1])
                targets = torch.cat([own, targets[:, -1:]], dim=1)
        return Verified(accept(targets, best.values, matches, drafts.num_drafts), scored.final)

    def drafted(self, tokens: Tensor, slots: Tensor, newest: Tensor) -> Tensor:
        if self._script is None:
            return tokens
        return self._script.read(slots, newest + 1, tokens.shape[1])
