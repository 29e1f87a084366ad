"""The other side of a terminal conversation: the interface of those that answer."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eaglerun.messages import SpeculationStats

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer, and the tokens it came with: each one's text, and whether it was an
    accepted draft. No tokens where the other side does not tell them."""

    reasoning: str = ""
    content: str = ""
    tokens: tuple[tuple[str, bool], ...] = ()


@dataclass(frozen=True, slots=True)
class Ending:
    """The last of an answer; None for what the other side does not tell."""

    finish_reason: str
    num_tokens: int | None
    speculation: SpeculationStats | None


@dataclass(frozen=True, slots=True)
class Wish:
    """How answers are to be made. ``thinking`` is MiniMax-M3's thinking_mode."""

    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    thinking: str | None = None
    num_draft_tokens: int | None = None


Answer = Generator[Piece | Ending, None, None]


class Partner(Protocol):
    """``most_drafts``: drafts a step that may be asked for; None: none are known here."""

    name: str
    most_drafts: int | None

    def answer(self, messages: Messages, wish: Wish) -> Answer:
        """Pieces as they come, then one Ending; closing the generator ends the answer.

        Raises  EaglerunError for what is refused, or breaks.
        """
        ...
