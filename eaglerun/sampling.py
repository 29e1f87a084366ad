"""What the sampling parameters make of logits: penalties, masks, filters; the draw is Head's.

The token at absolute position t of a sequence is argmax_v(log p_t(v) + g(seed, t, v)), where p_t
is the target's distribution after penalties and filters and g is counter-based Gumbel noise
(kernels/reference/noise.py); greedy sequences have no noise. It does not depend on what was
drafted, which makes speculative output equal plain output, token for token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from eaglerun.kernels.reference import wide
from eaglerun.messages import MAX_LOGIT_BIAS, SamplingParams
from eaglerun.staging import host_tensor, to_host


class SamplingState:
    """Sampling parameters and accepted history of every slot; the last row is the padding slot.

    Shapes (S slots + 1, V vocabulary): scalars [S + 1]; bias_ids, bias_values [S + 1, 300]
    (id -1: none); stop_ids [S + 1, 64 + EOS ids] (-1: none); output_counts [S + 1, V] int32;
    prompt_bits [S + 1, ceil(V / 32)] int32; num_generated [S + 1] int64.
    """

    def __init__(
        self, num_slots: int, vocab_size: int, max_stop_ids: int, device: torch.device
    ) -> None:
        rows = num_slots + 1
        # The scalars of a slot are a column of each, so that an admission is a copy of each.
        self._floats = torch.zeros(6, rows, dtype=torch.float32, device=device)
        (
            self.temperature,
            self.top_p,
            self.min_p,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        ) = self._floats.unbind()
        self.top_p.fill_(1.0)
        self.repetition_penalty.fill_(1.0)
        self._integers = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.top_k, self.seed, self.min_tokens, self.num_generated = self._integers.unbind()

        def none(width: int) -> Tensor:
            return torch.full((rows, width), -1, dtype=torch.int64, device=device)

        self.bias_ids = none(MAX_LOGIT_BIAS)
        self.bias_values = torch.zeros(rows, MAX_LOGIT_BIAS, device=device)
        self.stop_ids = none(max_stop_ids)
        self.output_counts = torch.zeros(rows, vocab_size, dtype=torch.int32, device=device)
        words = -(-vocab_size // 32)
        self.prompt_bits = torch.zeros(rows, words, dtype=torch.int32, device=device)
        self.vocab_size = vocab_size
        self.params: list[SamplingParams | None] = [None] * rows

    def admit(
        self,
        slot: int,
        params: SamplingParams,
        seed: int,
        stop_ids: tuple[int, ...],
        prompt_ids: tuple[int, ...],
        output_ids: tuple[int, ...],
        num_generated: int,
    ) -> None:
        """Take over a slot; the histories are empty where no penalty needs them. The host waits
        for no copy."""
        self.params[slot] = p = params
        device = self.seed.device
        penalties = (p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
        floats = (p.temperature, p.top_p, p.min_p, *penalties)
        self._floats[:, slot] = host_tensor(floats, device, torch.float32)
        integers = (p.top_k, seed, p.min_tokens, num_generated)
        self._integers[:, slot] = host_tensor(integers, device)
        # Cleared always: a batch with any bias reads the rows of all its slots.
        self.bias_ids[slot] = -1
        if params.logit_bias:
            ids = host_tensor(tuple(params.logit_bias), device)
            values = host_tensor(tuple(params.logit_bias.values()), device, torch.float32)
            self.bias_ids[slot, : len(ids)] = ids
            self.bias_values[slot, : len(ids)] = values
        if params.min_tokens:
            self.stop_ids[slot] = -1
            self.stop_ids[slot, : len(stop_ids)] = host_tensor(stop_ids, device)
        if params.penalized:
            self.output_counts[slot] = 0
            if output_ids:
                ids = host_tensor(output_ids, device)
                ones = torch.ones_like(ids, dtype=torch.int32)
                self.output_counts[slot].scatter_add_(0, ids, ones)
            self.prompt_bits[slot] = 0
            if prompt_ids:
                ids = host_tensor(sorted(set(prompt_ids)), device)
                bits = torch.bitwise_left_shift(torch.ones_like(ids), ids % 32)
                words = torch.zeros(self.prompt_bits.shape[1], dtype=torch.int64, device=device)
                words.scatter_add_(0, ids // 32, bits)
                self.prompt_bits[slot] = words.to(torch.int32)

    def rows(self, slots: Tensor, features: "Features") -> "SlotRows":
        """Those of a batch's ``slots`` [B]."""
        return SlotRows(self, slots, features)

    def features(self, slots: Sequence[int]) -> "Features":
        """What the sequences in ``slots`` need."""
        params = [self.params[slot] for slot in slots]
        return Features.of([p for p in params if p is not None])

    def add_tokens(self, slots: Tensor, tokens: Tensor, count: bool) -> None:
        """Note newly accepted tokens; ``count`` them where a penalty needs it.

        Shapes  slots [B]; tokens [B, Q] int64, -1 where a row emitted none.
        """
        self.num_generated.index_add_(0, slots, (tokens >= 0).sum(dim=1))
        if count:
            self.count_tokens(slots, tokens)

    def count_tokens(self, slots: Tensor, tokens: Tensor) -> None:
        """The part of add_tokens that penalties need."""
        flat = slots[:, None] * self.vocab_size + tokens.clamp(min=0)
        self.output_counts.view(-1).scatter_add_(0, flat.view(-1), (tokens >= 0).view(-1).int())


@dataclass(frozen=True, slots=True)
class Features:
    """What the rows of one batch need, so that what nobody asked for costs nothing."""

    bias: bool
    penalties: bool
    min_tokens: bool
    sampled: bool
    min_p: bool
    ranked: bool  # top_k or top_p

    @staticmethod
    def of(params: list[SamplingParams]) -> "Features":
        drawn = [p for p in params if not p.greedy]
        return Features(
            bias=any(p.logit_bias for p in params),
            penalties=any(p.penalized for p in params),
            min_tokens=any(p.min_tokens for p in params),
            sampled=bool(drawn),
            min_p=any(p.min_p > 0 for p in drawn),
            ranked=any(p.top_k > 0 or p.top_p < 1 for p in drawn),
        )


class SlotRows:
    """The sampling parameters of one batch's slots [B], and what its rows need of them.

    Each is gathered when it is first asked for, and once for all moves that are handed the same
    SlotRows: what nobody asks for costs nothing. The histories are read through state and slots,
    for their rows are as wide as the vocabulary and are let go at once.
    """

    def __init__(self, state: SamplingState, slots: Tensor, features: Features) -> None:
        self.state = state
        self.slots = slots
        self.features = features

    @cached_property
    def temperature(self) -> Tensor:
        return self.state.temperature[self.slots]

    @cached_property
    def min_p(self) -> Tensor:
        return self.state.min_p[self.slots]

    @cached_property
    def top_k(self) -> Tensor:
        return self.state.top_k[self.slots]

    @cached_property
    def top_p(self) -> Tensor:
        return self.state.top_p[self.slots]

    @cached_property
    def seed(self) -> Tensor:
        return self.state.seed[self.slots]

    @cached_property
    def sampled(self) -> Tensor:
        """Which sequences are not greedy."""
        return self.temperature > 0

    def seeds(self, count: int) -> Tensor:
        """The seed of each of ``count`` rows a sequence: [B * count]."""
        return self.seed[:, None].expand(-1, count).reshape(-1)


def adjust(logits: Tensor, rows: SlotRows, drafts: Tensor) -> Tensor:
    """Logits after logit_bias, penalties and the min_tokens mask.

    Row j of a sequence counts the accepted history plus its drafted prefix d1 .. dj:
      repetition  l / r if l > 0 else l * r, for tokens of the prompt or the output
      frequency   l - f * count;  presence  l - p * [count > 0], output tokens only

    Shapes  logits [B, Q, V]; rows of B; drafts [B, Q - 1] int64. Returns [B, Q, V]: the very
            logits where nobody asked for a change, else a new tensor of at least float32.
    Source  OpenAI's API reference (frequency, presence); Keskar et al. 2019, arXiv:1909.05858,
            section 4.1 (repetition, in the signed form of the Hugging Face library).
    """
    B, Q, V = logits.shape
    state, slots, features = rows.state, rows.slots, rows.features
    if features.bias or features.penalties or features.min_tokens:
        logits = wide(logits)
    if features.bias:
        ids, values = state.bias_ids[slots], state.bias_values[slots]
        bias = torch.zeros(B, V + 1, dtype=logits.dtype, device=logits.device)
        bias.scatter_(1, torch.where(ids >= 0, ids, V), values.to(logits.dtype))
        logits = logits + bias[:, None, :V]
    if features.penalties:
        logits = _penalize(logits, rows, drafts)
    if features.min_tokens:
        row = torch.arange(Q, device=logits.device)
        early = state.num_generated[slots][:, None] + row < state.min_tokens[slots][:, None]
        ids = state.stop_ids[slots]
        stop = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
        stop.scatter_(1, torch.where(ids >= 0, ids, V), True)
        logits = logits.masked_fill(early[:, :, None] & stop[:, None, :V], -torch.inf)
    return logits


def _penalize(logits: Tensor, rows: SlotRows, drafts: Tensor) -> Tensor:
    B, Q, V = logits.shape
    state, slots = rows.state, rows.slots
    counts = state.output_counts[slots].to(logits.dtype)[:, None, :].repeat(1, Q, 1)
    for j in range(Q - 1):
        # Draft j + 1 is part of the history of every later row.
        one = torch.ones(B, Q - 1 - j, 1, dtype=logits.dtype, device=logits.device)
        at = drafts[:, j, None, None].expand(B, Q - 1 - j, 1)
        counts[:, j + 1 :].scatter_add_(2, at, one)
    token = torch.arange(V, device=logits.device)
    prompt = (state.prompt_bits[slots][:, token // 32] >> (token % 32).int()) & 1

    def of(values: Tensor) -> Tensor:
        return values[slots].to(logits.dtype)[:, None, None]

    seen = (counts > 0) | prompt.bool()[:, None, :]
    r = of(state.repetition_penalty)
    logits = torch.where(seen, torch.where(logits > 0, logits / r, logits * r), logits)
    logits = logits - of(state.frequency_penalty) * counts
    return logits - of(state.presence_penalty) * (counts > 0)


def filtered(logits: Tensor, rows: SlotRows) -> Tensor:
    """Log-probabilities of the distribution that is sampled: temperature, min_p, top_k, top_p.

    min_p keeps p >= min_p * max p; top_k the k largest; top_p the smallest set of the largest
    whose probability reaches top_p. Among equals at a boundary the lower id stays. Filters work
    one after the other, each on the renormalised rest. Greedy rows are not filtered.

    Shapes  logits [B, Q, V]; rows of B; returns [B, Q, V] of at least float32, -inf where
            filtered out.
    """
    logits = wide(logits)
    features = rows.features
    temperature = rows.temperature.to(logits.dtype)[:, None, None]
    sampled = rows.sampled[:, None, None]
    raw = logits
    # The largest becomes 0 first: a tiny temperature would overflow it, and inf - inf is NaN.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    logits = logits / torch.where(sampled, temperature, 1.0)
    if features.min_p:
        min_p = rows.min_p.to(logits.dtype)[:, None, None]
        floor = logits.amax(dim=-1, keepdim=True) + torch.log(min_p)
        logits = torch.where(logits < floor, -torch.inf, logits)
    if features.ranked:
        V = logits.shape[-1]
        top_k = rows.top_k[:, None, None]
        top_p = rows.top_p.to(logits.dtype)[:, None, None]
        ordered, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        rank = torch.arange(V, device=logits.device)
        drop = (rank >= top_k) & (top_k > 0)
        ordered = ordered.masked_fill(drop, -torch.inf)
        probs = torch.softmax(ordered, dim=-1)
        drop = (probs.cumsum(dim=-1) - probs >= top_p) & (top_p < 1) & (rank > 0)
        ordered = ordered.masked_fill(drop, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, ids, ordered)
    return torch.log_softmax(torch.where(sampled, logits, raw), dim=-1)


class Scored(NamedTuple):
    """All that a choice of tokens needs to know of B sequences with Q rows each.

    logits     [B, Q, V] after bias, penalties and the min_tokens mask
    logp       [B, Q, V] after temperature and filters; None where every sequence is greedy
    positions  [B, Q] int64 of the tokens to be chosen, the key of their noise; None with logp
    """

    logits: Tensor
    logp: Tensor | None = None
    positions: Tensor | None = None

    @property
    def final(self) -> Tensor:
        """What the tokens are chosen from: for processed log-probabilities."""
        return self.logits if self.logp is None else self.logp


def score(logits: Tensor, rows: SlotRows, drafts: Tensor, start: Tensor) -> Scored:
    """Shapes  logits [B, Q, V]; rows of B; drafts [B, Q - 1] int64; start [B] int64, position of
    the token that a sequence's first row chooses."""
    logits = adjust(logits, rows, drafts)
    if not rows.features.sampled:
        return Scored(logits)
    return Scored(logits, filtered(logits, rows), places(start, logits.shape[1]))


def places(start: Tensor, count: int) -> Tensor:
    """Positions start[b] + j of ``count`` tokens: [B, count]."""
    first = start[:, None]
    return first if count == 1 else first + torch.arange(count, device=start.device)


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Log-probabilities of R rows: the chosen token's, its rank (0 = best), the best ``n``."""

    chosen: Tensor  # [R]
    rank: Tensor  # [R]
    top_ids: Tensor  # [R, n]
    top: Tensor  # [R, n]

    def leaving(self) -> "LogprobRows":
        """The same on their way to the host: reading these there waits for no later step."""
        return LogprobRows(
            to_host(self.chosen), to_host(self.rank), to_host(self.top_ids), to_host(self.top)
        )


def logprobs_of(logits: Tensor, tokens: Tensor, count: int) -> LogprobRows:
    """log-softmax of ``logits`` [R, V] at ``tokens`` [R] (-1: anything) and its ``count`` best."""
    logp = torch.log_softmax(wide(logits), dim=-1)
    chosen = logp.gather(1, tokens.clamp(min=0)[:, None])
    rank = (logp > chosen).sum(dim=1)
    top, top_ids = torch.topk(logp, count, dim=-1)
    return LogprobRows(chosen[:, 0], rank, top_ids, top)
