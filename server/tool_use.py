"""The tools of a request, as the template, the parser and a forced call need them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eaglerun.server.failures import refuse
from eaglerun.server.parsers.schema import JsonSchema


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request. ``schemas`` None: its output is not searched for calls.

    forced    names of the tools of which one must be called;  is_named: the request named it
    """

    for_template: list[dict[str, Any]] | None = None
    schemas: dict[str, JsonSchema] | None = None
    forced: tuple[str, ...] = ()
    is_named: bool = False


def tool_use(
    functions: Sequence[dict[str, Any]],
    choice: Literal["none", "auto", "required"] | None,
    named: str | None,
    max_tools: int,
) -> ToolUse:
    """Tools as the template, the parser and a forced call need them."""
    if len(functions) > max_tools:
        raise refuse("tools", f"{len(functions)} given, allowed {max_tools}")
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        raise refuse("tools", "two have the same name")
    if not functions:
        if named is not None or choice == "required":
            raise refuse("tool_choice", "needs tools")
        return ToolUse()
    if named is not None and named not in names:
        raise refuse("tool_choice", "names no function of tools")
    if choice == "none":
        return ToolUse()
    forced = (named,) if named is not None else tuple(names) if choice == "required" else ()
    return ToolUse(
        for_template=[{"type": "function", "function": function} for function in functions],
        schemas={
            function["name"]: function.get("parameters", {})
            for function in functions
            if named is None or function["name"] == named
        },
        forced=forced,
        is_named=named is not None,
    )
