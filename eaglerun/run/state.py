"""DeviceState: what the device remembers of each slot between steps, at fixed addresses.

The host may be one step behind, so lengths, newest tokens and drafts live here and the plan only
names slots. The last row of every tensor belongs to the padding slot.
"""

import torch

from eaglerun.kernels.rows import BySlot
from eaglerun.plan.step import Admission, BlockUpdate
from eaglerun.sampling import SamplingState
from eaglerun.staging import host_tensor


class DeviceState:
    """Per-slot state of S slots: what ``by_slot`` names, each [S + 1, ...], and the sampling state.

    Entries of the block table that were never set are 0 and never read unmasked.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        num_draft_tokens: int,
        vocab_size: int,
        max_stop_ids: int,
        device: torch.device,
    ) -> None:
        rows = num_slots + 1
        self.padding_slot = num_slots
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.draft_tokens = torch.zeros(rows, num_draft_tokens, dtype=torch.int64, device=device)
        self.block_table = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self.by_slot = BySlot(self.length, self.last_token, self.draft_tokens, self.block_table)
        self.sampling = SamplingState(num_slots, vocab_size, max_stop_ids, device)

    def admit(self, admission: Admission, eos_token_ids: tuple[int, ...]) -> None:
        """A sequence takes a slot."""
        a = admission
        stop_ids = (() if a.sampling.ignore_eos else eos_token_ids) + a.sampling.stop_token_ids
        self.sampling.admit(
            a.slot_id, a.sampling, a.seed, stop_ids, a.prompt_ids, a.output_ids, a.num_output_tokens
        )

    def set_blocks(self, update: BlockUpdate) -> None:
        end = update.first_index + len(update.block_ids)
        ids = host_tensor(update.block_ids, self.block_table.device)
        self.block_table[update.slot_id, update.first_index : end] = ids.int()
