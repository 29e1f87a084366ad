"""Words for tensors that belong together: what the ops take instead of each tensor by itself.

Each is a tuple, made where its tensors are made and handed on whole.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """N query rows of B sequences, in one of two forms.

    Row n of sequence b is the query at positions[n] and sees the keys t <= positions[n] with
    t < seq_lens[b]. Uniform (decode, verify): N // B rows for every sequence, padding included, so
    that row n belongs to n // (N // B). Ragged (prefill): rows cu_seqlens[b] .. cu_seqlens[b + 1]
    belong to sequence b; rows past the last belong to none.

    positions     [N] int64, absolute; -1 on rows of padding
    kv_slots      [N] int64, where a row's own key goes: block * block_size + offset; -1: nowhere
    block_tables  [B, M] int32; entries past a sequence's blocks are -1 or any block
    seq_lens      [B] int32, keys visible after this forward's writes; 0 for padding sequences
    max_seq_len   upper bound of seq_lens, at most M * block_size
    cu_seqlens    [B + 1] int32, the running sum of q_lens for the kernels; None: uniform rows
    q_lens        rows of each sequence, for the host; () of uniform rows
    """

    positions: Tensor
    kv_slots: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    max_seq_len: int
    cu_seqlens: Tensor | None = None
    q_lens: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Rows of the sequence that has most."""
        if self.cu_seqlens is not None:
            return max(self.q_lens, default=0)
        return self.positions.shape[0] // max(self.block_tables.shape[0], 1)

    def misfit(self) -> bool:
        """True if the form contradicts itself: uniform rows that are no multiple of the sequences,
        or ragged ones whose sums are not of those sequences."""
        num_sequences = self.block_tables.shape[0]
        if self.cu_seqlens is None:
            return self.positions.shape[0] % max(num_sequences, 1) != 0
        return (
            len(self.q_lens) != num_sequences
            or self.cu_seqlens.shape != (num_sequences + 1,)
            or not self.cu_seqlens.is_contiguous()
        )


class LayerKV(NamedTuple):
    """One layer's paged memory.

    k, v     [num_blocks, block_size, G, D]
    index_k  [num_blocks, block_size, Di]; None where the layer computes no selection
    """

    k: Tensor
    v: Tensor
    index_k: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.k.shape[1]

    def index_keys(self, op: str) -> Tensor:
        """Raises  ValueError, in the name of ``op``, for a layer that has no index keys."""
        if self.index_k is None:
            raise ValueError(f"{op}: this layer has no index keys")
        return self.index_k


class HeadNorms(NamedTuple):
    """The per-head norms of one layer's queries and keys: weights of gemma_rmsnorm.

    q, k              [D]
    index_q, index_k  [Di]; None where the layer computes no selection
    """

    q: Tensor
    k: Tensor
    eps: float
    index_q: Tensor | None = None
    index_k: Tensor | None = None


class Routing(NamedTuple):
    """Which experts each row visits, and with what weight.

    ids      [N, topk] int32; -1 visits nobody
    weights  [N, topk] fp32 (fp64 in a model of float64)
    """

    ids: Tensor
    weights: Tensor


class Experts(NamedTuple):
    """The weights of one layer's experts: those that rows are routed to, and the shared one.

    w13          [E, 2 I, H], gate rows then up rows
    w2           [E, H, I]
    shared_up    [2 Is, H], as w13's; shared_down [H, Is]; both None where there is none
    """

    w13: Tensor
    w2: Tensor
    shared_up: Tensor | None = None
    shared_down: Tensor | None = None


class Newest(NamedTuple):
    """The start of drafting, for each of B sequences.

    tokens     [B] int64, the newest token
    positions  [B] int64, where it stands
    hidden     [B, H], fc(aux) of the position before
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor


class BySlot(NamedTuple):
    """What the device remembers of each of S slots between steps, for the kernels of a step.

    length        [S] int64, tokens known so far, the newest one (not yet in KV) included
    last_token    [S] int64, the newest token
    draft_tokens  [S, K] int64, proposed after it
    block_table   [S, M] int32
    """

    length: Tensor
    last_token: Tensor
    draft_tokens: Tensor
    block_table: Tensor


class Best(NamedTuple):
    """The best token of each row, and how good it is.

    pairs  [..., 2] int64: the bits of the value as a float64, then the id. Both lie side by side,
           so that ranks that hold a part of the vocabulary each exchange them at once.
    """

    pairs: Tensor

    @property
    def values(self) -> Tensor:
        """[...] float64; of a row with a NaN not finite."""
        return self.pairs.view(torch.float64)[..., 0]

    @property
    def ids(self) -> Tensor:
        """[...] int64"""
        return self.pairs[..., 1]


class Emitted(NamedTuple):
    """What a verify makes of each of B sequences.

    tokens    [B, Q] int64, the accepted drafts and the target's own token, then -1
    accepted  [B] int64, how many drafts stand
    broken    [B] int64, 1 where the target's numbers are not finite: the tokens mean nothing
    """

    tokens: Tensor
    accepted: Tensor
    broken: Tensor


# Tuples that an error message tells part by part.
WORDS = (Rows, LayerKV, HeadNorms, Routing, Experts, Newest, BySlot, Best, Emitted)
