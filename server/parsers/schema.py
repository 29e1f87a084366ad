"""The little that a parser must know of a tool's JSON Schema: types, members, items.

Local references and anyOf / oneOf / allOf are followed; a schema that says nothing about a value
allows every type.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

JsonSchema = Mapping[str, Any]

# Alternatives and references looked at for one value; a schema of more says nothing further.
MAX_ALTERNATIVES = 256

_BRANCHES = ("anyOf", "oneOf", "allOf")


class Schema:
    """What is allowed at one place. ``types`` is empty where anything is."""

    def __init__(self, nodes: tuple[Any, ...], root: JsonSchema) -> None:
        self._nodes = nodes
        self._root = root

    @classmethod
    def of(cls, schema: JsonSchema) -> "Schema":
        return cls((schema,), schema)

    @cached_property
    def _alternatives(self) -> tuple[JsonSchema, ...]:
        return tuple(self._expand())

    @cached_property
    def types(self) -> frozenset[str]:
        return frozenset(name for node in self._alternatives for name in _types(node))

    @cached_property
    def has_members(self) -> bool:
        """True if members are named at all."""
        return any(_mapping(node, "properties") for node in self._alternatives)

    def has_member(self, name: str) -> bool:
        return any(name in _mapping(node, "properties") for node in self._alternatives)

    def member(self, name: str) -> "Schema":
        found = [
            _mapping(node, "properties").get(name, node.get("additionalProperties"))
            for node in self._alternatives
        ]
        return Schema(tuple(found), self._root)

    def items(self) -> "Schema":
        return Schema(tuple(node.get("items") for node in self._alternatives), self._root)

    def _expand(self) -> Iterator[JsonSchema]:
        """Every alternative of the nodes, references resolved, each at most once."""
        pending = list(self._nodes)
        seen: set[int] = set()
        while pending and len(seen) < MAX_ALTERNATIVES:
            node = pending.pop(0)
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            yield node
            if isinstance(node.get("$ref"), str):
                pending.append(self._resolve(node["$ref"]))
            for branch in _BRANCHES:
                if isinstance(node.get(branch), list):
                    pending.extend(node[branch])

    def _resolve(self, reference: str) -> Any:
        """The target of a local reference; None for any other."""
        if not reference.startswith("#"):
            return None
        node: Any = self._root
        for key in reference[1:].split("/")[1:]:
            if not isinstance(node, Mapping):
                return None
            node = node.get(key.replace("~1", "/").replace("~0", "~"))
        return node


def _types(node: JsonSchema) -> Iterator[str]:
    stated = node.get("type")
    if isinstance(stated, str):
        yield stated
    elif isinstance(stated, list):
        yield from (name for name in stated if isinstance(name, str))
    elif "const" in node:
        yield json_type(node["const"])
    elif isinstance(node.get("enum"), list):
        yield from (json_type(value) for value in node["enum"])
    elif "properties" in node:
        yield "object"
    elif "items" in node:
        yield "array"


def json_type(value: object) -> str:
    """JSON Schema's name of a parsed value's type."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object"


def _mapping(node: JsonSchema, key: str) -> Mapping[str, Any]:
    value = node.get(key)
    return value if isinstance(value, Mapping) else {}
