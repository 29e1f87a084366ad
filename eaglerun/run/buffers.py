"""StepBuffers: what enters a decode step and leaves it, at addresses that depend on the batch size
alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eaglerun.kernels.rows import Emitted
from eaglerun.plan.step import DecodeRow
from eaglerun.staging import to_host


class StepBuffers:
    """The numbers of a decode step of B sequences, and what each of its moves may read.

    slots        [B] int64; the padding slot on padding sequences
    num_drafts   [B] int64, drafts to judge; -1 on padding sequences
    num_propose  [B] int64, drafts to make; 0 on padding sequences
    emitted      tokens [B, K_max + 1], accepted [B] and broken [B] int64
    drafts       [B, K_max] int64, the step's new drafts; a sequence's first num_propose count
    num_experts  [1] int64, distinct experts read, summed over the layers
    block_table  [B, M] int32, of the slots

    Each begins at the same offset from a multiple of 16 bytes whatever B is: a kernel's program is
    for one alignment of its pointers.
    """

    def __init__(
        self,
        max_batch: int,
        num_draft_tokens: int,
        max_blocks: int,
        padding_slot: int,
        device: torch.device,
    ) -> None:
        self._padding_slot = padding_slot
        self._num_drafts = num_draft_tokens
        self._width = _even(2 + num_draft_tokens + 1 + num_draft_tokens)
        # Results end where the inputs begin, and both meet at the one number that is both, so
        # that a step's numbers arrive in one copy and leave in one.
        self._middle = max_batch * self._width
        self._memory = torch.zeros(
            self._middle + 2 + 3 * _even(max_batch), dtype=torch.int64, device=device
        )
        self.num_experts = self._memory[self._middle : self._middle + 1]
        self._tables = torch.zeros(max_batch, max_blocks, dtype=torch.int32, device=device)
        self._divide(max_batch)

    def _divide(self, batch_size: int) -> None:
        inputs = self._memory[self._middle + 2 :][: 3 * _even(batch_size)].view(3, -1)
        self.slots, self.num_drafts, self.num_propose = inputs[:, :batch_size]
        self._results = self._memory[self._middle - batch_size * self._width : self._middle + 1]
        table = self._results[:-1].view(batch_size, self._width)
        self.emitted, self.drafts = self._columns(table)
        self.block_table = self._tables[:batch_size]

    def _columns(self, table: Tensor) -> tuple[Emitted, Tensor]:
        end = 2 + self._num_drafts + 1
        drafts = table[:, end : end + self._num_drafts]
        return Emitted(table[:, 2:end], table[:, 0], table[:, 1]), drafts

    def fill(self, rows: tuple[DecodeRow, ...], batch_size: int) -> None:
        """The plan's rows, then padding up to ``batch_size``; no experts yet."""
        self._divide(batch_size)
        padding = _even(batch_size) - len(rows)
        pinned = self._memory.device.type == "cuda"
        values = torch.tensor(
            [0, 0]
            + [row.slot_id for row in rows]
            + [self._padding_slot] * padding
            + [row.num_drafts for row in rows]
            + [-1] * padding
            + [row.num_propose for row in rows]
            + [0] * padding,
            dtype=torch.int64,
            pin_memory=pinned,
        )
        self._memory[self._middle :][: len(values)].copy_(values, non_blocking=True)

    def results(self) -> tuple[Emitted, Tensor, Tensor]:
        """What was emitted, drafts and num_experts, on their way to the host (to_host)."""
        values = to_host(self._results)
        return *self._columns(values[:-1].view(-1, self._width)), values[-1:]

    @contextmanager
    def blank(self) -> Iterator[None]:
        """Padding everywhere while entered: moves that run meanwhile touch no sequence."""
        kept = self._memory.clone()
        self.slots.fill_(self._padding_slot)
        self.num_drafts.fill_(-1)
        self.num_propose.fill_(0)
        self.emitted.tokens.fill_(-1)
        self.emitted.accepted.fill_(0)
        self.emitted.broken.fill_(0)
        try:
            yield
        finally:
            self._memory.copy_(kept)


def _even(n: int) -> int:
    """The next even number: as many int64 end at a multiple of 16 bytes."""
    return n + n % 2
