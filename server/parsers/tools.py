"""MiniMax-M3's tool calls, read from the generated text as it comes.

    NS<tool_call>
    NS<invoke name="get_weather">NS<city>ParisNS</city>NS</invoke>
    NS</tool_call>

with the namespace marker for NS. Models break this syntax, and they quote it. So a tag where none
belongs waits until the text tells which it was:

* Inside a string, every tag but the closing one waits. If the closing tag comes, all before it is
  the string's text. If the text ends without it, the string ended before the first of the tags.
* An opening of a block waits for what follows. A call makes it a block; anything else makes it
  data inside a call, and text outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

from eaglerun.server.parsers.arguments import Arguments, Place
from eaglerun.server.parsers.parts import CallArguments, CallEnd, CallStart, Content, Part
from eaglerun.server.parsers.schema import JsonSchema, Schema
from eaglerun.server.parsers.tags import MARKER, Broken, Close, Lexer, Open, Stray, Text, Token

TOOL_BLOCK = f"{MARKER}<tool_call>\n"
INVOKE = f'{MARKER}<invoke name="'

# Strings without an end in one answer that are told from quotations; in later ones a tag ends
# the string at once. Each costs one more reading of the rest.
MAX_RECOVERIES = 64

_BLOCK, _CALL = "tool_call", "invoke"


class _Verdict(Enum):
    WAIT = auto()
    TEXT = auto()
    STRUCTURE = auto()


@dataclass(slots=True)
class _Quotation:
    """Tags inside an element, which are its text if the element is closed after them.

    A call among them may have parameters of the element's own name: their closing tags do not
    count. ``num_own`` of them are open.
    """

    tokens: list[Token] = field(default_factory=list)
    in_call: bool = False
    num_own: int = 0

    def add(self, token: Token, arguments: Arguments) -> _Verdict:
        self.tokens.append(token)
        if isinstance(token, Open) and not token.bare:
            if token.tool:
                self.in_call = True
            elif self.in_call and arguments.closes(token.name):
                self.num_own += 1
        elif isinstance(token, Close):
            if arguments.closes(token.name):
                if not self.num_own:
                    return _Verdict.TEXT
                self.num_own -= 1
            elif token.name == _CALL:
                self.in_call, self.num_own = False, 0
        return _Verdict.WAIT


@dataclass(slots=True)
class _Opening:
    """The opening tag of a block, and the white space after it."""

    tokens: list[Token] = field(default_factory=list)

    def add(self, token: Token) -> _Verdict:
        self.tokens.append(token)
        if isinstance(token, Text) and not token.raw.strip():
            return _Verdict.WAIT
        called = isinstance(token, Open) and bool(token.tool)
        return _Verdict.STRUCTURE if called else _Verdict.TEXT


class ToolParser:
    """Splits text in content and calls; any split of the text gives the same pieces, joined.

    ``schemas`` has the parameters of each tool. A call of another tool is passed on, its values
    typed by their looks, unless ``only_offered``: then it is dropped. Calls after the first
    ``max_calls`` are dropped too. Content keeps its white space, except where it is all of the
    text before, between or after blocks.
    """

    def __init__(
        self,
        schemas: Mapping[str, JsonSchema],
        max_calls: int | None = None,
        only_offered: bool = False,
    ) -> None:
        self._schemas = schemas
        self._max_calls = max_calls
        self._only_offered = only_offered
        self._lexer = Lexer()
        self._arguments: Arguments | None = None
        self._waiting: _Quotation | _Opening | None = None
        self._num_recoveries = 0
        self._in_block = False
        # White space of a stretch of text that has nothing else so far.
        self._space: list[Text] = []
        self._says_something = False
        self._parts: list[Part] = []
        # The call that is open is passed on.
        self._is_passed_on = False
        self.num_calls = 0

    def feed(self, text: str, at: int = 0) -> list[Part]:
        if MARKER[0] in text or self._lexer.holds_back or self._waiting is not None:
            self._read(self._lexer.feed(text, at))
        elif self._arguments is not None:
            # The usual pieces have nothing to do with a tag.
            self._arguments.text(text)
        elif self._says_something:
            return [Content(text, at)] if text else []
        else:
            self._content(Text(text, at))
        return self._take_parts()

    def finish(self, cut: bool = False) -> list[Part]:
        """The rest, once the text has ended; a call that is still open ends here.

        ``cut``: a limit ended the text. Then nothing is recovered from what may be half a
        quotation, the beginning of a tag is dropped, and an open call stays incomplete.
        """
        for token in self._lexer.finish():
            between_tags = self._arguments is None and (self._in_block or self._waiting is not None)
            if not (cut and (between_tags or isinstance(token, Broken))):
                self._push(token)
        while self._waiting is not None:
            self._resolve(cut)
        if cut and self._arguments is not None:
            self._arguments.break_off()
            self._take_arguments()
            self._arguments = None
        self._end_call(complete=False)
        if not self.num_calls:
            self._parts += [Content(text.raw, text.at) for text in self._space]
        self._space = []
        return self._take_parts()

    def _take_parts(self) -> list[Part]:
        self._take_arguments()
        parts, self._parts = self._parts, []
        return parts

    def _read(self, tokens: list[Token]) -> None:
        for token in tokens:
            self._push(token)

    def _push(self, token: Token) -> None:
        waiting = self._waiting
        if waiting is None:
            self._take(token)
            return
        if isinstance(waiting, _Quotation):
            assert self._arguments is not None
            verdict = waiting.add(token, self._arguments)
        else:
            verdict = waiting.add(token)
        if verdict is _Verdict.WAIT:
            return
        self._waiting = None
        if isinstance(waiting, _Quotation):
            self._text_of(waiting.tokens[:-1])
            self._take(token)
        elif verdict is _Verdict.STRUCTURE:
            self._block(waiting.tokens)
        else:
            self._no_block(waiting.tokens)

    def _resolve(self, cut: bool) -> None:
        """The text has ended, and with it the waiting."""
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        if isinstance(waiting, _Quotation):
            if cut:
                self._text_of(waiting.tokens)
            else:
                self._recover(waiting.tokens)
        elif not cut and (self._arguments is not None or self._says_something):
            self._no_block(waiting.tokens)

    def _take(self, token: Token) -> None:
        """A token, where nothing waits."""
        if self._arguments is None:
            self._take_outside(token)
            return
        place = self._arguments.place
        if isinstance(token, Text | Stray | Broken):
            self._take_text(self._arguments, token, place)
        elif place is Place.STRING:
            if self._closes(token):
                self._arguments.close_top()
            elif isinstance(token, Open) and token.bare:
                self._arguments.text(token.raw)
            else:
                self._quote(token)
        elif place is Place.SCALAR:
            self._take_in_scalar(self._arguments, token)
        elif isinstance(token, Open):
            self._open(self._arguments, token, place)
        else:
            self._close(self._arguments, token, place)

    def _take_text(self, arguments: Arguments, token: Text | Stray | Broken, place: Place) -> None:
        if isinstance(token, Text) or place is Place.STRING:
            arguments.text(token.raw)
        elif isinstance(token, Stray):
            arguments.stray()

    def _closes(self, token: Open | Close) -> bool:
        assert self._arguments is not None
        return isinstance(token, Close) and self._arguments.closes(token.name)

    def _take_in_scalar(self, arguments: Arguments, token: Open | Close) -> None:
        """A number has no tags: any ends it, and one that closes nothing else is spent by that."""
        is_own = self._closes(token)
        arguments.close_top()
        if is_own:
            return
        known = isinstance(token, Open) or token.name in (_BLOCK, _CALL)
        if known or arguments.is_open(token.name):
            self._take(token)

    def _open(self, arguments: Arguments, tag: Open, place: Place) -> None:
        if tag.tool:
            if place is Place.FREE:
                self._quote(tag)
            else:
                self._start_call(tag.tool)
        elif tag.name == _BLOCK and not arguments.expects(_BLOCK):
            self._waiting = _Opening([tag])
        elif tag.bare and not arguments.allows(tag.name):
            arguments.stray()
            arguments.text(tag.raw.removeprefix(MARKER))
        else:
            arguments.open(tag.name, tag.keyword)

    def _close(self, arguments: Arguments, tag: Close, place: Place) -> None:
        if arguments.is_open(tag.name):
            arguments.close(tag.name)
        elif tag.name in (_BLOCK, _CALL):
            if place is Place.FREE:
                self._quote(tag)
            else:
                self._end_by(tag)
        elif not tag.bare or arguments.allows(tag.name):
            arguments.close_unopened(tag.name)

    def _quote(self, tag: Open | Close) -> None:
        """A tag inside a string: what it is will be known at the string's end."""
        if self._num_recoveries > MAX_RECOVERIES:
            self._recover([tag])
            return
        assert self._arguments is not None
        quotation = _Quotation()
        quotation.add(tag, self._arguments)
        self._waiting = quotation

    def _recover(self, tokens: list[Token]) -> None:
        """The innermost element was never closed: it ended before these tokens."""
        self._num_recoveries += 1
        first, arguments = tokens[0], self._arguments
        assert arguments is not None
        if isinstance(first, Close) and not arguments.is_open(first.name):
            if first.name in (_BLOCK, _CALL):
                self._end_by(first)
            else:
                # Its closing tag, with another name.
                arguments.close_top()
            tokens = tokens[1:]
        elif isinstance(first, Open) and first.tool:
            self._end_call(complete=True)
        else:
            arguments.close_top()
        self._read(tokens)

    def _block(self, tokens: list[Token]) -> None:
        """A block begins, or a new one inside a call; inside an element both may be a quotation."""
        *_, invoke = tokens
        arguments = self._arguments
        if arguments is not None and arguments.place is Place.FREE:
            first = tokens[0]
            assert isinstance(first, Open)
            self._quote(first)
            self._read(tokens[1:])
            return
        self._end_call(complete=True)
        self._begin_block()
        self._take(invoke)

    def _no_block(self, tokens: list[Token]) -> None:
        """An element with a block's name inside a call, or a quoted tag outside."""
        first, *rest = tokens
        assert isinstance(first, Open)
        if self._arguments is None:
            last = tokens[-1]
            if isinstance(last, Close) and last.name == _BLOCK and not self._says_something:
                # An empty block, and no text that could be about it.
                return
            self._content(first)
        elif first.bare and not self._arguments.allows(first.name):
            self._arguments.text(first.raw.removeprefix(MARKER))
        else:
            self._arguments.open(first.name, first.keyword)
        self._read(rest)

    def _take_outside(self, token: Token) -> None:
        """A token outside a call."""
        if isinstance(token, Open) and token.tool:
            self._start_call(token.tool)
        elif isinstance(token, Open) and token.name == _BLOCK:
            if not self._in_block:
                self._waiting = _Opening([token])
        elif isinstance(token, Close) and self._in_block:
            if token.name == _BLOCK:
                self._in_block = False
                self._end_text()
        elif not (isinstance(token, Close) and token.name in (_BLOCK, _CALL)):
            self._content(token)
        elif self._says_something:
            # It is quoted; with no text before it, it closes nothing, and is dropped.
            self._content(token)

    def _content(self, token: Token) -> None:
        if not token.raw:
            return
        if not self._says_something:
            if not token.raw.strip():
                self._space.append(Text(token.raw, token.at))
                return
            self._says_something = True
            self._parts += [Content(text.raw, text.at) for text in self._space]
            self._space = []
        self._parts.append(Content(token.raw, token.at))

    def _end_text(self) -> None:
        self._space = []
        self._says_something = False

    def _begin_block(self) -> None:
        self._in_block = True
        self._end_text()

    def _end_by(self, tag: Close) -> None:
        """The closing tag of a call or of a block."""
        self._end_call(complete=True)
        self._in_block = tag.name == _CALL
        self._end_text()

    def _text_of(self, tokens: list[Token]) -> None:
        """Tokens that were quoted, as text of the innermost element."""
        assert self._arguments is not None
        self._arguments.text("".join(token.raw for token in tokens))

    def _start_call(self, tool: str) -> None:
        self._end_call(complete=True)
        self._begin_block()
        self._arguments = Arguments(Schema.of(self._schemas.get(tool, {})))
        known = tool in self._schemas or not self._only_offered
        wanted = self._max_calls is None or self.num_calls < self._max_calls
        self._is_passed_on = known and wanted
        if self._is_passed_on:
            self._parts.append(CallStart(self.num_calls, tool))
            self.num_calls += 1

    def _end_call(self, complete: bool) -> None:
        if self._arguments is None:
            return
        self._arguments.finish(complete)
        self._take_arguments()
        self._arguments = None
        if self._is_passed_on:
            self._parts.append(CallEnd(self.num_calls - 1))

    def _take_arguments(self) -> None:
        json = self._arguments.take() if self._arguments is not None else ""
        if json and self._is_passed_on:
            self._parts.append(CallArguments(self.num_calls - 1, json))
