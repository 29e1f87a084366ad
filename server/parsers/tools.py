"""MiniMax-M3's tool calls, read from the generated text as it comes.

    NS<tool_call>
    NS<invoke name="get_weather">NS<city>ParisNS</city>NS</invoke>
    NS</tool_call>

with the namespace marker for NS. What is broken in one call stays in that call: an invoke that is
not closed ends where the next one, or the block, begins or ends.
"""

from collections.abc import Mapping

from eaglerun.server.parsers.arguments import Arguments
from eaglerun.server.parsers.parts import CallArguments, CallEnd, CallStart, Content, Part
from eaglerun.server.parsers.schema import JsonSchema, Schema
from eaglerun.server.parsers.tags import MARKER, Close, Lexer, Open, Text

TOOL_BLOCK = f"{MARKER}<tool_call>\n"
INVOKE = f'{MARKER}<invoke name="'

_BLOCK, _CALL = "tool_call", "invoke"


class ToolParser:
    """Splits text in content and calls; any split of the text gives the same pieces, joined.

    ``schemas`` has the parameters of each tool; a call of an unknown tool is passed on, its
    values typed by their looks. White space around blocks is dropped. Calls after the first
    ``max_calls`` are parsed and dropped.
    """

    def __init__(self, schemas: Mapping[str, JsonSchema], max_calls: int | None = None) -> None:
        self._schemas = schemas
        self._max_calls = max_calls
        self._lexer = Lexer()
        self._arguments: Arguments | None = None
        self._in_block = False
        self._space = ""
        self._parts: list[Part] = []
        self.num_calls = 0

    def feed(self, text: str) -> list[Part]:
        return self._read(self._lexer.feed(text))

    def finish(self) -> list[Part]:
        """The rest, once the text has ended; a call that is still open ends here."""
        parts = self._read(self._lexer.finish())
        self._end_call(complete=False)
        if self._space and not self.num_calls:
            self._parts.append(Content(self._space))
        parts += self._parts
        self._parts, self._space = [], ""
        return parts

    def _read(self, tokens: list[Text | Open | Close]) -> list[Part]:
        for token in tokens:
            if isinstance(token, Text):
                self._text(token.text)
            elif isinstance(token, Open):
                self._open(token)
            else:
                self._close(token.name)
        self._take_arguments()
        parts, self._parts = self._parts, []
        return parts

    def _text(self, text: str) -> None:
        if self._arguments is not None:
            self._arguments.text(text)
            return
        text = self._space + text
        stripped = text.rstrip()
        self._space = text[len(stripped) :]
        if stripped:
            self._parts.append(Content(stripped))

    def _open(self, tag: Open) -> None:
        call = self._arguments
        if tag.tool:
            self._start_call(tag.tool)
        elif tag.name == _BLOCK and (call is None or not call.expects(_BLOCK)):
            self._end_call(complete=True)
            self._in_block = True
            self._space = ""
        elif call is not None:
            call.open(tag.name)
        else:
            self._text(f"{MARKER}<{tag.name}>")

    def _close(self, name: str) -> None:
        call = self._arguments
        if call is not None and (call.is_open(name) or name not in (_BLOCK, _CALL)):
            call.close(name)
        elif name == _CALL and call is not None:
            self._end_call(complete=True)
        elif name == _BLOCK and self._in_block:
            self._end_call(complete=True)
            self._in_block = False
            self._space = ""
        elif not self._in_block:
            self._text(f"{MARKER}</{name}>")

    def _start_call(self, tool: str) -> None:
        self._end_call(complete=True)
        self._in_block = True
        self._space = ""
        self._arguments = Arguments(Schema.of(self._schemas.get(tool, {})))
        self._emit(CallStart(self.num_calls, tool))
        self.num_calls += 1

    def _end_call(self, complete: bool) -> None:
        if self._arguments is None:
            return
        self._arguments.finish(complete)
        self._take_arguments()
        self._arguments = None
        self._emit(CallEnd(self.num_calls - 1))

    def _take_arguments(self) -> None:
        json = self._arguments.take() if self._arguments is not None else ""
        if json:
            self._emit(CallArguments(self.num_calls - 1, json))

    def _emit(self, part: CallStart | CallArguments | CallEnd) -> None:
        if self._max_calls is None or part.call < self._max_calls:
            self._parts.append(part)
