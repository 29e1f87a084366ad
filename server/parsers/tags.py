"""The lexer of MiniMax-M3's tool syntax: text, opening tags and closing tags.

Every tag stands behind the namespace marker; a tag without it is text.
"""

import re
from typing import NamedTuple

from eaglerun.server.parsers.parts import partial_marker

MARKER = "]<]minimax[>["

# Longer "tags" are text: a tag holds a parameter's name, or a tool's.
MAX_TAG_CHARS = 512

_TAG_END = re.compile(r"[<>]")
_INVOKE = re.compile(r"""invoke\s+name\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+))\s*""")


class Text(NamedTuple):
    text: str


class Open(NamedTuple):
    """``<name>``; for ``<invoke name="tool">`` ``tool`` is set."""

    name: str
    tool: str | None


class Close(NamedTuple):
    name: str


Token = Text | Open | Close


class Lexer:
    """Cuts text in tokens; a marker or tag that may still be completed is held back."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[Token]:
        text = self._held + text
        tokens: list[Token] = []
        at = 0
        while True:
            start = text.find(MARKER, at)
            if start < 0:
                end = len(text) - partial_marker(text[at:], MARKER)
                break
            tag_at = start + len(MARKER)
            if tag_at == len(text):
                end = start
                break
            stop = None
            if text[tag_at] == "<":
                stop = _TAG_END.search(text, tag_at + 1, tag_at + MAX_TAG_CHARS)
                if stop is None and len(text) < tag_at + MAX_TAG_CHARS:
                    end = start
                    break
            if stop is None or stop.group() == "<":
                # A marker with no tag behind it is text, and so is the "<" of a broken tag.
                after = tag_at + (text[tag_at] == "<")
                tokens.append(Text(text[at:after]))
                at = after
                continue
            if start > at:
                tokens.append(Text(text[at:start]))
            at = stop.end()
            tokens += _tag(text[tag_at + 1 : at - 1])
        if end > at:
            tokens.append(Text(text[at:end]))
        self._held = text[max(at, end) :]
        return tokens

    def finish(self) -> list[Token]:
        """What was held back, as text."""
        text, self._held = self._held, ""
        return [Text(text)] if text else []


def _tag(inner: str) -> list[Token]:
    if inner.startswith("/"):
        return [Close(inner[1:].strip())]
    name = inner.removesuffix("/").strip()
    invoke = _INVOKE.fullmatch(name)
    tool = None
    if invoke is not None:
        name = "invoke"
        tool = next(group for group in invoke.groups() if group is not None)
    opened = Open(name, tool)
    return [opened, Close(name)] if inner.endswith("/") else [opened]
