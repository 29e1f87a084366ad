"""Telling reasoning from content in MiniMax-M3's output, as it comes.

The state comes from the generated text and from one fact of the prompt: whether it already ended
with the opening marker (thinking mode "enabled"). The markers are matched as text, for a model
may spell them with other tokens than their own.
"""

from enum import Enum, auto

from eaglerun.server.parsers.parts import Content, Part, Reasoning, partial_marker

THINK_OPEN = "<mm:think>"
THINK_CLOSE = "</mm:think>"


class _State(Enum):
    LEADING_CONTENT = auto()
    LEADING_REASONING = auto()
    BEFORE = auto()
    REASONING = auto()
    AFTER = auto()


class ReasoningParser:
    """Splits text at the first thinking block; any split of the text gives the same pieces.

    Before the block and after it is content; without a closing marker all the rest is reasoning.
    At the very start (white space aside) a closing marker of nothing, and an opening marker where
    the prompt has opened the block already, are dropped. Markers after the block are content.
    """

    def __init__(self, starts_in_reasoning: bool) -> None:
        self._state = _State.LEADING_REASONING if starts_in_reasoning else _State.LEADING_CONTENT
        self._held = ""

    @property
    def in_reasoning(self) -> bool:
        return self._state in (_State.LEADING_REASONING, _State.REASONING)

    def feed(self, text: str) -> list[Part]:
        if self._at(_State.AFTER):
            return [Content(text)] if text else []
        if "<" not in text and not self._held and text:
            # The usual piece: it has nothing to do with a marker.
            if self._at(_State.REASONING):
                return [Reasoning(text)]
            if self._at(_State.BEFORE):
                return [Content(text)]
        text, self._held = self._held + text, ""
        parts: list[Part] = []
        if self._at(_State.LEADING_CONTENT):
            text = self._leading_content(text)
        elif self._at(_State.LEADING_REASONING):
            text = self._leading_reasoning(text)
        if self._at(_State.BEFORE):
            before, text = self._until(text, THINK_OPEN, _State.REASONING)
            if before:
                parts.append(Content(before))
        if self._at(_State.REASONING):
            before, text = self._until(text, THINK_CLOSE, _State.AFTER)
            if before:
                parts.append(Reasoning(before))
        if self._at(_State.AFTER) and text:
            parts.append(Content(text))
        return parts

    def finish(self) -> list[Part]:
        """What was held back, once the text has ended."""
        text, self._held = self._held, ""
        if not text:
            return []
        return [Reasoning(text) if self.in_reasoning else Content(text)]

    def _at(self, state: _State) -> bool:
        return self._state is state

    def _leading_content(self, text: str) -> str:
        """What is left of the start: nothing while it may still be a marker."""
        start = text.lstrip()
        if any(m != start and m.startswith(start) for m in (THINK_OPEN, THINK_CLOSE)):
            self._held = text
            return ""
        self._state = _State.BEFORE
        if start.startswith(THINK_CLOSE):
            return start[len(THINK_CLOSE) :]
        return start if start.startswith(THINK_OPEN) else text

    def _leading_reasoning(self, text: str) -> str:
        start = text.lstrip()
        if THINK_OPEN.startswith(start) and start != THINK_OPEN:
            self._held = text
            return ""
        self._state = _State.REASONING
        return start[len(THINK_OPEN) :] if start.startswith(THINK_OPEN) else text

    def _until(self, text: str, marker: str, after: _State) -> tuple[str, str]:
        """Text before the marker and after it; holds back what may be its beginning."""
        at = text.find(marker)
        if at >= 0:
            self._state = after
            return text[:at], text[at + len(marker) :]
        keep = partial_marker(text, marker)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], ""
