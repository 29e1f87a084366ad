"""RunnerOptions: the settings of one rank."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    """What a rank must know besides its models.

    kv_dtype        of K and V of both models;  index_dtype  of the indexer's keys
    max_rows        rows of the largest forward
    synthetic       conditional acceptance rates by position; empty: judge by the target
    keep_aux        hand the captured hidden states out with each result
    capture         decode moves as graphs, on a GPU
    capture_in_steps  where a step first needs them; else before the first and while idle
    graph_bytes     captured moves may hold so much; None: as much as they like
    """

    num_slots: int
    num_blocks: int
    block_size: int
    kv_dtype: torch.dtype
    index_dtype: torch.dtype
    max_model_len: int
    max_rows: int
    num_draft_tokens: int
    eos_token_ids: tuple[int, ...]
    rejection: bool
    probabilistic_drafts: bool
    synthetic: tuple[float, ...]
    processed_logprobs: bool
    decode_batch_sizes: tuple[int, ...]
    capture: bool
    capture_in_steps: bool
    graph_bytes: int | None
    overlap_kernels: bool
    batch_invariant: bool
    scripted_drafts: bool
    scripted_tokens: bool
    keep_aux: bool

    @property
    def max_batch(self) -> int:
        """Sequences of the largest decode step, padding included."""
        return max(self.num_slots, *self.decode_batch_sizes, 1)
