"""Propose: the EAGLE3 draft's part of a step.

The draft row (embedding of x_p, fc(aux of position p - 1)) stands at position p and predicts
x_(p+1). Its keys and values depend on its inputs only, so every target forward fills them for the
tokens it made certain; attention, MLP and head run on the one row per sequence that proposes.
"""

import torch
from torch import Tensor

from eaglerun.kernels.draft_inputs import accepted_inputs, draft_inputs
from eaglerun.kernels.noise import DRAFT, TOKEN
from eaglerun.kernels.rows import LayerKV, Newest, Rows
from eaglerun.kernels.vocab_argmax import vocab_argmax
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.sampling import SlotRows, draw, filtered


def fill_accepted(
    draft: Eagle3Llama,
    kv: LayerKV,
    emitted: Tensor,
    hidden: Tensor,
    length: Tensor,
    block_table: Tensor,
) -> None:
    """Draft KV of the tokens a verify emitted: token i of a sequence at position length + i.

    Shapes  emitted [B, Q] int64 (-1: none); hidden [B * Q, H], fc(aux) of the verify rows; length
            [B] int64 before the step; block_table [B, M].
    """
    ids, positions, slots = accepted_inputs(emitted, length, block_table, kv.block_size)
    draft.fill_kv(ids.view(-1), hidden, positions.view(-1), slots.view(-1), kv)


class Sampler:
    """Draws draft tokens from the draft's own distribution (probabilistic drafts)."""

    def __init__(self, rows: SlotRows, rejection: bool) -> None:
        self._rows = rows
        # Drafter-invariant verification wants the target's own noise; the rejection rule noise
        # that is independent of it.
        self._stream = DRAFT if rejection else TOKEN

    def __call__(self, logits: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B] for ``positions`` [B], and the distribution [B, V] they were drawn from."""
        one = logits[:, None]
        logp = filtered(one, self._rows)
        tokens = draw(one, logp, self._rows, positions[:, None], self._stream)
        return tokens[:, 0], logp[:, 0].exp()


def propose(
    draft: Eagle3Llama,
    kv: LayerKV,
    newest: Newest,
    num_propose: Tensor,
    num_passes: int,
    block_table: Tensor,
    max_seq_len: int,
    sampler: Sampler | None,
) -> tuple[Tensor, Tensor | None]:
    """Draft ``num_passes`` tokens after the newest token of each of B sequences.

    Shapes  newest of B, its hidden finite; num_propose [B] int64, passes that count for the
            sequence (later rows are padding); block_table [B, M]; max_seq_len: upper bound of
            position + 1. Returns draft ids [B, num_passes] in the target's vocabulary, and the
            distributions [B, num_passes, vocab_size] where ``sampler`` drew them.
    """
    tokens, position, hidden = newest
    bound = block_table.shape[1] * kv.block_size
    drafts, probs = [], []
    for s in range(num_passes):
        positions, slots, seq_lens = draft_inputs(
            position, s, num_propose, block_table, kv.block_size
        )
        max_len = min(max_seq_len + s, bound)
        rows = Rows(positions.view(-1), slots.view(-1), block_table, seq_lens, max_len)
        normed, hidden = draft.forward(tokens, hidden, rows, kv)
        logits = draft.logits(normed)
        if sampler is None:
            tokens = draft.to_target_ids(vocab_argmax(logits))
        else:
            if draft.d2t is not None:
                whole = logits.new_full((len(logits), draft.spec.vocab_size), -torch.inf)
                ids = torch.arange(logits.shape[1], device=logits.device)
                logits = whole.index_copy(1, draft.to_target_ids(ids), logits)
            tokens, drawn_from = sampler(logits, position + s + 1)
            probs.append(drawn_from)
        drafts.append(tokens)
    return torch.stack(drafts, dim=1), torch.stack(probs, dim=1) if probs else None
