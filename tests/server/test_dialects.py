"""Answers as models really write them: a row for each form of M3's syntax, broken ones too.

Every row is parsed as one text, character by character, and in random pieces. '~' stands for the
namespace marker.
"""

import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import CallArguments, CallEnd, CallStart, Content, Reasoning
from eaglerun.server.parsers.reasoning import Start

MARKER = "]<]minimax[>["
STRING, INTEGER, BOOLEAN = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
FREE: dict[str, Any] = {"type": "object"}


def members(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


AB = members(a=INTEGER, b=STRING)
TOOLS: dict[str, Any] = {
    "save_file": members(
        filename=STRING,
        content=STRING,
        size=INTEGER,
        tags=array(STRING),
        mode=members(bits=INTEGER),
    ),
    "f": members(
        a=INTEGER,
        s=STRING,
        xs=array(AB),
        ys=array(STRING),
        o=FREE,
        flag=BOOLEAN,
        n={"type": ["number"]},
    ),
    "g": {},
    "nullable": members(note={"type": ["string", "null"]}, xs={"type": ["array", "null"]}),
}
BLOCK = "~<tool_call>\n{}\n~</tool_call>"


def call(tool: str, parameters: str) -> str:
    return BLOCK.format(f'~<invoke name="{tool}">{parameters}~</invoke>')


@dataclass(frozen=True)
class Row:
    """``calls``: (tool, arguments), or the arguments' text where a limit cut the call off."""

    id: str
    text: str
    calls: tuple[tuple[str, Any], ...] = ()
    content: str = ""
    reasoning: str = ""
    start: Start = Start.TURN
    cut: bool = False
    tools: dict[str, Any] | None = field(default_factory=lambda: TOOLS)
    max_calls: int | None = None
    forced: str = ""


def f(id_: str, parameters: str, **arguments: Any) -> Row:
    """A call of f and nothing else."""
    return Row(id_, call("f", parameters), (("f", arguments),))


def saved(id_: str, parameters: str, **arguments: Any) -> Row:
    return Row(id_, call("save_file", parameters), (("save_file", arguments),))


def g(id_: str, parameters: str, **arguments: Any) -> Row:
    return Row(id_, call("g", parameters), (("g", arguments),))


QUOTED = (
    'Example:\n~<tool_call>\n~<invoke name="delete_all">~<x>1~</x>~</invoke>\n~</tool_call>\nend'
)
SELF_QUOTED = (
    'Like ~<tool_call>~<invoke name="save_file">~<content>hi~</content>~</invoke>~</tool_call>.'
)
TWO_UNENDED = (
    '~<tool_call>\n~<invoke name="f">~<s>Paris~</invoke>\n'
    '~<invoke name="f">~<s>Rome~</s>~</invoke>\n~</tool_call>'
)

OPENING_LEFT_OUT = [
    saved(
        "first-opening-left-out",
        "~offerta.docx~</filename>~<content>Hello~</content>",
        filename="offerta.docx",
        content="Hello",
    ),
    saved(
        "first-opening-left-out-with-its-marker",
        "offerta.docx~</filename>~<content>Hello~</content>",
        filename="offerta.docx",
        content="Hello",
    ),
    saved(
        "first-opening-without-its-marker",
        "<filename>offerta.docx~</filename>~<content>Hello~</content>",
        filename="offerta.docx",
        content="Hello",
    ),
    saved(
        "later-opening-left-out",
        "~<filename>a~</filename>~Hello, you~</content>",
        filename="a",
        content="Hello, you",
    ),
    saved("opening-of-a-number-left-out", "~12~</size>", size=12),
    saved("empty-value-without-opening", "~~</filename>~<size>1~</size>", filename="", size=1),
    saved("opening-of-a-nested-member-left-out", "~<mode>~7~</bits>~</mode>", mode={"bits": 7}),
    saved(
        "opening-of-an-item-left-out", "~<tags>~a~</item>~<item>b~</item>~</tags>", tags=["a", "b"]
    ),
    g("opening-left-out-without-a-schema", "~1~</a>~<b>2~</b>", a=1, b=2),
    saved("a-value-like-a-tag-without-opening", "~a>b~</filename>", filename="a>b"),
    saved("closing-tag-of-nothing", "~<filename>a~</filename>\n~</filename>", filename="a"),
]

BRACKETS = [
    Row(
        "invoke-without-its-bracket",
        '~<tool_call>\n~invoke name="f">~<a>1~</a>~</invoke>\n~</tool_call>',
        (("f", {"a": 1}),),
    ),
    Row(
        "block-without-its-bracket",
        '~tool_call>\n~<invoke name="f">~<a>1~</a>~/invoke>\n~/tool_call>',
        (("f", {"a": 1}),),
    ),
    f("parameter-without-its-bracket", "~a>1~</a>~s>x~/s>", a=1, s="x"),
    g("parameter-without-its-bracket-or-schema", "~a>1~</a>", a=1),
    f("a-bracket-in-a-string-is-text", "~<s>~a>1~</s>", s="~a>1"),
    Row(
        "tags-without-their-ends",
        '~<tool_call\n~<invoke name="f"~<a>1~</a>~</invoke\n~</tool_call\n~<x>',
        (("f", {"a": 1}),),
        content="~<x>",
    ),
    f("a-tag-with-attributes", '~<s type="string">x~</s>', s="x"),
    f("parameter-by-name", '~<parameter name="s">x~</parameter>', s="x"),
    f(
        "parameter-by-name-closed-by-it",
        "~<parameter name='s'>x~</s>~<param name=a>1~</param>",
        s="x",
        a=1,
    ),
    f("parameter-by-name-without-its-bracket", '~parameter name="a">1~</parameter>', a=1),
    g("names-with-hyphens", "~<-A>1~</-A>~<x.y>2~</x.y>", **{"-A": 1, "x.y": 2}),
    g("a-tag-that-closes-itself", "~<a/>~<b>1~</b>", a="", b=1),
]

QUOTATIONS = [
    saved("syntax-quoted-in-a-string", f"~<content>{QUOTED}~</content>", content=QUOTED),
    saved(
        "own-call-quoted-in-a-string", f"~<content>{SELF_QUOTED}~</content>", content=SELF_QUOTED
    ),
    saved(
        "own-opening-quoted-in-a-string",
        "~<content>see ~<b> and ~<content> here~</content>",
        content="see ~<b> and ~<content> here",
    ),
    saved(
        "closing-tag-quoted-in-a-string",
        "~<content>ends with ~</invoke>.~</content>",
        content="ends with ~</invoke>.",
    ),
    g("syntax-quoted-without-a-schema", f"~<content>{QUOTED}~</content>", content=QUOTED),
    Row(
        "a-second-call-after-a-quotation",
        BLOCK.format(
            f'~<invoke name="save_file">~<content>{QUOTED}~</content>~</invoke>\n'
            '~<invoke name="f">~<a>1~</a>~</invoke>'
        ),
        (("save_file", {"content": QUOTED}), ("f", {"a": 1})),
    ),
    Row(
        "syntax-quoted-in-an-array",
        call("f", f"~<ys>~<item>{QUOTED}~</item>~</ys>"),
        (("f", {"ys": [QUOTED]}),),
    ),
    Row(
        "unended-string-before-the-end-of-its-call",
        TWO_UNENDED,
        (("f", {"s": "Paris"}), ("f", {"s": "Rome"})),
    ),
    Row(
        "unended-strings-in-all-calls",
        '~<tool_call>~<invoke name="f">~<s>a~</invoke>~<invoke name="f">~<s>b'
        '~<invoke name="f">~<s>c~</tool_call>',
        (("f", {"s": "a"}), ("f", {"s": "b"}), ("f", {"s": "c"})),
    ),
    f("unended-string-before-a-parameter", "~<s>x~<a>1~</a>", s="x", a=1),
    f("string-closed-by-another-name", "~<s>x~</string>~<a>1~</a>", s="x", a=1),
    f("number-without-its-closing-tag", "~<a>1~<s>x~</s>", a=1, s="x"),
    f("number-closed-by-another-name", "~<a>1~</int>~<s>x~</s>", a=1, s="x"),
    Row(
        "unended-number-before-a-call",
        '~<tool_call>~<invoke name="f">~<a>1~<invoke name="f">~<s>x~</s>~</invoke>~</tool_call>',
        (("f", {"a": 1}), ("f", {"s": "x"})),
    ),
    f(
        "unended-string-inside-an-object",
        "~<xs>~<item>~<b>x~</item>~</xs>~<a>1~</a>",
        xs=[{"b": "x"}],
        a=1,
    ),
    f(
        "element-named-like-a-block",
        "~<o>~<tool_call>a~</tool_call>~<x>1~</x>~</o>",
        o={"tool_call": "a", "x": 1},
    ),
    f("element-named-like-a-call", "~<o>~<invoke>a~</invoke>~</o>", o={"invoke": "a"}),
    g("parameter-named-like-a-block", "~<tool_call>~<b>1~</b>~</tool_call>", tool_call={"b": 1}),
    Row(
        "new-block-inside-an-unended-call",
        '~<tool_call>~<invoke name="f">~<a>1~</a>\n'
        '~<tool_call>\n~<invoke name="g">~<b>2~</b>~</invoke>~</tool_call>',
        (("f", {"a": 1}), ("g", {"b": 2})),
    ),
    Row(
        "block-quoted-in-content",
        "The mark ~<tool_call> opens it.",
        content="The mark ~<tool_call> opens it.",
    ),
    Row(
        "block-quoted-at-the-end",
        "It opens with ~<tool_call>",
        content="It opens with ~<tool_call>",
    ),
    Row(
        "closing-tags-quoted-in-content",
        "They end with ~</invoke> and ~</tool_call>",
        content="They end with ~</invoke> and ~</tool_call>",
    ),
    Row(
        "an-empty-block", "Hm.~<tool_call>\n~</tool_call>", content="Hm.~<tool_call>\n~</tool_call>"
    ),
    Row("closing-tags-of-nothing", "~</tool_call>\n~</invoke>Hello.", content="\nHello."),
    Row("closing-tags-twice", call("g", "~<a>1~</a>") + "\n~</tool_call>", (("g", {"a": 1}),)),
    Row("nothing-but-an-opened-block", "~<tool_call>\n"),
    Row("nothing-but-an-empty-block", "~<tool_call>\n~</tool_call>"),
]

VALUES = [
    f(
        "array-of-objects-without-items",
        "~<xs>~<a>1~</a>~<b>p~</b>~</xs>~<xs>~<a>2~</a>~<b>q~</b>~</xs>",
        xs=[{"a": 1, "b": "p"}, {"a": 2, "b": "q"}],
    ),
    f(
        "array-of-objects-in-one-element",
        "~<xs>~<a>1~</a>~<b>p~</b>~<a>2~</a>~<b>q~</b>~</xs>",
        xs=[{"a": 1, "b": "p"}, {"a": 2, "b": "q"}],
    ),
    f("one-object-for-an-array", "~<xs>~<b>p~</b>~</xs>", xs=[{"b": "p"}]),
    f(
        "items-with-and-without-tags",
        "~<xs>~<a>1~</a>~<item>~<a>2~</a>~</item>~<a>3~</a>~</xs>",
        xs=[{"a": 1}, {"a": 2}, {"a": 3}],
    ),
    f(
        "array-of-objects-as-json",
        '~<xs>[{"a": 1}]~</xs>~<xs>{"a": 2}~</xs>',
        xs=[{"a": 1}, {"a": 2}],
    ),
    f("array-of-strings-under-another-name", "~<ys>~<y>a~</y>~<y>b~</y>~</ys>", ys=["a", "b"]),
    g("repeated-element", "~<tag>a~</tag>~<tag>b~</tag>", tag=["a", "b"]),
    g(
        "repeated-element-not-in-a-row",
        "~<tag>a~</tag>~<x>1~</x>~<tag>b~</tag>",
        tag=["a", "b"],
        x=1,
    ),
    f(
        "repeated-element-in-an-object",
        "~<o>~<tag>a~</tag>~<tag>b~</tag>~</o>",
        o={"tag": ["a", "b"]},
    ),
    f("repeated-number", "~<a>1~</a>~<a>2~</a>", a=[1, 2]),
    f("repeated-string", "~<s>x~</s>~<s>y~</s>", s="x\ny"),
    f("repeated-array", "~<ys>a~</ys>~<a>1~</a>~<ys>~<item>b~</item>~</ys>", ys=["a", "b"], a=1),
    Row(
        "repeated-nullable-array",
        call("nullable", "~<xs>~<item>1~</item>~</xs>~<xs>~<item>2~</item>~</xs>"),
        (("nullable", {"xs": [1, 2]}),),
    ),
    Row(
        "one-value-for-a-nullable-array",
        call("nullable", "~<xs>1~</xs>"),
        (("nullable", {"xs": [1]}),),
    ),
    Row(
        "repeated-nullable-string",
        call("nullable", "~<note>null~</note>~<note>x~</note>"),
        (("nullable", {"note": "x"}),),
    ),
    f("integer-with-zeros-before-it", "~<a>018956~</a>", a=18956),
    f("integer-with-a-sign", "~<a>+5~</a>", a=5),
    f("integer-with-zeros-behind-it", "~<a>7.0~</a>", a=7),
    f("zero", "~<a>000~</a>~<n>-0.50~</n>", a=0, n=-0.5),
    f("number-that-json-does-not-have", "~<n>007.5~</n>", n=7.5),
    f("number-that-begins-with-its-point", "~<n>.5~</n>", n=0.5),
    g("zeros-without-a-schema-are-text", "~<zip>018956~</zip>", zip="018956"),
    f("boolean-as-python-writes-it", "~<flag>True~</flag>", flag=True),
]

REASONING = [
    Row("a-block", "<mm:think>hm</mm:think>Hello", reasoning="hm", content="Hello"),
    Row(
        "block-after-white-space", "\n<mm:think>hm</mm:think>Hello", reasoning="hm", content="Hello"
    ),
    Row(
        "marker-quoted-in-content",
        '{"log": "model printed <mm:think> here", "ok": true}',
        content='{"log": "model printed <mm:think> here", "ok": true}',
    ),
    Row(
        "marker-quoted-before-a-call",
        "It printed <mm:think> once." + call("f", "~<a>1~</a>"),
        (("f", {"a": 1}),),
        content="It printed <mm:think> once.",
    ),
    Row(
        "marker-quoted-in-an-argument",
        call("f", "~<s><mm:think>x</mm:think>~</s>"),
        (("f", {"s": "<mm:think>x</mm:think>"}),),
    ),
    Row(
        "marker-quoted-after-the-block",
        "<mm:think>hm</mm:think><mm:think> opens it.",
        reasoning="hm",
        content="<mm:think> opens it.",
    ),
    Row("closing-markers-of-nothing", "</mm:think></mm:think>Hello.", content="Hello."),
    Row("closing-markers-between-white-space", " </mm:think>\n</mm:think>Hello.", content="Hello."),
    Row(
        "closing-marker-before-a-block",
        "</mm:think><mm:think>hm</mm:think>Hi",
        reasoning="hm",
        content="Hi",
    ),
    Row(
        "closing-marker-twice", "<mm:think>hm</mm:think></mm:think>Hi", reasoning="hm", content="Hi"
    ),
    Row(
        "closing-marker-quoted-in-content",
        "It ends with </mm:think>.",
        content="It ends with </mm:think>.",
    ),
    Row(
        "opening-marker-twice",
        "<mm:think><mm:think>hm</mm:think>Hi",
        reasoning="<mm:think>hm",
        content="Hi",
    ),
    Row(
        "in-a-prompt-that-opens",
        "hm</mm:think>Hi",
        reasoning="hm",
        content="Hi",
        start=Start.REASONING,
    ),
    Row(
        "opening-repeated-after-the-prompts",
        "<mm:think>\n<mm:think>hm</mm:think>Hi",
        reasoning="hm",
        content="Hi",
        start=Start.REASONING,
    ),
    Row(
        "in-an-answer-that-goes-on",
        "<mm:think> opens.",
        content="<mm:think> opens.",
        start=Start.CONTENT,
    ),
    Row(
        "call-while-thinking-is-open",
        "<mm:think>I call it." + call("f", "~<a>1~</a>"),
        (("f", {"a": 1}),),
        reasoning="I call it.",
    ),
    Row(
        "calls-while-thinking-is-open",
        "hm" + call("f", "~<a>1~</a>") + "\n" + call("g", "~<b>2~</b>"),
        (("f", {"a": 1}), ("g", {"b": 2})),
        reasoning="hm",
        start=Start.REASONING,
    ),
    Row(
        "call-that-was-only-thought-of",
        "<mm:think>Like " + call("f", "~<a>1~</a>") + "? No.</mm:think>Hello",
        reasoning="Like " + call("f", "~<a>1~</a>") + "? No.",
        content="Hello",
    ),
    Row(
        "call-that-was-thought-of-and-made",
        "<mm:think>Like " + call("f", "~<a>1~</a>") + "</mm:think>" + call("f", "~<a>2~</a>"),
        (("f", {"a": 2}),),
        reasoning="Like " + call("f", "~<a>1~</a>"),
    ),
    Row(
        "call-in-thought-that-goes-on",
        "<mm:think>Like " + call("f", "~<a>1~</a>") + " or so",
        reasoning="Like " + call("f", "~<a>1~</a>") + " or so",
    ),
    Row(
        "a-call-without-tools-is-text",
        "<mm:think>hm</mm:think>" + call("f", ""),
        reasoning="hm",
        content=call("f", ""),
        tools=None,
    ),
]

AROUND = [
    Row(
        "space-of-text-around-a-block",
        "Look: \n" + call("f", "~<a>1~</a>") + "\nDone. ",
        (("f", {"a": 1}),),
        content="Look: \n\nDone. ",
    ),
    Row("space-alone-around-a-block", "\n" + call("f", "~<a>1~</a>") + "\n\n", (("f", {"a": 1}),)),
    Row(
        "space-after-the-thinking",
        "<mm:think>hm</mm:think>\n\nHello",
        reasoning="hm",
        content="\n\nHello",
    ),
    Row("unknown-tool", call("h", "~<a>01~</a>~<b>2~</b>"), (("h", {"a": "01", "b": 2}),)),
    Row(
        "unknown-tool-where-a-call-is-forced",
        'f">~<a>1~</a>~</invoke>~<invoke name="h">~<a>2~</a>~</invoke>'
        '~<invoke name="g">~</invoke>~</tool_call>',
        (("f", {"a": 1}), ("g", {})),
        forced='</mm:think>~<tool_call>\n~<invoke name="',
    ),
    Row("only-one-call-wanted", call("f", "~<a>1~</a>") * 2, (("f", {"a": 1}),), max_calls=1),
    Row("call-outside-a-block", '~<invoke name="f">~<a>1~</a>~</invoke>', (("f", {"a": 1}),)),
    Row("call-without-its-end", '~<tool_call>~<invoke name="f">~<a>1~</a>', (("f", {"a": 1}),)),
]

CALL = call("save_file", "~<size>1~</size>~<filename>ab~</filename>~<tags>~<item>x~</item>~</tags>")
CUT = [
    Row("cut-after-the-marker", "~", cut=True),
    Row("cut-in-the-block", "Hm. ~<tool_ca", content="Hm. ", cut=True),
    Row("cut-after-the-block", "~<tool_call>\n", cut=True),
    Row("cut-in-the-invoke", '~<tool_call>\n~<invoke name="f', cut=True),
    Row("cut-in-the-invoke-without-its-bracket", '~<tool_call>\n~invoke name="f', cut=True),
    Row("cut-after-the-invoke", '~<tool_call>\n~<invoke name="f">', (("f", "{"),), cut=True),
    Row("cut-in-a-parameter", '~<tool_call>\n~<invoke name="f">~<s', (("f", "{"),), cut=True),
    Row(
        "cut-in-a-string",
        '~<tool_call>\n~<invoke name="f">~<s>Par',
        (("f", '{"s":"Par'),),
        cut=True,
    ),
    Row(
        "cut-in-a-closing-tag",
        '~<tool_call>\n~<invoke name="f">~<s>Paris~</',
        (("f", '{"s":"Paris'),),
        cut=True,
    ),
    Row(
        "cut-after-a-string",
        '~<tool_call>\n~<invoke name="f">~<s>x~</s>',
        (("f", '{"s":"x"'),),
        cut=True,
    ),
    Row(
        "cut-in-a-number",
        '~<tool_call>\n~<invoke name="f">~<s>x~</s>~<a>1',
        (("f", '{"s":"x"'),),
        cut=True,
    ),
    Row(
        "cut-after-a-number",
        '~<tool_call>\n~<invoke name="f">~<a>1~</a>~<s',
        (("f", '{"a":1'),),
        cut=True,
    ),
    Row(
        "cut-in-an-array",
        '~<tool_call>\n~<invoke name="f">~<ys>~<item>x',
        (("f", '{"ys":["x'),),
        cut=True,
    ),
    Row(
        "cut-in-an-object",
        '~<tool_call>\n~<invoke name="f">~<a>1~</a>~<o>~<x>2',
        (("f", '{"a":1'),),
        cut=True,
    ),
    Row(
        "cut-in-a-quotation",
        f'~<tool_call>\n~<invoke name="save_file">~<content>{QUOTED}',
        (("save_file", '{"content":"' + QUOTED.replace("\n", "\\n").replace('"', '\\"')),),
        cut=True,
    ),
    Row(
        "cut-after-the-call",
        '~<tool_call>\n~<invoke name="f">~<a>1~</a>~</invoke>',
        (("f", {"a": 1}),),
        cut=True,
    ),
    Row("cut-in-a-thinking-marker", "</mm:thi", cut=True),
    Row("cut-in-thinking", "<mm:think>so</mm:th", reasoning="so", cut=True),
    Row(
        "cut-in-a-call-while-thinking",
        '<mm:think>so~<tool_call>~<invoke name="f">~<a>1',
        reasoning='so~<tool_call>~<invoke name="f">~<a>1',
        cut=True,
    ),
    Row("cut-in-text-like-a-marker", "x = a[1]", content="x = a[1]", cut=True),
    Row("stopped-in-a-tag", "A ~<tool_c", content="A ~<tool_c"),
]

ROWS = [
    *OPENING_LEFT_OUT,
    *BRACKETS,
    *QUOTATIONS,
    *VALUES,
    *REASONING,
    *AROUND,
    *CUT,
]


def parsed(row: Row, pieces: Iterable[str]) -> tuple[str, str, list[tuple[str, Any]]]:
    """Content, reasoning and calls. Content stands where its part says; calls end if complete."""
    parser = OutputParser(
        start=row.start,
        tools=row.tools,
        max_calls=row.max_calls,
        forced=row.forced.replace("~", MARKER),
    )
    text = row.text.replace("~", MARKER)
    parts = [part for piece in pieces for part in parser.feed(piece)]
    content = reasoning = ""
    calls: list[list[Any]] = []
    ended = set()
    for part in parts + parser.finish(row.cut):
        match part:
            case Content(found, at):
                assert found and text[at : at + len(found)] == found
                content += found
            case Reasoning(found):
                assert found
                reasoning += found
            case CallStart(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, json_text):
                calls[index][1] += json_text
            case CallEnd(index):
                ended.add(index)
    # Only the last call can be cut off.
    assert {*range(len(calls) - row.cut)} <= ended
    arguments = [
        (name, json.loads(text) if i in ended else text) for i, (name, text) in enumerate(calls)
    ]
    return content, reasoning, arguments


def marked(value: Any) -> Any:
    """The right values, with the marker for '~'."""
    return json.loads(json.dumps(value).replace("~", MARKER))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_means_what_it_should(row):
    text = row.text.replace("~", MARKER)
    content, reasoning, calls = parsed(row, [text])
    assert content == row.content.replace("~", MARKER)
    assert reasoning == row.reasoning.replace("~", MARKER)
    assert [list(one) for one in calls] == marked(row.calls)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_row_means_the_same_in_pieces(row):
    text = row.text.replace("~", MARKER)
    whole = parsed(row, [text])
    assert parsed(row, text) == whole
    rng = random.Random(row.id)
    for _ in range(20):
        cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(1, 8)))
        ends = [0, *cuts, len(text)]
        pieces = [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]
        assert parsed(row, pieces) == whole


def test_rows_have_names_of_their_own_and_stand_in_the_document():
    document = Path(__file__).parents[2] / "recipes" / "api.md"
    _, _, tables = document.read_text().partition("## M3's syntax")
    rows = [line.rsplit("|", 2)[1] for line in tables.splitlines() if line.startswith("| ")]
    named = re.findall("`(.*?)`", " ".join(rows))
    assert sorted(named) == sorted(row.id for row in ROWS)


@pytest.mark.parametrize("end", range(len(CALL.replace("~", MARKER)) + 1))
def test_a_call_cut_anywhere_shows_no_markup_and_never_looks_complete(end):
    text = CALL.replace("~", MARKER)[:end]
    content, reasoning, calls = parsed(Row("cut", text, cut=True), [text])
    # The marker's first two characters may be any text's.
    assert content == (text if 0 < end < 3 else "") and not reasoning
    for _, arguments in calls:
        if isinstance(arguments, str):
            with pytest.raises(json.JSONDecodeError):
                json.loads(arguments)


def test_unended_strings_are_recovered_in_bounded_time():
    text = "~<tool_call>" + '~<invoke name="f">~<s>a~</invoke>' * 300 + "~</tool_call>"
    _, _, calls = parsed(Row("many", text), [text.replace("~", MARKER)])
    assert calls == [("f", {"s": "a"})] * 300
