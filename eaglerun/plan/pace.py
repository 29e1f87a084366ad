"""Pace: how many prefill rows fit beside the decode rows of a step, so that streams flow steadily.

A stream waits for its next tokens as long as the step takes: its decode rows, then the prefill rows
planned with them. The pace learns from committed steps what both cost, and gives the prefill the
time that is left of the bound. A step's time is taken to be

    decode(rows) + level * (fixed + per_row * rows + per_context * sum of the rows' contexts)

* decode: the median of the newest decode steps of about that many rows, so that a step in which
  something was compiled or captured counts for nothing.
* fixed, per_row, per_context: none is negative, fitted to all steps with prefill rows, newer ones
  first. Errors count relative to the step's time: a step that took a hundred times too long hardly
  moves the fit. A row's context is how many tokens it attends to: rows deep in a long prompt are
  dearer.
* level: follows the newest steps with both kinds of rows where the device is slower or faster than
  the fit. It rises at once, but by at most MAX_RISE a step, and falls by a part of the difference.

What has not been measured is approached with care: a step takes at most twice the rows of any of
the newest that kept the bound, and contexts beyond the longest one seen cost in proportion to their
length. Where a step's time is far from the expected one, older steps lose most of their weight, so
that a device that has changed is learnt anew within a few steps.
"""

import math
from collections import deque
from collections.abc import Iterable

from eaglerun.plan.step import DecodeRow, PrefillChunk, StepPlan, StepTimes

# A paced step may take so many prefill rows whatever they cost: prompts always advance.
LEAST_ROWS = 128
# Share of the bound that steps aim at; the rest is for what no prediction knows.
AIM = 0.95
# Growth of the largest step tried so far.
GROWTH = 2
# The level's rise after one step, at most; and how much of a fall is believed.
MAX_RISE = 1.5
FALL = 0.25
# Newest decode steps of a size, and newest steps with prefill, that are remembered.
NUM_DECODE = 5
NUM_PREFILL = 50
# Weight of a sample of the fit after one more, so that about NUM_PREFILL count; and after one whose
# time was off by more than SURPRISE.
KEEP = 1 - 1 / NUM_PREFILL
KEEP_SURPRISED = 0.25
SURPRISE = 0.25
# The fit is improved, never solved anew: so many rounds after each sample.
ROUNDS = 20
# Contexts up to here count as seen.
SHORT_CONTEXT = 4096


class Budget:
    """Prefill rows that a step may still take."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    @property
    def is_open(self) -> bool:
        return self.left > 0

    def rows(self, start: int) -> int:
        """Rows of the next chunk at most, at least one of an open budget; ``start``: where it
        begins in its sequence."""
        return self.left

    def take(self, chunk: PrefillChunk) -> None:
        self.left -= len(chunk.token_ids)


class PacedBudget(Budget):
    """Rows within a time. ``least``: rows given in any case; ``most``: those that are trusted."""

    def __init__(self, rows: int, cost: "PrefillCost", room_ms: float, least: int, most: int):
        super().__init__(min(rows, max(least, most)))
        self._cost = cost
        self._room_ms = room_ms
        self._least = least

    @property
    def is_open(self) -> bool:
        return self.left > 0 and (self._least > 0 or self._cost.rows(self._room_ms, 0) >= 1)

    def rows(self, start: int) -> int:
        fitting = min(self._cost.rows(self._room_ms, start), self.left)
        return min(self.left, max(int(fitting), self._least, 1))

    def take(self, chunk: PrefillChunk) -> None:
        super().take(chunk)
        self._least -= len(chunk.token_ids)
        self._room_ms -= self._cost.ms_of_rows(*_features([chunk]))


class Pace:
    """Learns what steps cost, and sizes the prefill of those in which streams wait."""

    def __init__(self, max_itl_ms: float, least_rows: int = LEAST_ROWS) -> None:
        self._bound_ms = max_itl_ms
        self._least = least_rows
        # Prefill rows of the newest steps that kept the bound.
        self._kept: deque[int] = deque(maxlen=NUM_PREFILL)
        self._decode = DecodeTimes()
        self._prefill = PrefillCost()

    def budget(self, rows: int, decode: Iterable[DecodeRow]) -> Budget:
        """The prefill rows of a step with these decode rows, at most ``rows``."""
        size = _size(decode)
        if not size:
            return Budget(rows)
        room_ms = AIM * self._bound_ms - self._decode.ms(size) - self._prefill.fixed_ms
        most = GROWTH * max(self._kept, default=0)
        return PacedBudget(rows, self._prefill, room_ms, self._least, most)

    def learn(self, plan: StepPlan, times: StepTimes) -> None:
        """A step is committed, and took so long. One without times teaches nothing."""
        total_ms, size = times.total_ms, _size(plan.decode)
        if total_ms <= 0:
            return
        if not plan.prefill:
            self._decode.add(size, total_ms)
            return
        if size and total_ms < self._decode.ms(size):
            # The decode rows alone were thought to take longer.
            self._decode.add(size, total_ms)
        rows, context = _features(plan.prefill)
        if total_ms <= self._bound_ms:
            self._kept.append(rows)
        decode_ms = self._decode.ms(size) if size else 0.0
        spent_ms = total_ms - decode_ms
        if spent_ms <= 0:
            return
        cost, keep = self._prefill, KEEP
        room_ms = AIM * self._bound_ms - decode_ms
        if size and abs(cost.error(rows, context, spent_ms, room_ms)) > SURPRISE:
            keep = KEEP_SURPRISED
            for _ in range(len(self._kept) // 2):
                self._kept.popleft()
        cost.fit(rows, context, spent_ms, total_ms, keep)
        cost.farthest = max(cost.farthest, *(chunk.end for chunk in plan.prefill))
        if size:
            cost.follow(cost.error(rows, context, spent_ms, room_ms))


class DecodeTimes:
    """How long decode steps take, by their rows, rounded up to a power of two."""

    def __init__(self) -> None:
        self._newest: dict[int, deque[float]] = {}

    def add(self, rows: int, ms: float) -> None:
        newest = self._newest.setdefault((rows - 1).bit_length(), deque(maxlen=NUM_DECODE))
        newest.append(ms)

    def ms(self, rows: int) -> float:
        """The median of the newest; of the next size that is known, larger ones first. 0: none."""
        if not self._newest:
            return 0.0
        key = (rows - 1).bit_length()
        nearest = min(self._newest, key=lambda known: (known < key, abs(known - key)))
        ordered = sorted(self._newest[nearest])
        return ordered[(len(ordered) - 1) // 2]


class PrefillCost:
    """The cost of a step's prefill rows. ``farthest``: the longest context seen."""

    def __init__(self) -> None:
        self.farthest = SHORT_CONTEXT
        self._level = 1.0
        # One for the rows, the step, the contexts. The rows come first: what one sample cannot
        # tell apart is then put down to them, so that more rows are expected to cost more.
        self._weights = [0.0, 0.0, 0.0]
        self._products = [[0.0] * 3 for _ in range(3)]
        self._targets = [0.0] * 3

    @property
    def fixed_ms(self) -> float:
        return self._level * self._weights[1]

    def ms_of_rows(self, rows: int, context: float) -> float:
        """Cost of the rows, without what the step costs once. ``context``: the sum of theirs."""
        per_row, _, per_context = self._weights
        scale = self._level * self._beyond(context / rows)
        return scale * (per_row * rows + per_context * context)

    def rows(self, ms: float, start: int) -> float:
        """Rows of a chunk beginning at ``start`` that take ``ms``."""
        if ms <= 0:
            return 0.0
        per_row, _, per_context = self._weights
        ms /= self._level * self._beyond(start)
        # Row i attends to start + i tokens: first * n + per_context / 2 * n * n = ms.
        first = per_row + per_context * start
        root = math.sqrt(first * first + 2 * per_context * ms)
        return 2 * ms / (first + root) if root else math.inf

    def fit(self, rows: int, context: float, ms: float, total_ms: float, keep: float) -> None:
        """Learn from one step; the errors are relative to its whole time, ``total_ms``.

        ``keep``: weight of the older samples.
        """
        features = (float(rows), 1.0, context)
        importance = 1 / total_ms**2
        for j, feature in enumerate(features):
            row = self._products[j]
            for i, other in enumerate(features):
                row[i] = keep * row[i] + importance * feature * other
            self._targets[j] = keep * self._targets[j] + importance * feature * ms
        weights = self._weights
        # Coordinate descent: each weight in turn becomes the best one beside the others.
        for _ in range(ROUNDS):
            for j, row in enumerate(self._products):
                others = sum(row[i] * weights[i] for i in range(3) if i != j)
                weights[j] = max(0.0, (self._targets[j] - others) / row[j])

    def error(self, rows: int, context: float, ms: float, room_ms: float) -> float:
        """How much longer than expected a step took; small where it is much shorter than its
        room, for it says little then."""
        per_row, fixed, per_context = self._weights
        expected = self._level * (per_row * rows + fixed + per_context * context)
        return (ms - expected) / max(expected, room_ms)

    def follow(self, error: float) -> None:
        """Move the level after one step."""
        self._level *= min(1 + error, MAX_RISE) if error > 0 else 1 + FALL * error

    def _beyond(self, context: float) -> float:
        return max(1.0, context / self.farthest)


def _size(decode: Iterable[DecodeRow]) -> int:
    return sum(row.num_drafts + 1 for row in decode)


def _features(chunks: Iterable[PrefillChunk]) -> tuple[int, float]:
    """Rows, and the sum of their contexts."""
    rows, context = 0, 0.0
    for chunk in chunks:
        rows += len(chunk.token_ids)
        context += len(chunk.token_ids) * (chunk.start + chunk.end) / 2
    return rows, context
