"""One tool call's parameters, written as JSON while they arrive.

Elements become members of an object, or items of an array; text becomes what the tool's schema
says it is. A string and a list are written as they come, and stay open for a repetition: a name
that follows itself adds a line or items. Every other member, and all within it, is set aside until
its object ends, because a name that comes again makes it a list.
"""

from enum import Enum, auto

from eaglerun.server.parsers.schema import Schema
from eaglerun.server.parsers.values import escaped, literal_type, quoted, to_json

# Elements deeper than this are text.
MAX_DEPTH = 128

ITEM = "item"
_LIST = frozenset({"array"})
_STRING = frozenset({"string"})
_NULLABLE_STRING = frozenset({"string", "null"})
_CONTAINERS = frozenset({"array", "object"})


class _Kind(Enum):
    """What an element is. UNDECIDED: its first child, or its end, will tell."""

    UNDECIDED = auto()
    STRING = auto()
    NULLABLE_STRING = auto()
    OBJECT = auto()
    ARRAY = auto()


class Place(Enum):
    """The kinds of place in a call, by what may stand there.

    CALL    parameters, directly in the call
    STRING  text, up to the closing tag
    SCALAR  a number, a boolean or null: no tag but the closing one
    MEMBER  members or items, of an element whose schema says so
    FREE    anything, for the schema does not say
    """

    CALL = auto()
    STRING = auto()
    SCALAR = auto()
    MEMBER = auto()
    FREE = auto()


def _kind(types: frozenset[str]) -> _Kind:
    """What the schema alone decides."""
    kinds = {
        _LIST: _Kind.ARRAY,
        _STRING: _Kind.STRING,
        _NULLABLE_STRING: _Kind.NULLABLE_STRING,
    }
    return kinds.get(types, _Kind.UNDECIDED)


class _Element:
    """An element that is open, or a member that is kept open for repetitions.

    keyword   the word of <parameter name="...">, which may close it too
    text      text so far that is not written;  fresh: where that of after the last child begins
    stray     a marker without a tag stands where the fresh text begins
    count     members or items written
    names     members written, for good or up to now
    kept      the member, a string or a list, that a repetition continues
    aside     values of the members that are set aside, by name
    saved     where output went before this element's was set aside, if it was
    dropped   the output is set aside for good
    implied   an array's item that has no tags of its own
    """

    def __init__(
        self, name: str, keyword: str | None, schema: Schema, parent: "_Element | None"
    ) -> None:
        self.name = name
        self.keyword = keyword
        self.schema = schema
        self.parent = parent
        self.kind = _Kind.UNDECIDED if parent is None else _kind(schema.types)
        self.text: list[str] = []
        self.fresh = 0
        self.stray = False
        self.count = 0
        self.names: set[str] = set()
        self.kept: _Element | None = None
        self.aside: dict[str, list[str]] = {}
        self.saved: list[str] | None = None
        self.dropped = False
        self.implied = False

    @property
    def place(self) -> Place:
        if self.parent is None:
            return Place.CALL
        types = self.schema.types
        if self.kind in (_Kind.STRING, _Kind.NULLABLE_STRING):
            return Place.STRING
        if types and not types & _CONTAINERS:
            return Place.STRING if "string" in types else Place.SCALAR
        return Place.MEMBER if types and "string" not in types else Place.FREE

    def take_text(self) -> str:
        text = "".join(self.text)
        self.text.clear()
        self.fresh = 0
        return text

    def take_fresh(self) -> str:
        """The text since the last child."""
        text = "".join(self.text[self.fresh :])
        del self.text[self.fresh :]
        return text

    def end_child(self) -> None:
        self.fresh = len(self.text)
        self.stray = False


class Arguments:
    """The JSON object of one call. ``take`` returns what was written since the last time.

    A string or list that comes again after another one has been written is dropped. Text between
    members is kept under "$text" (with more "$" if that is taken).
    """

    def __init__(self, schema: Schema) -> None:
        self._stack = [_Element("", None, schema, None)]
        self._out: list[str] = []

    def take(self) -> str:
        """What is final: the output of the outermost element, not what is set aside."""
        out = next((e.saved for e in self._stack if e.saved is not None), self._out)
        text = "".join(out)
        out.clear()
        return text

    @property
    def place(self) -> Place:
        return self._stack[-1].place

    def closes(self, name: str) -> bool:
        """True if this name closes the innermost element that has tags."""
        top = next(element for element in reversed(self._stack) if not element.implied)
        return top.parent is not None and name in (top.name, top.keyword)

    def is_open(self, name: str) -> bool:
        return any(name in (e.name, e.keyword) and not e.implied for e in self._stack[1:])

    def expects(self, name: str) -> bool:
        """Whether the schema has a member of this name where the parser stands."""
        schema = self._stack[-1].schema
        return schema.has_member(name) or schema.items().has_member(name)

    def allows(self, name: str) -> bool:
        """True if there may be a member of this name: there is, or the schema names none."""
        return self.expects(name) or not self._stack[-1].schema.has_members

    def text(self, text: str) -> None:
        top = self._stack[-1]
        if top.kind is _Kind.NULLABLE_STRING:
            text = top.take_text() + text
            if not "null".startswith(text):
                top.kind = _Kind.STRING
                self._begin(top, '"')
        if top.kind is _Kind.STRING:
            self._out.append(escaped(text))
        else:
            top.text.append(text)

    def stray(self) -> None:
        """A marker without a tag: what follows may be a value without its opening tag."""
        top = self._stack[-1]
        top.fresh = len(top.text)
        top.stray = True

    def open(self, name: str, keyword: str | None = None) -> None:
        if len(self._stack) > MAX_DEPTH:
            self.text(f"<{name}>")
            return
        top = self._stack[-1]
        if top.kind is _Kind.UNDECIDED:
            self._decide(top, name)
        top = self._implied_item(top, name)
        if top.kind is _Kind.OBJECT:
            element = self._member(top, name, keyword)
        else:
            self._add_text_items(top)
            element = _Element(name, keyword, top.schema.items(), top)
        self._push(element)

    def close(self, name: str) -> None:
        """Close the innermost element of this name and all within."""
        closed = False
        while not closed:
            element = self._stack[-1]
            closed = name in (element.name, element.keyword) and not element.implied
            self._close_top(complete=True)

    def close_top(self) -> None:
        """Close the innermost element, whatever closes it."""
        self._close_top(complete=True)

    def close_unopened(self, name: str) -> None:
        """A closing tag of nothing: its opening tag was left out, and the text before is its value.

        Without such text, or in an element that holds only text, it closes the element.
        """
        top = self._stack[-1]
        names_member = name == ITEM or self.expects(name)
        if top.parent is not None and top.kind is _Kind.UNDECIDED and not names_member:
            self.close_top()
            return
        stray = top.stray
        text = top.take_fresh()
        top.stray = False
        value = text if stray else text.lstrip().removeprefix(f"<{name}>")
        if not (stray or value.strip()):
            return
        self.open(name)
        self.text(value)
        self.close(name)

    def finish(self, complete: bool) -> None:
        """Close everything. ``complete`` false: the text broke off, and what it broke off in is
        dropped, except a string, which ends where it stands."""
        while self._stack:
            self._close_top(complete)

    def break_off(self) -> None:
        """End without closing anything: a limit cut the call off, and it must not look complete.

        Members that are complete are written, unless the text broke off inside a string or list.
        """
        root = self._stack[0]
        if root.kind is _Kind.UNDECIDED:
            self._begin(root, "{")
            root.kind = _Kind.OBJECT
        for element in reversed(self._stack):
            if element.saved is not None:
                self._out = element.saved
        inside = next((e for e in self._stack[1:2] if e.saved is None), None)
        if inside is not None and inside.kind is _Kind.NULLABLE_STRING:
            root.kept = inside = None
        if inside is None:
            self._end_kept(root)
            self._add_aside(root)
        self._stack.clear()

    def _push(self, element: _Element) -> None:
        """Make an element the innermost one, and write its beginning if its kind is known."""
        parent = element.parent
        assert parent is not None
        again = element is parent.kept and element.name in parent.names
        self._stack.append(element)
        parent.names.add(element.name)
        if again:
            if element.kind is not _Kind.ARRAY:
                self._begin_again(element)
        elif element.kind is _Kind.STRING:
            self._begin(element, '"')
        elif element.kind is _Kind.ARRAY:
            self._begin(element, "[")

    def _begin_again(self, element: _Element) -> None:
        """A string that comes again adds a line; one that was null so far begins."""
        if element.kind is _Kind.NULLABLE_STRING:
            text = element.take_text()
            if text == "null":
                return
            element.kind = _Kind.STRING
            self._begin(element, '"')
            self._out.append(escaped(text))
        self._out.append(escaped("\n"))

    def _decide(self, element: _Element, child: str) -> None:
        """An element's first child says whether it is an object or an array."""
        array = "array" in element.schema.types
        if array == ("object" in element.schema.types):
            array = child == ITEM and not element.schema.has_member(ITEM)
        if array and element.parent is not None:
            element.kind = _Kind.ARRAY
            self._begin(element, "[")
        else:
            element.kind = _Kind.OBJECT
            self._begin(element, "{")

    def _implied_item(self, top: _Element, child: str) -> _Element:
        """The element that a child belongs to, where an array of objects lacks its item tags.

        An item without tags ends at an item with tags, and where a member comes a second time.
        """
        if top.implied:
            again = child in top.names and top.schema.member(child).types != _LIST
            if child == ITEM or again:
                self.close_top()
                top = self._stack[-1]
        if top.kind is _Kind.ARRAY and child != ITEM and "object" in top.schema.items().types:
            self._add_text_items(top)
            element = _Element(ITEM, None, top.schema.items(), top)
            element.kind = _Kind.OBJECT
            element.implied = True
            self._stack.append(element)
            self._begin(element, "{")
            top = element
        return top

    def _member(self, parent: _Element, name: str, keyword: str | None) -> _Element:
        """A child of an object: a new one, a repetition, or one to be dropped."""
        kept = parent.kept
        if kept is not None and kept.name == name:
            kept.keyword = keyword
            return kept
        element = _Element(name, keyword, parent.schema.member(name), parent)
        is_aside = any(e.saved is not None for e in self._stack)
        written = element.kind is not _Kind.UNDECIDED and not is_aside
        element.dropped = written and name in parent.names
        if written and not element.dropped:
            self._end_kept(parent)
            parent.kept = element
        else:
            element.saved, self._out = self._out, []
        return element

    def _end_kept(self, parent: _Element) -> None:
        """The string or list that was written last will have no further repetition."""
        kept, parent.kept = parent.kept, None
        if kept is None:
            return
        if kept.kind is _Kind.STRING:
            self._out.append('"')
        elif kept.kind is _Kind.ARRAY:
            self._out.append("]")
        else:
            self._begin(kept, to_json(kept.take_text(), kept.schema))

    def _add_aside(self, parent: _Element) -> None:
        """Write the members that were set aside; several values of one are a list."""
        for name, values in parent.aside.items():
            value = values[0]
            if len(values) > 1:
                types = parent.schema.member(name).types
                # Lists of one name are one list, where the schema has lists.
                flat = [v[1:-1] if "array" in types and v.startswith("[") else v for v in values]
                value = f"[{','.join(v for v in flat if v)}]"
            self._add_member(parent, name, value)
        parent.aside.clear()

    def _close_top(self, complete: bool) -> None:
        """Close the innermost element."""
        element = self._stack[-1]
        parent = element.parent
        if not complete and element.place is not Place.STRING:
            element.text.clear()
        is_kept = parent is not None and parent.kept is element
        if element.kind is _Kind.OBJECT:
            self._end_kept(element)
            self._add_aside(element)
            self._add_mixed_text(element)
            self._out.append("}")
        elif element.kind is _Kind.ARRAY:
            self._add_text_items(element)
            if not is_kept:
                self._out.append("]")
        elif element.kind is _Kind.STRING:
            if not is_kept:
                self._out.append('"')
        elif parent is None:
            self._out.append(_root_object(element.take_text()))
        elif complete and not is_kept:
            self._begin(element, to_json(element.take_text(), element.schema))
        elif is_kept and not complete:
            parent.kept = None
        self._stack.pop()
        if element.saved is not None:
            value, self._out = "".join(self._out), element.saved
            if parent is not None and value and not element.dropped:
                parent.aside.setdefault(element.name, []).append(value)
        if parent is not None:
            parent.end_child()

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
        self._out.append(f"{',' if parent.count else ''}{quoted(name)}:{value}")
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
            self._add_member(element, name, quoted(text))

    def _add_text_items(self, array: _Element) -> None:
        """Text between an array's items is an item, or several if it is a JSON array itself."""
        text = array.take_text()
        stripped = text.strip()
        items = array.schema.items()
        if literal_type(stripped) == "array" and "array" not in items.types:
            stripped = text = stripped[1:-1].strip()
            if stripped:
                self._add_item(array, text)
        elif stripped:
            self._add_item(array, to_json(text, items))


def _root_object(text: str) -> str:
    """The arguments of a call without elements: its text may be the object itself."""
    stripped = text.strip()
    if not stripped or literal_type(stripped) == "object":
        return stripped or "{}"
    return "{" + f'"$text":{quoted(stripped)}' + "}"
