"""A checkpoint's chat template, rendered in a sandbox that ends in time and in size."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eaglerun.errors import CheckpointError
from eaglerun.server.failures import ApiError

# What a template may raise over a conversation it was not written for.
_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# Strings that a template may build by adding and repeating.
MAX_STRING = 64 << 20
# Methods of str whose result can be of any size.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})


class Refused(jinja2.TemplateError):
    """The template called raise_exception: its words are for the client."""


class Exhausted(jinja2.TemplateError):
    """A rendering took too long or grew too large."""


class _Budget(threading.local):
    """What is left for the rendering that this thread does."""

    deadline = 0.0
    chars = 0

    def spend(self, chars: int = 0) -> None:
        self.chars -= chars
        if self.chars < 0:
            raise Exhausted("is too long")
        if time.monotonic() > self.deadline:
            raise Exhausted("takes too long to render")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a look at the budget wherever a template's code leads through it."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        self.budget = _Budget()
        self.filters["tojson"] = _tojson
        for name in ("center", "format"):
            del self.filters[name]
        self.globals = {
            "raise_exception": _refuse,
            "strftime_now": _strftime_now,
            "namespace": self.globals["namespace"],
            "dict": dict,
            "range": self.globals["range"],
        }

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend()
        return super().getitem(obj, argument)

    def call(self, context: Context, obj: Callable[..., Any], /, *args: Any, **kw: Any) -> Any:
        self.budget.spend()
        return super().call(context, obj, *args, **kw)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.spend()
        if operator == "+" or (_is_number(left) and _is_number(right) and operator != "**"):
            size = len(left) + len(right) if operator == "+" and isinstance(left, str) else 0
        elif operator == "*" and isinstance(left, str) and isinstance(right, int):
            size = len(left) * right
        else:
            raise Exhausted("uses an operator that is not allowed")
        if size > MAX_STRING:
            raise Exhausted("is too long")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """str.format is not wrapped but refused, as all of _PADDING is."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _PADDING:
            return False
        return super().is_safe_attribute(obj, attr, value)


class ChatTemplate:
    """``source`` in the dialect that checkpoints use. Safe to render from several threads."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], seconds: float) -> None:
        self._environment = _Environment()
        self._special_tokens = dict(special_tokens)
        self._seconds = seconds
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is broken in line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        max_chars: int,
        *,
        add_generation_prompt: bool,
        **values: object,
    ) -> str:
        """The prompt. ApiError if the template will not render these messages."""
        budget = self._environment.budget
        budget.deadline = time.monotonic() + self._seconds
        budget.chars = max_chars
        values |= {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces = []
        try:
            for piece in self._template.generate(self._special_tokens | values):
                budget.spend(len(piece))
                pieces.append(piece)
        except (Refused, Exhausted) as error:
            raise ApiError(400, f"messages: the prompt {error.message}", "messages") from error
        except _ERRORS as error:
            raise ApiError(
                400, "messages: the chat template cannot render these messages", "messages"
            ) from error
        return "".join(pieces)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _refuse(message: str) -> None:
    raise Refused(f"is refused by the chat template: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
