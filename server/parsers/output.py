"""A model's whole output: reasoning, content and tool calls, as one stream of parts."""

from collections.abc import Mapping

from eaglerun.server.parsers.parts import Content, Part
from eaglerun.server.parsers.reasoning import ReasoningParser
from eaglerun.server.parsers.schema import JsonSchema
from eaglerun.server.parsers.tools import ToolParser


class OutputParser:
    """The reasoning parser, with the tool parser behind it where the request has tools.

    ``forced`` is text that the prompt ends with but that belongs to the answer (the opening tag
    of a tool call that must be made); its parts come with the first ones.
    """

    def __init__(
        self,
        *,
        starts_in_reasoning: bool = False,
        tools: Mapping[str, JsonSchema] | None = None,
        max_calls: int | None = None,
        forced: str = "",
    ) -> None:
        self._reasoning = ReasoningParser(starts_in_reasoning)
        self._tools = None if tools is None else ToolParser(tools, max_calls)
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

    def finish(self) -> list[Part]:
        parts = self._behind(self._reasoning.finish())
        if self._tools is not None:
            parts += self._tools.finish()
        return self._with_first(parts)

    def _behind(self, parts: list[Part]) -> list[Part]:
        tools = self._tools
        if tools is None:
            return parts
        found: list[Part] = []
        for part in parts:
            found += tools.feed(part.text) if isinstance(part, Content) else [part]
        return found

    def _with_first(self, parts: list[Part]) -> list[Part]:
        if not self._first:
            return parts
        first, self._first = self._first, []
        return first + parts
