"""SchedulerLimits: what the scheduler may hand out. Decided once, at start."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Limits of what the scheduler hands out.

    max_num_batched_tokens  rows of a step: decode rows first, prefill chunks take the rest
    max_chunk_tokens        rows of one prefill chunk
    max_itl_ms              longest step, in milliseconds, that prefill may make while sequences
                            decode in it; None: any
    has_draft               reserve the draft's slots too (its KV runs one position ahead)
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_chunk_tokens: int
    max_model_len: int
    num_draft_tokens: int
    has_draft: bool
    prefix_caching: bool
    eos_token_ids: tuple[int, ...]
    max_itl_ms: float | None = None
