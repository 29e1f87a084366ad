"""Sequence: the one mutable per-request state.

Only the scheduler, and the owners in this package that it asks, change one.
"""

from collections.abc import Sequence as TokenIds
from enum import Enum, auto

from eaglerun.messages import Request, TokenLogprobs
from eaglerun.plan.blocks import hash_block, root_name
from eaglerun.plan.step import DecodeRow, PrefillChunk
from eaglerun.plan.text import TextStream
from eaglerun.stats import AcceptanceCounter


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """One of a request's ``n`` answers: its tokens, its blocks, and how far it is computed.

    The host may run ahead of the device. What is *committed* is exact (``output_ids``,
    ``num_computed``); steps in flight add an unknown number of tokens, between ``min_len`` and
    ``max_len`` in all.
    """

    def __init__(
        self, request: Request, index: int, seed: int, arrival: int, text: TextStream | None
    ) -> None:
        self.request = request
        self.index = index
        self.seed = seed
        self.arrival = arrival
        self.text = text
        self.sampling = request.sampling
        self.leader: Sequence | None = None
        self.status = Status.WAITING

        self.token_ids: list[int] = list(request.prompt_ids)
        self.num_prompt_tokens = len(request.prompt_ids)
        # Positions whose target KV is computed, by committed steps; and planned ones of a prefill.
        self.num_computed = 0
        self.num_planned = 0
        self.prefill_len = 0

        self.slot_id = -1
        self.block_ids: list[int] = []
        self.num_blocks_sent = 0
        self.num_published = 0
        self._names: list[bytes] = []

        self.num_in_flight = 0
        # Upper bound of what the steps in flight emit: num_drafts + 1 each.
        self.max_in_flight_tokens = 0
        # Of the steps in flight, how many emit at least one token (decode rows, final chunks).
        self.min_in_flight_tokens = 0
        self.num_proposed = 0
        # The drafts after the newest committed token, of the step that emitted it.
        self.drafts: tuple[int, ...] = ()

        self.abort_requested = False
        self.preempt_requested = False
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.acceptance = AcceptanceCounter()

    @property
    def order(self) -> tuple[int, int, int]:
        """Scheduling order, best first: priority, arrival, index."""
        return (self.request.priority, self.arrival, self.index)

    @property
    def output_ids(self) -> TokenIds[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def min_len(self) -> int:
        return len(self.token_ids) + self.min_in_flight_tokens

    @property
    def max_len(self) -> int:
        """Upper bound of the length once the steps in flight are committed."""
        return len(self.token_ids) + self.max_in_flight_tokens

    def launched(self, part: DecodeRow | PrefillChunk) -> None:
        """A step with this part of the sequence is in flight: widen what the length may be."""
        self.num_in_flight += 1
        self.max_in_flight_tokens += part.max_emitted
        self.min_in_flight_tokens += part.min_emitted
        if part.min_emitted:
            self.num_proposed = part.num_propose
        if isinstance(part, PrefillChunk):
            self.num_planned = part.end

    def landed(self, part: DecodeRow | PrefillChunk) -> None:
        """The oldest step in flight is committed, and this was the sequence's part of it."""
        self.num_in_flight -= 1
        self.max_in_flight_tokens -= part.max_emitted
        self.min_in_flight_tokens -= part.min_emitted

    @property
    def prefill_planned(self) -> bool:
        return self.num_planned >= self.prefill_len

    def names(self, block_size: int, count: int) -> list[bytes]:
        """Prefix names of the first ``count`` blocks, all of them full of committed tokens."""
        while len(self._names) < count:
            at = len(self._names) * block_size
            parent = self._names[-1] if self._names else root_name(self.request.cache_salt)
            self._names.append(hash_block(parent, self.token_ids[at : at + block_size]))
        return self._names[:count]
