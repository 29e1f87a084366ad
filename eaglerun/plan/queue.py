"""Queue: the sequences that wait, in scheduling order. Nobody overtakes, but for one rule."""

import heapq
from collections.abc import Iterator

from eaglerun.plan.sequence import Sequence, Status


class Queue:
    """Waiting sequences, best priority first, then the earliest arrival, then the first answer.

    A request's later answers stay until its first has computed the prompt, to share its blocks.
    Whoever waits for that holds nobody else up.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence, in no order."""
        return (seq for _, seq in self._heap)

    def add(self, seq: Sequence) -> None:
        heapq.heappush(self._heap, (seq.order, seq))

    def remove(self, seq: Sequence) -> None:
        self._heap = [entry for entry in self._heap if entry[1] is not seq]
        heapq.heapify(self._heap)

    def pop(self) -> Sequence | None:
        """Take the best sequence that may start, if there is one."""
        held_back = []
        best = None
        while self._heap and best is None:
            entry = heapq.heappop(self._heap)
            if _waits_for_leader(entry[1]):
                held_back.append(entry)
            else:
                best = entry[1]
        for entry in held_back:
            heapq.heappush(self._heap, entry)
        return best

    def clear(self) -> None:
        self._heap.clear()


def _waits_for_leader(seq: Sequence) -> bool:
    """A sibling waits until the first answer has computed the prompt, to share its blocks."""
    leader = seq.leader
    return (
        leader is not None
        and leader.status is not Status.ENDED
        and leader.num_computed < leader.num_prompt_tokens
        and leader.num_output_tokens == 0
    )
