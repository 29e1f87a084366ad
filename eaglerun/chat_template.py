"""A checkpoint's chat template: found, and rendered in a sandbox that ends in time and in size."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eaglerun.errors import CheckpointError, RequestError

# Errors that a template may raise over a conversation it was not written for.
_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
# The template, and the JSON files beside it.
MAX_FILE_BYTES = 64 << 20
# Strings that a template may build by adding and repeating.
MAX_STRING = 64 << 20
# One rendering may take so long.
MAX_SECONDS = 2.0
# Stands behind the final message of a conversation that is to be continued: the prompt ends there.
_CUT = "\ue000cut here\ue001"
# Names that render() gives to every template.
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
# Names in a template's scope that a client's values may not take.
RESERVED = _GIVEN.union(
    _SPECIAL_TOKENS,
    ("loop", "self", "namespace", "raise_exception", "strftime_now", "dict", "range"),
)
# Methods of str whose result can be of any size.
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})


class _Generation(Extension):
    """``{% generation %}`` marks what a model is trained on; in a prompt it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Refused(jinja2.TemplateError):
    """The template called raise_exception: its words are for the client."""


class Exhausted(jinja2.TemplateError):
    """A rendering took too long or grew too large."""


class _Budget(threading.local):
    """Time and characters left for the rendering that this thread does."""

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
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
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
    """``source`` in the dialect that checkpoints use. Safe to render from several threads.

    ``tool_source`` takes its place where there are tools; None: one template does for both.

    variables  names that the template reads beyond those that render() always gives
    tokens     special tokens by their names, which the template may read too
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        seconds: float = MAX_SECONDS,
        tool_source: str | None = None,
    ) -> None:
        self._environment = _Environment()
        self.tokens = dict(special_tokens)
        self._seconds = seconds
        names: set[str] = set()
        self._template = self._compile(source, names)
        self._tool_template = self._template
        if tool_source is not None and tool_source != source:
            self._tool_template = self._compile(tool_source, names)
        self.variables = names.difference(_GIVEN, self.tokens, self._environment.globals)

    def _compile(self, source: str, names: set[str]) -> jinja2.Template:
        """Compile, and add the names that the template reads."""
        try:
            names |= find_undeclared_variables(self._environment.parse(source))
            return self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template is broken in line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, SyntaxError, ValueError) as error:
            # Python's compiler has limits of its own for what the template becomes.
            raise CheckpointError(
                f"the chat template is broken: {type(error).__name__}, it is nested too deeply"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        max_chars: int,
        *,
        add_generation_prompt: bool,
        continue_final_message: bool = False,
        **values: object,
    ) -> str:
        """Render the prompt. RequestError if the template will not render these messages.

        With ``continue_final_message`` the prompt ends where the final message does, so that the
        answer goes on with it.
        """
        if continue_final_message:
            messages = _marked(messages, add_generation_prompt)
        values |= {
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            template = self._tool_template if tools else self._template
            text = self._render(template, self.tokens | values, max_chars)
        except (Refused, Exhausted) as error:
            raise RequestError("messages", f"the prompt {error.message}") from error
        except _ERRORS as error:
            raise RequestError(
                "messages", "the chat template cannot render these messages"
            ) from error
        if not continue_final_message:
            return text
        end = text.rfind(_CUT)
        if end < 0:
            raise RequestError(
                "continue_final_message", "the chat template does not show the final message"
            )
        return text[:end]

    def _render(
        self, template: jinja2.Template, values: Mapping[str, object], max_chars: int
    ) -> str:
        budget = self._environment.budget
        budget.deadline = time.monotonic() + self._seconds
        budget.chars = max_chars
        pieces = []
        for piece in template.generate(values):
            budget.spend(len(piece))
            pieces.append(piece)
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A checkpoint's template as its files give it: the arguments of ChatTemplate."""

    source: str
    special_tokens: dict[str, str]
    tool_source: str | None


def read_template(path: Path, file: Path | None = None) -> TemplateSource | None:
    """The chat template of a checkpoint's directory; None where it has none.

    ``file`` takes the place of the checkpoint's template. Raises CheckpointError where a file is
    missing or broken.
    """
    config_file = path / "tokenizer_config.json"
    config = read_json(config_file)
    found = config.get("chat_template")
    if file is None and (path / "chat_template.jinja").is_file():
        file = path / "chat_template.jinja"
    if file is not None:
        if not file.is_file():
            raise CheckpointError(f"the chat template {file} does not exist")
        found = _read_text(file)
    if found is None:
        return None
    special = {
        name: text
        for name in _SPECIAL_TOKENS
        if (text := _token_text(config.get(name))) is not None
    }
    if isinstance(found, str):
        return TemplateSource(found, special, None)
    named = _named_templates(found, config_file)
    return TemplateSource(named["default"], special, named.get("tool_use"))


def load_chat_template(path: Path, file: Path | None = None) -> ChatTemplate | None:
    """read_template(), compiled."""
    found = read_template(path, file)
    if found is None:
        return None
    return ChatTemplate(found.source, found.special_tokens, tool_source=found.tool_source)


def _named_templates(found: object, file: Path) -> dict[str, str]:
    """The templates of a list by name; "tool_use" is the one for requests with tools."""
    named = {}
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("template"), str):
            named[str(entry.get("name"))] = entry["template"]
    if "default" not in named:
        raise CheckpointError(
            f"{file}: chat_template must be a text, or a list of named templates with one that "
            "is named default"
        )
    return named


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _read_text(path: Path) -> str:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error}") from None


def _token_text(token: object) -> str | None:
    """A special token as tokenizer_config.json writes it: plain, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _marked(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> Sequence[Mapping[str, Any]]:
    """The messages, with the mark behind the text of the final one."""
    field = "continue_final_message"
    if add_generation_prompt:
        raise RequestError(field, "needs add_generation_prompt to be false")
    if not messages or not isinstance(messages[-1].get("content"), str):
        raise RequestError(field, "the final message has no text to continue")
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + _CUT}]


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
