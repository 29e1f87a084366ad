"""Eagle3: the draft of EAGLE3 as a Drafter.

The draft row (embedding of x_p, fc(aux of position p - 1)) stands at position p and predicts
x_(p+1). Its keys and values depend on its inputs only, so every target forward fills them for the
tokens it made certain; attention, MLP and head run on the one row per sequence that proposes.
"""

import torch
from torch import Tensor

from eaglerun.head import Head
from eaglerun.kernels.carry import store_carry
from eaglerun.kernels.draft_inputs import accepted_inputs, draft_inputs, newest_inputs
from eaglerun.kernels.noise import DRAFT, TOKEN
from eaglerun.kernels.rows import BySlot, LayerKV, Newest, Rows
from eaglerun.models.attention import DraftKV, KVRegion
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.plan.step import Admission
from eaglerun.sampling import Features, Scored, SlotRows, filtered
from eaglerun.speculative.drafter import Asked, DrafterOptions, Filled


class Eagle3:
    """The draft model, its KV, and its carries.

    kv           paged on the target's block tables
    block_carry  [num_blocks, H] fc(aux) of the last token of each block
    carry        [S + 1, H] fc(aux) of the last position computed by a prefill chunk, by slot
    """

    def __init__(
        self, model: Eagle3Llama, aux: Tensor, by_slot: BySlot, options: DrafterOptions
    ) -> None:
        """``aux`` [taps, max_rows, target hidden]: what a target forward captures; ``by_slot``:
        the state that an accept has moved on."""
        self.model = model
        self._aux = aux
        self._by_slot = by_slot
        self._options = options
        size, device, dtype = model.spec.hidden_size, aux.device, aux.dtype
        pages = (options.num_blocks, options.block_size)
        self.kv = DraftKV.allocate(model.spec, *pages, device, options.kv_dtype)
        self.block_carry = torch.empty(options.num_blocks, size, device=device, dtype=dtype)
        self.carry = torch.zeros(options.num_slots + 1, size, device=device, dtype=dtype)
        # What the drafting of a decode step begins with, at addresses that no K moves.
        tokens, positions = torch.zeros(2, options.max_batch, device=device, dtype=torch.int64)
        hidden = torch.zeros(options.max_batch, size, device=device, dtype=dtype)
        self._newest = Newest(tokens, positions, hidden)
        # The noise of drawn drafts; None: drafts are the draft's best. Invariant verification wants
        # the target's own noise, the rejection rule noise that is independent of it.
        self._stream: int | None = None
        if options.probabilistic:
            self._stream = DRAFT if options.rejection else TOKEN
        self._probs: Tensor | None = None
        if options.rejection and options.probabilistic:
            self._probs = torch.zeros(
                options.num_slots + 1,
                options.num_draft_tokens,
                model.spec.vocab_size,
                device=device,
            )

    def admit(self, admission: Admission) -> None:
        if admission.carry_block >= 0:
            self.carry[admission.slot_id] = self.block_carry[admission.carry_block]

    def fill(self, verified: Filled, proposes: bool) -> Newest:
        v = verified
        B, Q = v.emitted.shape
        fed = self._combine(B * Q, v.kv_slots)
        fill_accepted(self.model, self.kv.layer, v.emitted, fed, v.start, v.block_table)
        newest = Newest(*(t[:B] for t in self._newest))
        if proposes:
            newest_inputs(v.slots, v.accepted, v.num_propose, self._by_slot, fed, newest)
        return newest

    def fill_prompt(self, token_ids: Tensor, rows: Rows, slots: Tensor, ends: Tensor) -> Tensor:
        """Each row takes fc(aux) of the position before it.

        The first row of a chunk takes the carry that its chunk, block or preemption left behind;
        position 0 has no draft row.
        """
        assert rows.cu_seqlens is not None  # ragged
        fed = self._combine(token_ids.shape[0], rows.kv_slots)
        before = torch.cat([fed[:1], fed[:-1]])
        before[rows.cu_seqlens[:-1].long()] = self.carry[slots]
        has_row = rows.positions > 0
        self.model.fill_kv(
            token_ids,
            before,
            torch.where(has_row, rows.positions, -1),
            torch.where(has_row, rows.kv_slots, -1),
            self.kv.layer,
        )
        last = fed[ends]
        self.carry[slots] = last
        return last

    def start(
        self, tokens: Tensor, positions: Tensor, hidden: Tensor, block_table: Tensor
    ) -> Newest:
        emitted = tokens[:, None]
        fill_accepted(self.model, self.kv.layer, emitted, hidden, positions, block_table)
        return Newest(tokens, positions, hidden)

    def propose(self, asked: Asked, count: int, rows: SlotRows) -> Tensor:
        sampler = None
        if self._stream is not None and rows.features.sampled:
            sampler = Sampler(rows, self._stream)
        limit = self._options.max_model_len
        asked = asked._replace(max_seq_len=min(asked.max_seq_len, limit))
        drafts, probs = propose(self.model, self.kv.layer, asked, count, sampler)
        if probs is not None and self._probs is not None:
            self._probs[rows.slots, :count] = probs.float()
        return drafts

    def sampling(self, features: Features) -> Features | None:
        return None if self._stream is None else features

    def probs(self, slots: Tensor, count: int) -> Tensor | None:
        return None if self._probs is None else self._probs[slots, :count]

    def regions(self) -> tuple[KVRegion, ...]:
        return (*self.kv.regions(), KVRegion("draft.carry", self.block_carry, "dim"))

    def _combine(self, num_rows: int, kv_slots: Tensor) -> Tensor:
        """fc(aux) of the target's rows [num_rows, H]; the last of each block becomes its carry."""
        fed = self.model.combine(self._aux[:, :num_rows])
        store_carry(fed, kv_slots, self.block_carry, self._options.block_size)
        return fed


def fill_accepted(
    draft: Eagle3Llama,
    kv: LayerKV,
    emitted: Tensor,
    hidden: Tensor,
    start: Tensor,
    block_table: Tensor,
) -> None:
    """Draft KV of the tokens a verify emitted: token i of a sequence at position start + i.

    Shapes  emitted [B, Q] int64 (-1: none); hidden [B * Q, H], fc(aux) of the verify rows; start
            [B] int64; block_table [B, M].
    """
    ids, positions, slots = accepted_inputs(emitted, start, block_table, kv.block_size)
    draft.fill_kv(ids.view(-1), hidden, positions.view(-1), slots.view(-1), kv)


class Sampler:
    """Draws draft tokens from the draft's own distribution (probabilistic drafts)."""

    def __init__(self, rows: SlotRows, stream: int) -> None:
        self._rows = rows
        self._stream = stream

    def __call__(self, head: Head, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] for ``positions`` [B], and the distribution [B, V] they were drawn from."""
        one = logits[:, None]
        logp = filtered(one, self._rows)
        best = head.best(Scored(one, logp, positions[:, None]), self._rows, self._stream)
        return best.ids[:, 0], logp[:, 0].exp()


def propose(
    draft: Eagle3Llama, kv: LayerKV, asked: Asked, num_passes: int, sampler: Sampler | None
) -> tuple[Tensor, Tensor | None]:
    """Draft ``num_passes`` tokens after the newest token of each of B sequences, whose hidden state
    is finite.

    Returns  draft ids [B, num_passes] in the target's vocabulary, and the distributions
             [B, num_passes, vocab_size] where ``sampler`` drew them.
    """
    (tokens, position, hidden), num_propose, block_table, max_seq_len = asked
    head, bound = Head(draft.logits), block_table.shape[1] * kv.block_size
    drafts, probs = [], []
    for s in range(num_passes):
        positions, slots, seq_lens = draft_inputs(
            position, s, num_propose, block_table, kv.block_size
        )
        max_len = min(max_seq_len + s, bound)
        rows = Rows(positions.view(-1), slots.view(-1), block_table, seq_lens, max_len)
        normed, hidden = draft.forward(tokens, hidden, rows, kv)
        logits = head.logits(normed)
        if sampler is None:
            tokens = draft.to_target_ids(head.greedy(logits).ids)
        else:
            if draft.d2t is not None:
                whole = logits.new_full((len(logits), draft.spec.vocab_size), -torch.inf)
                ids = torch.arange(logits.shape[1], device=logits.device)
                logits = whole.index_copy(1, draft.to_target_ids(ids), logits)
            tokens, drawn_from = sampler(head, logits, position + s + 1)
            probs.append(drawn_from)
        drafts.append(tokens)
    return torch.stack(drafts, dim=1), torch.stack(probs, dim=1) if probs else None
