"""Telling reasoning from content in MiniMax-M3's output, as it comes.

The state comes from the generated text and from what the prompt ends with: the opening marker
(thinking mode "enabled"), a part of an answer that goes on, or neither. The markers are matched as
text, for a model may spell them with other tokens than their own.
"""

from enum import Enum, auto

from eaglerun.server.parsers.parts import Content, Part, Reasoning, partial_marker
from eaglerun.server.parsers.tags import MARKER

THINK_OPEN = "<mm:think>"
THINK_CLOSE = "</mm:think>"

_BLOCK_OPEN = f"{MARKER}<tool_call>"
_BLOCK_CLOSE = f"{MARKER}</tool_call>"
# So much of a marker is one: "<" alone may begin any text.
_MARKER_STARTS = (THINK_OPEN[:4], THINK_CLOSE[:5])


class Start(Enum):
    """The place in an answer at which the prompt ends."""

    TURN = auto()
    REASONING = auto()
    CONTENT = auto()


class _State(Enum):
    LEADING = auto()
    LEADING_REASONING = auto()
    REASONING = auto()
    CALL_IN_REASONING = auto()
    CLOSED = auto()
    CONTENT = auto()


_STATES = {
    Start.TURN: _State.LEADING,
    Start.REASONING: _State.LEADING_REASONING,
    Start.CONTENT: _State.CONTENT,
}


class ReasoningParser:
    """Splits text at the thinking block; any split of the text gives the same pieces.

    A block stands at the very start, white space and closing markers of nothing aside, which are
    dropped. After it all is content, further markers too, but for closing markers right behind
    the block. An opening marker that repeats the prompt's is dropped. Without a closing marker all
    the rest is reasoning, with one exception: where ``has_tools`` and the text ends with tool
    blocks, the reasoning ended before them.
    """

    def __init__(self, start: Start = Start.TURN, has_tools: bool = False) -> None:
        self._state = _STATES[start]
        self._has_tools = has_tools
        self._held = ""
        # The place of the held text.
        self._at = 0

    @property
    def in_reasoning(self) -> bool:
        states = (_State.LEADING_REASONING, _State.REASONING, _State.CALL_IN_REASONING)
        return self._state in states

    def feed(self, text: str) -> list[Part]:
        if not text:
            return []
        if not self._held:
            # The usual piece: it has nothing to do with a marker.
            if self._state is _State.CONTENT:
                return [Content(self._advance(text), self._at - len(text))]
            if self._state is _State.REASONING and "<" not in text and "]" not in text:
                return [Reasoning(self._advance(text))]
        text, self._held = self._held + text, ""
        parts: list[Part] = []
        before = None
        # Each state takes what is its own, until one holds back or nothing is left.
        while text and before is not self._state:
            before = self._state
            text = self._take(text, parts)
        self._held = text
        return parts

    def finish(self, cut: bool = False) -> list[Part]:
        """The text that was held back. ``cut``: a limit ended it, in a marker maybe."""
        text, self._held = self._held, ""
        if self._state is _State.CALL_IN_REASONING:
            blocks = _blocks_at_end(text)
            thought = text[: len(text) - blocks]
            parts: list[Part] = [Reasoning(thought)] if thought else []
            if blocks:
                parts.append(Content(text[len(thought) :], self._at + len(thought)))
            return parts
        if cut and text.lstrip().startswith(_MARKER_STARTS):
            return []
        if not text:
            return []
        return [Reasoning(text) if self.in_reasoning else Content(text, self._at)]

    def _advance(self, text: str) -> str:
        self._at += len(text)
        return text

    def _take(self, text: str, parts: list[Part]) -> str:
        """Take what belongs to the state, and return the rest; a rest in the same state waits."""
        match self._state:
            case _State.LEADING:
                return self._leading(text, THINK_OPEN, _State.REASONING)
            case _State.CLOSED:
                return self._leading(text, None, _State.CONTENT)
            case _State.LEADING_REASONING:
                return self._leading_reasoning(text)
            case _State.REASONING:
                return self._reasoning(text, parts)
            case _State.CALL_IN_REASONING:
                return self._call_in_reasoning(text, parts)
            case _State.CONTENT:
                parts.append(Content(self._advance(text), self._at - len(text)))
                return ""

    def _leading(self, text: str, opening: str | None, opened: _State) -> str:
        """Drop closing markers, and the opening marker that may come after them."""
        while True:
            start = text.lstrip()
            if not start.startswith(THINK_CLOSE):
                break
            self._at += len(text) - len(start) + len(THINK_CLOSE)
            text = start[len(THINK_CLOSE) :]
        if opening is not None and start.startswith(opening):
            self._state = opened
            self._at += len(text) - len(start) + len(opening)
            return start[len(opening) :]
        if not any(marker.startswith(start) for marker in (THINK_CLOSE, opening) if marker):
            self._state = _State.CONTENT
        return text

    def _leading_reasoning(self, text: str) -> str:
        while (start := text.lstrip()).startswith(THINK_OPEN):
            self._at += len(text) - len(start) + len(THINK_OPEN)
            text = start[len(THINK_OPEN) :]
        if not THINK_OPEN.startswith(start):
            self._state = _State.REASONING
        return text

    def _reasoning(self, text: str, parts: list[Part]) -> str:
        """Reasoning up to its closing marker, or to a tool block, which is another state's."""
        close = text.find(THINK_CLOSE)
        block = text.find(_BLOCK_OPEN) if self._has_tools else -1
        end, rest = len(text), ""
        if close >= 0 and not 0 <= block < close:
            self._state = _State.CLOSED
            end, rest = close, text[close + len(THINK_CLOSE) :]
        elif block >= 0:
            self._state = _State.CALL_IN_REASONING
            end, rest = block, text[block:]
        else:
            keep = partial_marker(text, THINK_CLOSE)
            if self._has_tools:
                keep = max(keep, partial_marker(text, _BLOCK_OPEN))
            end -= keep
            rest = text[end:]
        if end:
            parts.append(Reasoning(text[:end]))
        self._at += len(text) - len(rest)
        return rest

    def _call_in_reasoning(self, text: str, parts: list[Part]) -> str:
        """Nothing, until a closing marker says that the call was only thought of."""
        close = text.find(THINK_CLOSE)
        if close < 0:
            return text
        parts.append(Reasoning(text[:close]))
        self._state = _State.CLOSED
        end = close + len(THINK_CLOSE)
        self._at += end
        return text[end:]


def _blocks_at_end(text: str) -> int:
    """How many characters at the end are tool blocks with nothing but white space around them."""
    start = len(text)
    end = len(text.rstrip())
    while text.endswith(_BLOCK_CLOSE, 0, end):
        opened = text.rfind(_BLOCK_OPEN, 0, end)
        if opened < 0:
            break
        start = opened
        end = len(text[:start].rstrip())
    return len(text) - start
