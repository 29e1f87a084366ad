"""Random paged caches with NaN in every cell that holds no key of a sequence."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from eaglerun.kernels.reference import narrowed


@dataclass
class Paged:
    """block_tables hold a block that exists where a sequence has none, full of NaN."""

    caches: list[Tensor]
    block_tables: Tensor
    seq_lens: Tensor
    max_seq_len: int
    lengths: tuple[int, ...]

    def uniform(self, rows: int) -> Tensor:
        """Positions of the last ``rows`` places of each sequence, -1 before its first."""
        last = torch.tensor(self.lengths)[:, None] - rows + torch.arange(rows)
        return last.clamp(min=-1).flatten().to(self.seq_lens.device)

    def ragged(self, q_lens: tuple[int, ...], padding: int) -> tuple[Tensor, Tensor]:
        """Positions of the last q_lens places and then ``padding`` of -1, and cu_seqlens."""
        ends = zip(q_lens, self.lengths, strict=True)
        rows = [torch.arange(length - count, length) for count, length in ends]
        positions = torch.cat([*rows, torch.full((padding,), -1)])
        sums = torch.tensor([0, *accumulate(q_lens)], dtype=torch.int32)
        return positions.to(self.seq_lens.device), sums.to(self.seq_lens.device)


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
