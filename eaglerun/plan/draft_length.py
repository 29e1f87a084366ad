"""How many tokens to draft in a step. No torch: the scheduler calls it."""

from dataclasses import dataclass
from typing import Protocol


class DraftLengthPolicy(Protocol):
    """Chooses K of a step, 0 <= K <= the engine's num_draft_tokens."""

    def num_draft_tokens(self, step_id: int, num_running: int) -> int: ...


@dataclass(frozen=True, slots=True)
class FixedDraftLength:
    """The same K at every step."""

    value: int

    def num_draft_tokens(self, step_id: int, num_running: int) -> int:
        return self.value
