"""The text of one parameter, or of an item, as JSON of the type that the schema wants."""

import json
import re

import orjson

from eaglerun.server.parsers.schema import Schema, json_type

_INTEGER = re.compile(r"([+-]?)([0-9]+)(?:\.0+)?")
_NUMBER = re.compile(r"([+-]?)([0-9]*)(\.[0-9]*)?([eE][+-]?[0-9]+)?")


def to_json(text: str, schema: Schema) -> str:
    """A value's text as JSON of one of the schema's types (of any if it names none).

    What fits no type becomes the one item of an array where an array is allowed, else a string.
    """
    types = schema.types
    stripped = text.strip()
    if not types:
        return stripped if literal_type(stripped) not in (None, "string") else quoted(text)
    found = _fitting(stripped, types)
    if found is not None:
        return found
    if "array" in types and "string" not in types:
        return f"[{to_json(text, schema.items())}]"
    return quoted(text)


def _fitting(stripped: str, types: frozenset[str]) -> str | None:
    """The text as JSON of a type that is no string; None where it is none of them."""
    if "null" in types and (stripped == "null" or not (stripped or "string" in types)):
        return "null"
    if "boolean" in types and stripped.lower() in ("true", "false"):
        return stripped.lower()
    number = _number(stripped, types)
    if number is not None:
        return number
    containers = types & {"array", "object"}
    if containers and literal_type(stripped) in containers:
        return stripped
    if containers and not (stripped or "string" in types):
        return "[]" if "array" in containers else "{}"
    return None


def _number(text: str, types: frozenset[str]) -> str | None:
    """An integer or a number without the signs and zeros that JSON does not have."""
    integer = _INTEGER.fullmatch(text) if "integer" in types else None
    if integer is not None:
        return integer[1].replace("+", "") + _without_zeros(integer[2])
    found = _NUMBER.fullmatch(text) if "number" in types else None
    if found is None:
        return None
    sign, whole, fraction, exponent = (group or "" for group in found.groups())
    if not (whole or fraction[1:]):
        return None
    fraction = fraction if fraction[1:] else ""
    return sign.replace("+", "") + _without_zeros(whole) + fraction + exponent


def _without_zeros(digits: str) -> str:
    return digits.lstrip("0") or "0"


def literal_type(text: str) -> str | None:
    """The type of a JSON text; None if it is none."""
    try:
        return json_type(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def escaped(text: str) -> str:
    """Text as it stands inside a JSON string."""
    return quoted(text)[1:-1]
