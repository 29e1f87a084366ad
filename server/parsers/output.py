"""A model's whole output: reasoning, content and tool calls, as one stream of parts."""

from collections.abc import Mapping

from eaglerun.server.parsers.parts import Content, Part
from eaglerun.server.parsers.reasoning import ReasoningParser, Start
from eaglerun.server.parsers.schema import JsonSchema
from eaglerun.server.parsers.tools import ToolParser


class OutputParser:
    """The reasoning parser, with the tool parser behind it where the request has tools.

    ``forced`` is text that the prompt ends with but that belongs to the answer (the opening tag
    of a tool call that must be made); its parts come with the first ones. Then only tools that
    were offered are called.
    """

    def __init__(
        self,
        *,
        start: Start = Start.TURN,
        tools: Mapping[str, JsonSchema] | None = None,
        max_calls: int | None = None,
        forced: str = "",
    ) -> None:
        self._reasoning = ReasoningParser(start, has_tools=tools is not None)
        self._tools = None
        if tools is not None:
            self._tools = ToolParser(tools, max_calls, only_offered=bool(forced))
        # The prompt brought it, so it is no part of the generated text.
        self._num_forced = len(forced)
        self._first: list[Part] = []
        if forced:
            self._first = self.feed(forced)

    @property
    def in_reasoning(self) -> bool:
        return self._reasoning.in_reasoning

    @property
    def num_calls(self) -> int:
        return 0 if self._tools is None else self._tools.num_calls

    def feed(self, text: str) -> list[Part]:
        return self._with_first(self._behind(self._reasoning.feed(text)))

    def finish(self, cut: bool = False) -> list[Part]:
        """The rest. ``cut``: a limit ended the text, and what is open stays incomplete."""
        parts = self._behind(self._reasoning.finish(cut))
        if self._tools is not None:
            parts += self._tools.finish(cut)
        return self._with_first(parts)

    def _behind(self, parts: list[Part]) -> list[Part]:
        tools = self._tools
        if tools is None:
            return parts
        found: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                found += tools.feed(part.text, part.at - self._num_forced)
            else:
                found.append(part)
        return found

    def _with_first(self, parts: list[Part]) -> list[Part]:
        if not self._first:
            return parts
        first, self._first = self._first, []
        return first + parts
