"""Drafter: what a decode step and a prefill ask of a draft, whatever the method."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from eaglerun.kernels.rows import Newest, Rows
from eaglerun.models.attention import KVRegion
from eaglerun.plan.step import Admission
from eaglerun.sampling import Features, SlotRows


@dataclass(frozen=True, slots=True)
class DrafterOptions:
    """Sizes of a drafter's memory, and how its tokens are chosen.

    max_batch      sequences of the largest decode step
    probabilistic  draw tokens from the draft's own distribution; False: its best
    rejection      keep those distributions, for the rejection rule
    """

    num_slots: int
    num_blocks: int
    block_size: int
    max_batch: int
    max_model_len: int
    num_draft_tokens: int
    kv_dtype: torch.dtype
    probabilistic: bool
    rejection: bool


class Filled(NamedTuple):
    """What a verify of B sequences with Q rows made certain.

    emitted      [B, Q] int64, the tokens, -1 where there is none
    accepted     [B] int64, drafts that stand
    start        [B] int64, position of the first token
    kv_slots     [B * Q] int64, of the verify's rows
    slots        [B] int64
    num_propose  [B] int64, 0 where nothing is proposed
    block_table  [B, M] int32
    """

    emitted: Tensor
    accepted: Tensor
    start: Tensor
    kv_slots: Tensor
    slots: Tensor
    num_propose: Tensor
    block_table: Tensor


class Asked(NamedTuple):
    """After which tokens to draft.

    num_propose  [B] int64, passes that count for a sequence: later rows are padding
    block_table  [B, M] int32
    max_seq_len  upper bound of the newest tokens' positions + 1
    """

    newest: Newest
    num_propose: Tensor
    block_table: Tensor
    max_seq_len: int


class Drafter(Protocol):
    """A draft model with all that it remembers. An engine without a draft has none.

    ``aux`` [taps, rows, H] is what the target's last forward captured for it.
    """

    def admit(self, admission: Admission) -> None:
        """A sequence takes a slot."""

    def fill(self, verified: Filled, proposes: bool) -> Newest:
        """Draft KV of the tokens that became certain; the newest of each sequence, where the
        drafting begins. Its tensors have one address for a batch size, whatever Q, and what they
        hold means nothing unless the step ``proposes``."""

    def fill_prompt(self, token_ids: Tensor, rows: Rows, slots: Tensor, ends: Tensor) -> Tensor:
        """Draft KV of the chunks' rows; the hidden state [chunks, H] of each chunk's last row.

        Shapes  token_ids [N]; rows ragged; slots [chunks], ends [chunks] int64, last rows.
        """

    def start(
        self, tokens: Tensor, positions: Tensor, hidden: Tensor, block_table: Tensor
    ) -> Newest:
        """Draft KV of the tokens [B] that were sampled after a prompt, with the hidden state
        [B, H] of the row before each."""

    def propose(self, asked: Asked, count: int, rows: SlotRows) -> Tensor:
        """Drafts [B, count] in the target's vocabulary."""

    def sampling(self, features: Features) -> Features | None:
        """The features that change which kernels a propose launches; None where none does."""

    def probs(self, slots: Tensor, count: int) -> Tensor | None:
        """What the last ``count`` drafts [B, count, V] of the slots were drawn from; None where
        drafts are one-hot."""

    def regions(self) -> tuple[KVRegion, ...]:
        """Every memory that holds something for each block: what a transfer must move."""
