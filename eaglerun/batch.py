"""DeviceState: what the device remembers of each slot between steps, at fixed addresses.

The host may be one step behind, so lengths, newest tokens and drafts live here and the plan only
names slots. The last row of every tensor belongs to the padding slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.sampling import SamplingState
from eaglerun.step import Admission, BlockUpdate


class DeviceState:
    """Per-slot state of S slots.

    length        [S + 1] int64, tokens known so far, the newest one (not yet in KV) included
    last_token    [S + 1] int64, the newest token
    draft_tokens  [S + 1, K_max] int64, proposed after it
    draft_probs   [S + 1, K_max, V] of sampled drafts under the rejection rule, else None
    block_table   [S + 1, M] int32, block ids; entries never set are 0 and never read unmasked
    carry         [S + 1, H] fc(aux) of the last position computed by a prefill chunk, or None
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        num_draft_tokens: int,
        draft_hidden_size: int | None,
        keeps_draft_probs: bool,
        vocab_size: int,
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
        self.sampling = SamplingState(num_slots, vocab_size, device)

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
        if self.carry is not None and block_carry is not None and a.carry_block >= 0:
            self.carry[a.slot_id] = block_carry[a.carry_block]

    def set_blocks(self, update: BlockUpdate) -> None:
        end = update.first_index + len(update.block_ids)
        ids = torch.tensor(update.block_ids, dtype=torch.int32, device=self.block_table.device)
        self.block_table[update.slot_id, update.first_index : end] = ids


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """Rows of the decode part, padded to B sequences.

    slots [B] int64 (the padding slot on padding sequences); num_drafts, num_propose [B] int64
    (-1 and 0 on padding sequences); max_seq_len: upper bound of the keys any row sees.
    """

    slots: Tensor
    num_drafts: Tensor
    num_propose: Tensor
    max_seq_len: int
