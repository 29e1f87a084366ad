"""DeviceState: what the device remembers of each slot between steps, at fixed addresses.

The host may be one step behind, so lengths, newest tokens and drafts live here and the plan only
names slots. The last row of every tensor belongs to the padding slot.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from eaglerun.plan.step import Admission, BlockUpdate, DecodeRow
from eaglerun.sampling import SamplingState


class DeviceState:
    """Per-slot state of S slots.

    length        [S + 1] int64, tokens known so far, the newest one (not yet in KV) included
    last_token    [S + 1] int64, the newest token
    draft_tokens  [S + 1, K_max] int64, proposed after it
    draft_probs   [S + 1, K_max, V] of sampled drafts under the rejection rule, else None
    block_table   [S + 1, M] int32, block ids; entries never set are 0 and never read unmasked
    carry         [S + 1, H] fc(aux) of the last position computed by a prefill chunk, or None
    script        [S + 1, max_model_len + K_max] int64, tokens by position that stand in for the
                  drafts (or for all tokens) in benchmarks and tests, else None
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        num_draft_tokens: int,
        draft_hidden_size: int | None,
        keeps_draft_probs: bool,
        script_len: int,
        vocab_size: int,
        max_stop_ids: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        rows = num_slots + 1
        self.padding_slot = num_slots
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.draft_tokens = torch.zeros(rows, num_draft_tokens, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self.carry: Tensor | None = None
        if draft_hidden_size is not None:
            self.carry = torch.zeros(rows, draft_hidden_size, dtype=dtype, device=device)
        self.draft_probs: Tensor | None = None
        if keeps_draft_probs:
            self.draft_probs = torch.zeros(rows, num_draft_tokens, vocab_size, device=device)
        self.script: Tensor | None = None
        if script_len:
            self.script = torch.zeros(rows, script_len, dtype=torch.int64, device=device)
        # (seed, length) -> the script of a sequence. Tests and benchmarks put their own here.
        self.write_script: Callable[[int, int], Tensor] = partial(random_script, vocab_size)
        self.sampling = SamplingState(num_slots, vocab_size, max_stop_ids, device)

    def admit(
        self,
        admission: Admission,
        eos_token_ids: tuple[int, ...],
        block_carry: Tensor | None,
    ) -> None:
        """A sequence takes a slot; ``block_carry`` [num_blocks, H] are the blocks' carries."""
        a = admission
        stop_ids = (() if a.sampling.ignore_eos else eos_token_ids) + a.sampling.stop_token_ids
        self.sampling.admit(
            a.slot_id, a.sampling, a.seed, stop_ids, a.prompt_ids, a.output_ids, a.num_output_tokens
        )
        if self.script is not None:
            self.script[a.slot_id] = self.write_script(a.seed, self.script.shape[1])
        if self.carry is not None and block_carry is not None and a.carry_block >= 0:
            self.carry[a.slot_id] = block_carry[a.carry_block]

    def set_blocks(self, update: BlockUpdate) -> None:
        end = update.first_index + len(update.block_ids)
        ids = host_tensor(update.block_ids, self.block_table.device)
        self.block_table[update.slot_id, update.first_index : end] = ids.int()


class StepBuffers:
    """What the moves of a decode step of B sequences hand to each other, at addresses that depend
    on B alone.

    slots        [B] int64; the padding slot on padding sequences
    num_drafts   [B] int64, drafts to judge; -1 on padding sequences
    num_propose  [B] int64, drafts to make; 0 on padding sequences
    emitted      [B, K_max + 1] int64, -1 where a row emits nothing
    accepted     [B] int64
    broken       [B] int64, 1 where a row of the target's hidden states is not finite
    drafts       [B, K_max] int64, the step's new drafts; a sequence's first num_propose count
    num_experts  [1] int64, distinct experts read, summed over the layers
    """

    def __init__(
        self, max_batch: int, num_draft_tokens: int, padding_slot: int, device: torch.device
    ) -> None:
        self._padding_slot = padding_slot
        self._num_drafts = num_draft_tokens
        self._width = 2 + num_draft_tokens + 1 + num_draft_tokens
        # Results end where the inputs begin, and both meet at the one number that is both, so
        # that a step's numbers arrive in one copy and leave in one.
        self._middle = max_batch * self._width
        self._memory = torch.zeros(
            self._middle + 1 + 3 * max_batch, dtype=torch.int64, device=device
        )
        self.num_experts = self._memory[self._middle : self._middle + 1]
        self._divide(max_batch)

    def _divide(self, batch_size: int) -> None:
        inputs = self._memory[self._middle + 1 :][: 3 * batch_size].view(3, batch_size)
        self.slots, self.num_drafts, self.num_propose = inputs
        self._results = self._memory[self._middle - batch_size * self._width : self._middle + 1]
        table = self._results[:-1].view(batch_size, self._width)
        self.accepted, self.broken, self.emitted, self.drafts = self._columns(table)

    def _columns(self, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        end = 2 + self._num_drafts + 1
        return table[:, 0], table[:, 1], table[:, 2:end], table[:, end:]

    def fill(self, rows: tuple[DecodeRow, ...], batch_size: int) -> None:
        """The plan's rows, then padding up to ``batch_size``; no experts yet."""
        self._divide(batch_size)
        padding = batch_size - len(rows)
        pinned = self._memory.device.type == "cuda"
        values = torch.tensor(
            [0]
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

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """accepted, broken, emitted, drafts and num_experts on their way to the host (to_host)."""
        values = to_host(self._results)
        return *self._columns(values[:-1].view(-1, self._width)), values[-1:]

    @contextmanager
    def blank(self) -> Iterator[None]:
        """Padding everywhere while entered: moves that run meanwhile touch no sequence."""
        kept = self._memory.clone()
        self.slots.fill_(self._padding_slot)
        self.num_drafts.fill_(-1)
        self.num_propose.fill_(0)
        self.emitted.fill_(-1)
        self.accepted.fill_(0)
        self.broken.fill_(0)
        try:
            yield
        finally:
            self._memory.copy_(kept)


def random_script(vocab_size: int, seed: int, length: int) -> Tensor:
    """``length`` seeded random tokens."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randint(vocab_size, (length,), generator=generator)


def host_tensor(values: object, device: torch.device) -> Tensor:
    """An int64 tensor of host values on ``device``; the host does not wait for the copy."""
    tensor = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host, there once the step's last event is; the next step may overwrite the
    original at once."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)
