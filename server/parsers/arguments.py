"""One tool call's parameters, written as JSON while they arrive.

Elements become members of an object, or items of an array; text becomes what the tool's schema
says it is. Strings are passed on as they come and containers are opened at their first child.
Other values are written once they are complete. A member that may be a list is kept open until a
member of another name follows, because a repeated name adds to it.
"""

import json
import re
from enum import Enum, auto

import orjson

from eaglerun.server.parsers.schema import Schema, json_type

# Elements deeper than this are text.
MAX_DEPTH = 128

_INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0+)?")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_LIST = frozenset({"array"})
_STRING = frozenset({"string"})
_NULLABLE_STRING = frozenset({"string", "null"})


class _Kind(Enum):
    """What an element is. UNDECIDED: its first child, or its end, will tell."""

    UNDECIDED = auto()
    STRING = auto()
    NULLABLE_STRING = auto()
    OBJECT = auto()
    ARRAY = auto()


def _kind(types: frozenset[str]) -> _Kind:
    """What the schema alone decides."""
    kinds = {
        _LIST: _Kind.ARRAY,
        _STRING: _Kind.STRING,
        _NULLABLE_STRING: _Kind.NULLABLE_STRING,
    }
    return kinds.get(types, _Kind.UNDECIDED)


class _Element:
    """An element that is open, or a list that is kept open for repetitions.

    text      text so far that is not written
    count     members or items written
    names     members seen;  last: the name of the last one
    kept      the last member, where its schema wants a list: a repetition continues it
    values    values of the last member, where one is written plain and several as a list
    saved     where output went before this element's was set aside, if it was
    dropped   the output is set aside for good
    """

    def __init__(self, name: str, schema: Schema, parent: "_Element | None") -> None:
        self.name = name
        self.schema = schema
        self.parent = parent
        self.kind = _Kind.UNDECIDED if parent is None else _kind(schema.types)
        self.text: list[str] = []
        self.count = 0
        self.names: set[str] = set()
        self.last = ""
        self.kept: _Element | None = None
        self.values: list[str] = []
        self.saved: list[str] | None = None
        self.dropped = False

    @property
    def is_text(self) -> bool:
        return self.kind in (_Kind.STRING, _Kind.NULLABLE_STRING)

    def take_text(self) -> str:
        text = "".join(self.text)
        self.text.clear()
        return text


class Arguments:
    """The JSON object of one call. ``take`` returns what was written since the last time.

    A name that comes again after its value is written for good is dropped. Text between members
    is kept under "$text" (with more "$" if that is taken).
    """

    def __init__(self, schema: Schema) -> None:
        self._stack = [_Element("", schema, None)]
        self._out: list[str] = []

    def take(self) -> str:
        """What is final: the output of the outermost element, not what is set aside."""
        out = next((e.saved for e in self._stack if e.saved is not None), self._out)
        text = "".join(out)
        out.clear()
        return text

    def is_open(self, name: str) -> bool:
        return any(element.name == name for element in self._stack[1:])

    def expects(self, name: str) -> bool:
        """Whether the schema has a member of this name where the parser stands."""
        return self._stack[-1].schema.has_member(name)

    def text(self, text: str) -> None:
        top = self._stack[-1]
        if top.kind is _Kind.NULLABLE_STRING:
            text = top.take_text() + text
            if not "null".startswith(text):
                top.kind = _Kind.STRING
                self._begin(top, '"')
        if top.kind is _Kind.STRING:
            self._out.append(_escaped(text))
        else:
            top.text.append(text)

    def open(self, name: str) -> None:
        top = self._stack[-1]
        if top.is_text or len(self._stack) > MAX_DEPTH:
            self.text(f"<{name}>")
            return
        if top.kind is _Kind.UNDECIDED:
            self._decide(top, name)
        if top.kind is _Kind.OBJECT:
            element = self._member(top, name)
        else:
            self._add_text_items(top)
            element = _Element(name, top.schema.items(), top)
        self._stack.append(element)
        if element is top.kept and element.name in top.names:
            return
        top.names.add(name)
        if element.kind is _Kind.STRING:
            self._begin(element, '"')
        elif element.kind is _Kind.ARRAY:
            self._begin(element, "[")

    def close(self, name: str) -> None:
        """Close the innermost element of this name and all within; text if there is none."""
        if self.is_open(name):
            while self._close_top(complete=True) != name:
                pass
        elif self._stack[-1].is_text:
            self.text(f"</{name}>")

    def finish(self, complete: bool) -> None:
        """Close everything. ``complete`` false: the text broke off, and what it broke off in is
        dropped, except a string, which ends where it stands."""
        while self._stack:
            self._close_top(complete)

    def _decide(self, element: _Element, child: str) -> None:
        """An element's first child says whether it is an object or an array."""
        array = "array" in element.schema.types
        if array == ("object" in element.schema.types):
            array = child == "item" and not element.schema.has_member("item")
        if array and element.parent is not None:
            element.kind = _Kind.ARRAY
            self._begin(element, "[")
        else:
            element.kind = _Kind.OBJECT
            self._begin(element, "{")

    def _member(self, parent: _Element, name: str) -> _Element:
        """A child of an object: a new one, a repetition, or one to be dropped."""
        repeated = name == parent.last
        if repeated and parent.kept is not None:
            return parent.kept
        repeated = repeated and bool(parent.values)
        if not repeated:
            self._end_member(parent)
        element = _Element(name, parent.schema.member(name), parent)
        types = element.schema.types
        if name in parent.names and not repeated:
            element.dropped = True
        else:
            parent.last = name
        if element.dropped or not types or ("array" in types and types != _LIST):
            element.saved, self._out = self._out, []
        elif types == _LIST:
            parent.kept = element
        return element

    def _end_member(self, parent: _Element) -> None:
        """The last member will have no further repetition: write what it is still owed."""
        kept, values = parent.kept, parent.values
        parent.kept, parent.values = None, []
        if kept is not None:
            self._out.append("]")
        elif values:
            value = values[0] if len(values) == 1 else f"[{','.join(values)}]"
            self._add_member(parent, parent.last, value)

    def _close_top(self, complete: bool) -> str:
        """Close the innermost element and return its name."""
        element = self._stack[-1]
        if not complete and not element.is_text:
            element.text.clear()
        parent = element.parent
        if element.kind is _Kind.STRING:
            self._out.append('"')
        elif element.kind is _Kind.OBJECT:
            self._end_member(element)
            self._add_mixed_text(element)
            self._out.append("}")
        elif element.kind is _Kind.ARRAY:
            self._add_text_items(element)
            if parent is None or parent.kept is not element:
                self._out.append("]")
        elif parent is None:
            self._out.append(_root_object(element.take_text()))
        elif complete:
            self._begin(element, to_json(element.take_text(), element.schema.types))
        self._stack.pop()
        if element.saved is not None:
            value, self._out = "".join(self._out), element.saved
            if parent is not None and value and not element.dropped:
                parent.values.append(value)
        return element.name

    def _begin(self, element: _Element, value: str) -> None:
        """Write the beginning of an element's value, or all of it, at its place."""
        parent = element.parent
        if parent is None or element.saved is not None:
            self._out.append(value)
        elif parent.kind is _Kind.OBJECT:
            self._add_member(parent, element.name, value)
        else:
            self._add_item(parent, value)

    def _add_member(self, parent: _Element, name: str, value: str) -> None:
        self._out.append(f"{',' if parent.count else ''}{_quoted(name)}:{value}")
        parent.count += 1

    def _add_item(self, array: _Element, value: str) -> None:
        self._out.append(f"{',' if array.count else ''}{value}")
        array.count += 1

    def _add_mixed_text(self, element: _Element) -> None:
        text = element.take_text().strip()
        name = "$text"
        while name in element.names:
            name = "$" + name
        if text:
            self._add_member(element, name, _quoted(text))

    def _add_text_items(self, array: _Element) -> None:
        """Text between an array's items is an item, or several if it is a JSON array itself."""
        text = array.take_text()
        stripped = text.strip()
        types = array.schema.items().types
        if _literal_type(stripped) == "array" and "array" not in types:
            stripped = text = stripped[1:-1].strip()
            if stripped:
                self._add_item(array, text)
        elif stripped:
            self._add_item(array, to_json(text, types))


def to_json(text: str, types: frozenset[str]) -> str:
    """A value's text as JSON of one of ``types`` (of any if empty), or as a string."""
    stripped = text.strip()
    if not types:
        return stripped if _literal_type(stripped) not in (None, "string") else _quoted(text)
    if "null" in types and (stripped == "null" or not (stripped or "string" in types)):
        return "null"
    if "boolean" in types and stripped.lower() in ("true", "false"):
        return stripped.lower()
    integer = _INTEGER.fullmatch(stripped) if "integer" in types else None
    if integer is not None:
        return integer[1]
    if "number" in types and _NUMBER.fullmatch(stripped):
        return stripped
    containers = types & {"array", "object"}
    if containers and _literal_type(stripped) in containers:
        return stripped
    if containers and not (stripped or "string" in types):
        return "[]" if "array" in containers else "{}"
    return _quoted(text)


def _literal_type(text: str) -> str | None:
    """The type of a JSON text; None if it is none."""
    try:
        return json_type(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def _root_object(text: str) -> str:
    """The arguments of a call without elements: its text may be the object itself."""
    stripped = text.strip()
    if not stripped or _literal_type(stripped) == "object":
        return stripped or "{}"
    return "{" + f'"$text":{_quoted(stripped)}' + "}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return _quoted(text)[1:-1]
