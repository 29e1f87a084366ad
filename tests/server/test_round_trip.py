"""Arguments written as M3's template writes them are read back, whatever they quote."""

import json
import os
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import CallArguments, CallStart, Content, Reasoning

NS = "]<]minimax[>["
SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))

NAMES = ("a", "b", "content", "x-y", "tool_call", "invoke", "item2")
QUOTED = (
    *(f"{NS}<tool_call>", f"{NS}</tool_call>", f'{NS}<invoke name="f">', f"{NS}</invoke>"),
    *(f"{NS}<z>", f"{NS}</z>", NS, "<mm:think>", "</mm:think>", "null", "1", "é", '"', "\\", "\n"),
)
TEXT = st.lists(st.one_of(st.sampled_from(QUOTED), st.text(max_size=4)), max_size=6).map("".join)

# Pairs of a schema and a value of it.
LEAVES = st.one_of(
    TEXT.map(lambda value: ({"type": "string"}, value)),
    st.integers().map(lambda value: ({"type": "integer"}, value)),
    st.booleans().map(lambda value: ({"type": "boolean"}, value)),
    st.floats(allow_nan=False, allow_infinity=False).map(lambda v: ({"type": "number"}, v)),
    st.none().map(lambda value: ({"type": ["string", "null"]}, value)),
)
Pair = tuple[dict[str, Any], Any]


def arrays(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    return pairs.map(lambda pair: ({"type": "array", "items": pair[0]}, [pair[1]] * 2))


def objects(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    return st.dictionaries(st.sampled_from(NAMES), pairs, max_size=4).map(
        lambda members: (
            {"type": "object", "properties": {name: pair[0] for name, pair in members.items()}},
            {name: pair[1] for name, pair in members.items()},
        )
    )


PAIRS = st.recursive(LEAVES, lambda pairs: st.one_of(arrays(pairs), objects(pairs)), max_leaves=8)


def written(value: Any) -> str:
    """A value as the template writes it."""
    if isinstance(value, dict):
        return "".join(f"{NS}<{k}>{written(v)}{NS}</{k}>" for k, v in value.items())
    if isinstance(value, list):
        return "".join(f"{NS}<item>{written(v)}{NS}</item>" for v in value)
    return value if isinstance(value, str) else json.dumps(value)


def is_clear(value: Any, name: str = "") -> bool:
    """True if no string holds tags of its own name, which no reader could tell from its end."""
    if isinstance(value, dict):
        return all(is_clear(member, key) for key, member in value.items())
    if isinstance(value, list):
        return all(is_clear(item, "item") for item in value)
    return not isinstance(value, str) or f"{name}>" not in value


def read(pieces: list[str], schema: Any) -> list[Any]:
    parser = OutputParser(tools={"f": schema, "g": {}})
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    texts: list[str] = []
    for part in parts:
        assert not isinstance(part, Content | Reasoning), part
        if isinstance(part, CallStart):
            texts.append("")
        elif isinstance(part, CallArguments):
            texts[part.call] += part.json
    return [json.loads(text) for text in texts]


@settings(max_examples=300 * SCALE, deadline=None)
@given(objects(PAIRS), st.lists(st.integers(1, 40), max_size=6), st.booleans())
def test_arguments_come_back(pair, lengths, two):
    schema, arguments = pair
    assume(is_clear(arguments))
    call = f'{NS}<invoke name="f">{written(arguments)}{NS}</invoke>\n'
    text = f"{NS}<tool_call>\n{call * (1 + two)}{NS}</tool_call>"
    pieces, rest = [], text
    for length in lengths:
        pieces.append(rest[:length])
        rest = rest[length:]
    assert read([*pieces, rest], schema) == [arguments] * (1 + two)
