"""The lexer of MiniMax-M3's tool syntax: text, opening tags and closing tags.

Every tag stands behind the namespace marker; a tag without it is text. A token keeps the text it
was read from and its place, because a parser may find that it was quoted. Tags that lost a
bracket are read too: ``bare`` says that the "<" is missing.
"""

import re
from typing import NamedTuple

from eaglerun.server.parsers.parts import partial_marker

MARKER = "]<]minimax[>["

# So much of the marker is one: less may stand in any text, as in a[1]<b.
_MARKER_START = MARKER[:3]

# Longer "tags" are text: a tag holds a parameter's name, or a tool's.
MAX_TAG_CHARS = 512

_VALUE = r"""(?:"([^"]*)"|'([^']*)'|([^\s"']+))"""
_INVOKE = re.compile(rf"invoke\s+name\s*=\s*{_VALUE}\s*")
_PARAMETER = re.compile(rf"(param(?:eter)?)\s+name\s*=\s*{_VALUE}\s*")
_ATTRIBUTES = re.compile(r"""([^\s"'=]+)(?:\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'))+\s*""")
_TAG_END = re.compile(r"[<>]")
# Tags that end where the next marker begins, if their ">" is missing.
_UNENDED = re.compile(r"tool_call|/tool_call|/invoke|invoke\s+name\s*=\s*(?:\"[^\"]*\"|'[^']*')")
# A tag without its "<", and what may still become one.
_WORD = r"""[^\s<>\]"'=/]"""
_WITH_NAME = r"(?:invoke|param(?:eter)?)\s[^<>]*"
_BARE = re.compile(rf"/?(?:{_WITH_NAME}|{_WORD}+)>")
_BARE_START = re.compile(rf"/?(?:{_WITH_NAME}|{_WORD}*)")


class Text(NamedTuple):
    raw: str
    at: int


class Stray(NamedTuple):
    """A marker with no tag behind it."""

    raw: str
    at: int


class Broken(NamedTuple):
    """The beginning of a marker or of a tag, with which the text ends."""

    raw: str
    at: int


class Open(NamedTuple):
    """``<name>``; for ``<invoke name="tool">`` ``tool`` is set.

    ``keyword`` is the word of ``<parameter name="name">``, whose closing tag repeats it.
    """

    raw: str
    at: int
    name: str
    tool: str | None = None
    keyword: str | None = None
    bare: bool = False


class Close(NamedTuple):
    raw: str
    at: int
    name: str
    bare: bool = False


Token = Text | Stray | Broken | Open | Close


class Lexer:
    """Cuts text in tokens; a marker or tag that may still be completed is held back.

    ``at`` is the place of the first character.
    """

    def __init__(self) -> None:
        self._held = ""
        self._at = 0

    @property
    def holds_back(self) -> bool:
        return bool(self._held)

    def feed(self, text: str, at: int) -> list[Token]:
        if not self._held:
            self._at = at
        text = self._held + text
        tokens: list[Token] = []
        done = 0
        while (start := text.find(MARKER, done)) >= 0:
            found = self._tag_at(text, start)
            if found is None:
                break
            if start > done:
                tokens.append(Text(text[done:start], self._at + done))
            tags, done = found
            tokens += tags
        else:
            start = len(text) - partial_marker(text[done:], MARKER)
        if start > done:
            tokens.append(Text(text[done:start], self._at + done))
        self._held = text[start:]
        self._at += start
        return tokens

    def finish(self) -> list[Token]:
        """The text that was held back."""
        text, self._held = self._held, ""
        if not text:
            return []
        return [Broken(text, self._at) if text.startswith(_MARKER_START) else Text(text, self._at)]

    def _tag_at(self, text: str, start: int) -> tuple[list[Token], int] | None:
        """The tokens of the marker at ``start`` and their end; None where more must come."""
        at = self._at + start
        begin = start + len(MARKER)
        limit = begin + MAX_TAG_CHARS
        is_short = len(text) < limit
        if begin == len(text):
            return None
        if text[begin] != "<":
            bare = _BARE.match(text, begin, limit)
            if bare is not None:
                return _tag(text[start : bare.end()], at, bare.group()[:-1], bare=True), bare.end()
            may_be = _BARE_START.match(text, begin)
            if is_short and may_be is not None and may_be.end() == len(text):
                return None
            return [Stray(MARKER, at)], begin
        stop = _TAG_END.search(text, begin + 1, limit)
        if stop is None:
            return None if is_short else ([Stray(MARKER, at)], begin)
        if stop.group() == ">":
            inner = text[begin + 1 : stop.start()]
            return _tag(text[start : stop.end()], at, inner), stop.end()
        # A "<" inside the tag: the next marker, perhaps, behind a tag that lost its ">".
        next_marker = stop.start() - 1
        inner = text[begin + 1 : next_marker].strip()
        if text[next_marker] == "]" and _UNENDED.fullmatch(inner):
            if text.startswith(MARKER, next_marker):
                return _tag(text[start:next_marker], at, inner), next_marker
            if MARKER.startswith(text[next_marker:]):
                return None
        return [Stray(MARKER, at)], begin


def _tag(raw: str, at: int, inner: str, bare: bool = False) -> list[Token]:
    if inner.startswith("/"):
        return [Close(raw, at, inner[1:].strip(), bare)]
    name = inner.removesuffix("/").strip()
    tool = keyword = None
    if (invoke := _INVOKE.fullmatch(name)) is not None:
        name, tool = "invoke", _value(invoke.groups())
    elif (parameter := _PARAMETER.fullmatch(name)) is not None:
        keyword, *values = parameter.groups()
        name = _value(values)
    elif (attributes := _ATTRIBUTES.fullmatch(name)) is not None:
        name = attributes[1]
    opened = Open(raw, at, name, tool, keyword, bare)
    return [opened, Close("", at + len(raw), name)] if inner.endswith("/") else [opened]


def _value(groups: "tuple[str | None, ...] | list[str | None]") -> str:
    return next(group for group in groups if group is not None)
