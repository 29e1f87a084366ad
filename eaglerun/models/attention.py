"""What attention needs of a forward (AttentionBatch) and of memory (TargetKV, DraftKV)."""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from eaglerun.kernels.attention_dense import attention_dense, attention_dense_ragged
from eaglerun.kernels.attention_sparse import attention_sparse, attention_sparse_ragged
from eaglerun.kernels.index_topk import index_topk, index_topk_ragged
from eaglerun.spec import DraftSpec, TargetSpec


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The rows of one forward: N rows of B sequences.

    Row n of sequence b is the query at positions[n] and sees the keys t <= positions[n] with
    t < seq_lens[b]. Two forms: uniform (decode, verify: N // B rows for every sequence, padding
    included, row n belongs to n // (N // B)) and ragged (prefill: q_lens[b] rows).

    positions     [N] int64, absolute; -1 on rows of padding
    kv_slots      [N] int64, block * block_size + offset; -1 writes nothing
    seq_ids       [N] int64, row -> b
    block_tables  [B, max_blocks] int32; entries past a sequence's blocks are -1 or any block
    cu_seqlens_q  [B + 1] int32, running sum of q_lens
    seq_lens      [B] int32, keys visible after this forward's writes; 0 for padding sequences
    max_q_len     upper bound of q_lens
    max_seq_len   upper bound of seq_lens, at most max_blocks * block_size
    q_lens        rows of each sequence, known to the host; read in the ragged form alone
    """

    positions: Tensor
    kv_slots: Tensor
    seq_ids: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    max_q_len: int
    max_seq_len: int
    uniform: bool
    q_lens: tuple[int, ...]


@functools.cache
def uniform_rows(batch: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """seq_ids and cu_seqlens_q of ``rows`` rows for each sequence: made once, for they are the
    same at every step."""
    ends = torch.arange(0, (batch + 1) * rows, rows, dtype=torch.int32, device=device)
    return torch.arange(batch * rows, device=device) // rows, ends


@dataclass(frozen=True, slots=True)
class KVRegion:
    """One per-block memory: tensor [num_blocks, ...]; layout names the dims after the block."""

    name: str
    tensor: Tensor
    layout: str

    @property
    def bytes_per_block(self) -> int:
        return self.tensor[:1].numel() * self.tensor.element_size()


@dataclass(frozen=True, slots=True)
class TargetKV:
    """The target's paged memory, one entry a layer.

    k, v     [num_blocks, block_size, G, D]
    index_k  [num_blocks, block_size, Di]; None where the layer computes no selection
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    index_k: tuple[Tensor | None, ...]

    @classmethod
    def allocate(
        cls,
        spec: TargetSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        index_dtype: torch.dtype | None = None,
    ) -> Self:
        """Uninitialised memory: a cell is read only after it was written. ``index_dtype`` is of
        the index keys, None: ``dtype`` too.

        Raises  ValueError when a layer is sparse and block_size is not the sparse block.
        """
        if any(spec.sparse_layers) and block_size != spec.sparse_block_size:
            raise ValueError(
                f"block_size {block_size}: a sparse layer selects blocks of "
                f"{spec.sparse_block_size} keys, and a page must be one"
            )
        pages = (num_blocks, block_size)
        heads = (*pages, spec.num_key_value_heads, spec.head_dim)
        layers = range(spec.num_hidden_layers)
        return cls(
            k=tuple(torch.empty(heads, device=device, dtype=dtype) for _ in layers),
            v=tuple(torch.empty(heads, device=device, dtype=dtype) for _ in layers),
            index_k=tuple(
                torch.empty(
                    (*pages, spec.index_head_dim), device=device, dtype=index_dtype or dtype
                )
                if spec.sparse_layers[i] and not spec.index_shared[i]
                else None
                for i in layers
            ),
        )

    def regions(self) -> tuple[KVRegion, ...]:
        found = []
        for i, (k, v, index_k) in enumerate(zip(self.k, self.v, self.index_k, strict=True)):
            found.append(KVRegion(f"target.{i}.k", k, "token,group,dim"))
            found.append(KVRegion(f"target.{i}.v", v, "token,group,dim"))
            if index_k is not None:
                found.append(KVRegion(f"target.{i}.index_k", index_k, "token,dim"))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class DraftKV:
    """The draft's paged memory on the target's block tables: k, v [num_blocks, block_size, G, D].

    The draft row that pairs the token of position p with the hidden state of p - 1 lies at p;
    position 0 stays empty and is never read.
    """

    k: Tensor
    v: Tensor

    @classmethod
    def allocate(
        cls,
        spec: DraftSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Uninitialised memory: a cell is read only after it was written."""
        shape = (num_blocks, block_size, spec.num_key_value_heads, spec.head_dim)
        k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(k, v)

    def regions(self) -> tuple[KVRegion, ...]:
        layout = "token,group,dim"
        return (KVRegion("draft.k", self.k, layout), KVRegion("draft.v", self.v, layout))


def dense_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: AttentionBatch,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of q [N, H, D] to every key it may see, scaled by D ** -0.5; returns [N, H, D]."""
    scale = q.shape[-1] ** -0.5
    rows = (batch.positions, batch.block_tables, batch.seq_lens)
    if batch.uniform:
        return attention_dense(
            q, k_cache, v_cache, *rows, batch.max_seq_len, scale, first_key, window
        )
    return attention_dense_ragged(
        q,
        k_cache,
        v_cache,
        *rows,
        batch.cu_seqlens_q,
        batch.q_lens,
        batch.max_seq_len,
        scale,
        first_key,
        window,
    )


def select_blocks(
    index_q: Tensor,
    index_k_cache: Tensor,
    batch: AttentionBatch,
    topk: int,
    init_blocks: int,
    local_blocks: int,
) -> Tensor:
    """The blocks each row and group attends to: index_q [N, G, Di] -> [N, G, topk] int32."""
    rows = (batch.positions, batch.block_tables, batch.seq_lens)
    wish = (topk, init_blocks, local_blocks)
    if batch.uniform:
        return index_topk(index_q, index_k_cache, *rows, batch.max_seq_len, *wish)
    return index_topk_ragged(
        index_q,
        index_k_cache,
        *rows,
        batch.cu_seqlens_q,
        batch.q_lens,
        batch.max_seq_len,
        *wish,
    )


def sparse_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_ids: Tensor, batch: AttentionBatch
) -> Tensor:
    """Attention of q [N, H, D] to its selected blocks [N, G, topk]; returns [N, H, D]."""
    scale = q.shape[-1] ** -0.5
    rows = (block_ids, batch.positions, batch.block_tables, batch.seq_lens)
    if batch.uniform:
        return attention_sparse(q, k_cache, v_cache, *rows, batch.max_seq_len, scale)
    return attention_sparse_ragged(
        q,
        k_cache,
        v_cache,
        *rows,
        batch.cu_seqlens_q,
        batch.q_lens,
        batch.max_seq_len,
        scale,
    )
