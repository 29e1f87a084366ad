"""What the parsers say about generated text, piece by piece."""

from typing import NamedTuple


class Reasoning(NamedTuple):
    """Text between the thinking markers."""

    text: str


class Content(NamedTuple):
    """Text of the answer; it stands at character ``at`` of the generated text."""

    text: str
    at: int = 0


class CallStart(NamedTuple):
    """Tool call number ``call`` of the answer begins."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments; all of a call's ``json`` in order are one JSON object."""

    call: int
    json: str


class CallEnd(NamedTuple):
    """The call is complete. A call that the answer's limit cut off has no end."""

    call: int


Part = Reasoning | Content | CallStart | CallArguments | CallEnd


def partial_marker(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` that may turn into ``marker`` with more text."""
    at = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while at >= 0:
        if marker.startswith(text[at:]):
            return len(text) - at
        at = text.find(marker[0], at + 1)
    return 0
