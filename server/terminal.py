"""A conversation on a terminal: what is written how, and which tokens are tinted."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TextIO

from eaglerun.messages import SpeculationStats
from eaglerun.server.parsers.reasoning import THINK_CLOSE, THINK_OPEN

GREEN, DIM, RED = "32", "2", "31"
# How far ahead the token of a character is looked for.
_NEAR = 64
_PART = "\ufffd"


def has_color(stream: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether a stream takes colours: a terminal that knows them, and no NO_COLOR."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


class Screen:
    """Answers go to ``out``, everything about them to ``notes``; both may be one terminal."""

    def __init__(self, out: TextIO, notes: TextIO, environ: Mapping[str, str] = os.environ) -> None:
        self._out = out
        self._notes = notes
        self._in_line: set[TextIO] = set()
        self._color = {stream: has_color(stream, environ) for stream in (out, notes)}

    @property
    def has_tints(self) -> bool:
        return self._color[self._out]

    def write(self, text: str, drafted: bool) -> None:
        """Write text of an answer."""
        self._put(self._out, text, [GREEN] if drafted else [])

    def think(self, text: str, drafted: bool) -> None:
        """Write text of the thinking; where answers are collected, it does not go among them."""
        stream = self._out if self._out.isatty() else self._notes
        self._put(stream, text, [DIM, GREEN] if drafted else [DIM])

    def end_line(self) -> None:
        """End lines that have begun, of an answer that broke off."""
        for stream in (self._out, self._notes):
            if stream in self._in_line:
                self._put(stream, "\n", [])

    def note(self, text: str, *styles: str) -> None:
        """Write a line about the conversation."""
        self._put(self._notes, text, styles)
        self._put(self._notes, "\n", [])

    def _put(self, stream: TextIO, text: str, styles: Sequence[str]) -> None:
        """On a terminal nothing in ``text`` moves the cursor or changes a colour."""
        if text.endswith("\n"):
            self._in_line.discard(stream)
        elif text:
            self._in_line.add(stream)
        if stream.isatty():
            text = printable(text)
        if styles and text and self._color[stream]:
            text = f"\x1b[{';'.join(styles)}m{text}\x1b[0m"
        stream.write(text)
        stream.flush()


def acceptance_words(stats: SpeculationStats) -> str:
    """The end of a sentence on an answer; nothing where no draft was judged."""
    if not stats.steps:
        return ""
    return (
        f", acceptance length {stats.mean_acceptance_length:.2f}, "
        f"{100 * stats.acceptance_rate:.1f}% of drafts accepted"
    )


def printable(text: str) -> str:
    """Control characters but newlines and tabs, which a terminal would obey, as U+FFFD."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _is_control(c) else _PART for c in text)


def _is_control(char: str) -> bool:
    return ord(char) < 32 or 127 <= ord(char) < 160


class Tints:
    """Tells which characters of an answer were drafted, from the tokens that came with them.

    The parsers have taken markers from the text, and it may come later than its tokens. So each
    character is looked for in the tokens' text. A character of several tokens counts with the last
    of them, and one that is not found with the character before it.
    """

    def __init__(self) -> None:
        self._chars: list[tuple[str, bool]] = []
        self._drafted = False

    def add(self, tokens: Iterable[tuple[str, bool]]) -> None:
        for text, drafted in tokens:
            if text not in (THINK_OPEN, THINK_CLOSE):
                self._chars += [(char, drafted) for char in text]

    def split(self, text: str) -> Iterator[tuple[str, bool]]:
        """The text in runs, each with whether it was drafted."""
        run = ""
        for char in text:
            drafted = self._take(char)
            if run and drafted != self._drafted:
                yield run, self._drafted
                run = ""
            run += char
            self._drafted = drafted
        if run:
            yield run, self._drafted

    def _take(self, char: str) -> bool:
        chars = self._chars
        if chars and chars[0][0] == _PART and char != _PART:
            drafted = chars[0][1]
            while chars and chars[0][0] == _PART:
                drafted = chars.pop(0)[1]
            return drafted
        for i, (known, drafted) in enumerate(chars[:_NEAR]):
            if known == char:
                del chars[: i + 1]
                return drafted
        return self._drafted


def is_text(text: str) -> bool:
    """Tell whether a text of the command line or a terminal was in its encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def bytes_kept(stream: object) -> Iterator[None]:
    """Within, bytes that are no text come as lone surrogates, which is_text() finds."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors="surrogateescape")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)
