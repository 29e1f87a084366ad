"""Random paged caches with NaN in every cell that holds no key of a sequence."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eaglerun.kernels.reference import narrowed
from eaglerun.kernels.rows import LayerKV, Rows


@dataclass
class Paged:
    """block_tables hold a block that exists where a sequence has none, full of NaN."""

    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    max_seq_len: int
    lengths: tuple[int, ...]

    @property
    def layer(self) -> LayerKV:
        """Two caches as keys and values; one as index keys, whose layer's keys nobody reads."""
        if len(self.caches) == 2:
            return LayerKV(*self.caches)
        index_k = self.caches[0]
        return LayerKV(index_k[:, :, None], index_k[:, :, None], index_k)

    def uniform(self, rows: int) -> Rows:
        """The last ``rows`` places of each sequence, padding before its first."""
        last = torch.tensor(self.lengths)[:, None] - rows + torch.arange(rows)
        return self._rows(last.clamp(min=-1).flatten())

    def ragged(self, q_lens: tuple[int, ...], padding: int) -> Rows:
        """The last q_lens places, and then ``padding`` rows of no sequence."""
        ends = zip(q_lens, self.lengths, strict=True)
        rows = [torch.arange(length - count, length) for count, length in ends]
        positions = torch.cat([*rows, torch.full((padding,), -1)])
        return ragged(self._rows(positions), q_lens)

    def _rows(self, positions: Tensor) -> Rows:
        """They write nowhere."""
        positions = positions.to(self.seq_lens.device)
        nowhere = torch.full_like(positions, -1)
        return Rows(positions, nowhere, self.block_tables, self.seq_lens, self.max_seq_len)


def ragged(rows: Rows, q_lens: tuple[int, ...]) -> Rows:
    """The same rows, q_lens[b] of them of sequence b."""
    sums = torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32)
    return rows._replace(cu_seqlens=sums.to(rows.positions.device), q_lens=q_lens)


def cut(rows: Rows, part: slice, own: slice = slice(None)) -> Rows:
    """Some rows alone, uniform, of the sequences ``own``."""
    return Rows(
        rows.positions[part].contiguous(),
        rows.kv_slots[part],
        rows.block_tables[own],
        rows.seq_lens[own],
        rows.max_seq_len,
    )


def paged(
    lengths: tuple[int, ...],
    block_size: int,
    *cells: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device,
) -> Paged:
    """One cache for each shape of a cell."""
    used = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(used) + 2)
    tables = order[-1].repeat(len(lengths), max(used) + 2)
    caches = [torch.full((len(order), block_size, *c), float("nan")) for c in cells]
    blocks = iter(order.tolist())
    for b, length in enumerate(lengths):
        for j in range(used[b]):
            tables[b, j] = block = next(blocks)
            held = min(block_size, length - j * block_size)
            for cache in caches:
                cache[block, :held] = torch.randn(cache[block, :held].shape)
    return Paged(
        [narrowed(c, dtype).to(device) for c in caches],
        tables.to(device, torch.int32),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        max(*lengths, 1),
        lengths,
    )
