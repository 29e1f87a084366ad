"""Residency: who runs, and the slot and KV blocks that each holds."""

from collections.abc import Iterator

from eaglerun.errors import EngineError
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.sequence import Sequence, Status
from eaglerun.plan.step import BlockUpdate


class Residency:
    """Hands slots and blocks out, and takes them back.

    running  admitted and not ended, best order first
    leaving  ended, but a step in flight still writes to what they hold
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self._limits = limits
        self.pool = pool
        self.running: list[Sequence] = []
        self.leaving: list[Sequence] = []
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence that holds a slot."""
        yield from self.running
        yield from self.leaving

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    # In.

    def admit(self, seq: Sequence) -> bool:
        """Give a slot, and blocks for the prefill, as far as the prefix cache has not computed it.

        False, and nothing is taken, where too few blocks are free.
        """
        hits = self._take_blocks(seq)
        if hits is None:
            return False
        seq.slot_id = self._free_slots.pop()
        seq.status = Status.RUNNING
        seq.prefill_len = len(seq.token_ids)
        seq.num_planned = seq.num_computed = hits * self.pool.block_size
        seq.num_published = hits
        seq.num_blocks_sent = 0
        self.running.append(seq)
        self.running.sort(key=lambda s: s.order)
        return True

    def _take_blocks(self, seq: Sequence) -> int | None:
        """Blocks for the prefill and the token it samples; returns how many the prefix cache gave.

        None, and nothing taken, if too few are free. The last token is always recomputed, for
        its logits; a request for prompt log-probabilities recomputes all.
        """
        size, limits = self.pool.block_size, self._limits
        num_tokens = len(seq.token_ids)
        hits: list[int] = []
        if limits.prefix_caching and seq.sampling.prompt_logprobs is None:
            hits = self.pool.match(seq.names(size, (num_tokens - 1) // size))
        ahead = limits.num_draft_tokens + 1 if limits.has_draft else 1
        total = -(-min(num_tokens + ahead, limits.max_model_len) // size)
        if total - len(hits) > self.pool.num_free - self.pool.num_kept(hits):
            return None
        self.pool.share(hits)
        seq.block_ids = hits + self.pool.allocate(total - len(hits))
        return len(hits)

    # While it runs.

    def reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for ``num_tokens`` positions, or False."""
        missing = -(-num_tokens // self.pool.block_size) - len(seq.block_ids)
        if missing > self.pool.num_free:
            return False
        if missing > 0:
            seq.block_ids += self.pool.allocate(missing)
        return True

    def updates(self, seq: Sequence) -> Iterator[BlockUpdate]:
        """The blocks that the device has not been told of yet."""
        if seq.num_blocks_sent < len(seq.block_ids):
            new = tuple(seq.block_ids[seq.num_blocks_sent :])
            yield BlockUpdate(seq.slot_id, seq.num_blocks_sent, new)
            seq.num_blocks_sent = len(seq.block_ids)

    def publish(self, seq: Sequence) -> None:
        """Offer the blocks that are now full of committed tokens to later prompts."""
        if not self._limits.prefix_caching:
            return
        size = self.pool.block_size
        full = seq.num_computed // size
        if full > seq.num_published:
            names = seq.names(size, full)
            for i in range(seq.num_published, full):
                self.pool.publish(seq.block_ids[i], names[i])
            seq.num_published = full

    # Out.

    def preempt(self, seq: Sequence) -> None:
        """Take all it holds; its tokens stay, its KV is recomputed or found by its prefix."""
        self.running.remove(seq)
        self._give_back(seq)
        seq.status = Status.WAITING
        seq.preempt_requested = False
        seq.num_proposed = 0
        seq.drafts = ()
        seq.num_planned = seq.num_computed = seq.prefill_len = 0

    def leave(self, seq: Sequence) -> None:
        """The sequence has ended. What it holds is taken once nothing of it is in flight."""
        self.running.remove(seq)
        self.leaving.append(seq)
        self.release(seq)

    def release(self, seq: Sequence) -> None:
        """Take what an ended sequence holds, unless a step in flight still writes to it."""
        if not seq.num_in_flight:
            self.leaving.remove(seq)
            self._give_back(seq)

    def clear(self) -> None:
        """Take everything at once: nothing is in flight any more."""
        for seq in self:
            self._give_back(seq)
        self.running, self.leaving = [], []

    def _give_back(self, seq: Sequence) -> None:
        self.pool.release(seq.block_ids)
        seq.block_ids = []
        self._free_slots.append(seq.slot_id)
        seq.slot_id = -1

    def check_integrity(self) -> None:
        """EngineError if blocks or slots leaked."""
        self.pool.check_integrity([seq.block_ids for seq in self])
        slots = sorted([*self._free_slots, *(seq.slot_id for seq in self)])
        if slots != list(range(self._limits.max_num_seqs)):
            raise EngineError(f"slots in use or free: {slots}")
