"""Reasoning and tool parsers: what the syntax means, and that chunks do not matter."""

import json
import os
import re
from collections.abc import Iterable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import (
    CallArguments,
    CallEnd,
    CallStart,
    Content,
    Part,
    Reasoning,
)
from eaglerun.server.parsers.reasoning import Start
from eaglerun.server.parsers.schema import Schema

NS = "]<]minimax[>["
SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "array", "items": {"type": "integer"}},
        "metric": {"type": "boolean"},
        "limit": {"type": ["integer", "null"]},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "place": {"$ref": "#/$defs/Place"},
        "ratio": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "either": {"oneOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "object"}]},
    },
    "$defs": {
        "Place": {
            "type": "object",
            "properties": {
                "lat": {"type": "number"},
                "name": {"type": "string"},
                "inside": {"$ref": "#/$defs/Place"},
            },
        }
    },
}
TOOLS = {"get_weather": WEATHER, "echo": {}}


class Answer:
    """Parts put together again, with the rules that any sequence of parts must follow."""

    def __init__(self, parts: Iterable[Part]) -> None:
        self.reasoning = self.content = ""
        self.calls: list[tuple[str, str]] = []
        open_call = None
        for part in parts:
            match part:
                case Reasoning(text):
                    assert text
                    self.reasoning += text
                case Content(text):
                    assert text
                    self.content += text
                case CallStart(index, name):
                    assert open_call is None and index == len(self.calls)
                    open_call = index
                    self.calls.append((name, ""))
                case CallArguments(index, text):
                    assert index == open_call and text
                    self.calls[index] = (self.calls[index][0], self.calls[index][1] + text)
                case CallEnd(index):
                    assert index == open_call
                    open_call = None
        # A call that a limit cut off has no end.
        self.open_call = open_call

    @property
    def parsed(self) -> list[tuple[str, object]]:
        return [(name, json.loads(text)) for name, text in self.calls]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Answer) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"Answer({vars(self)})"


def read(chunks: Iterable[str], cut: bool = False, **options: Any) -> Answer:
    parser = OutputParser(**({"tools": TOOLS} | options))
    parts = [part for chunk in chunks for part in parser.feed(chunk)]
    answer = Answer(parts + parser.finish(cut))
    assert cut or answer.open_call is None
    return answer


def tag(text: str) -> str:
    """Readable tool syntax: '~' stands for the namespace marker."""
    return text.replace("~", NS)


def call(text: str, name: str = "get_weather") -> object:
    """The arguments of one call whose parameters are ``text``."""
    answer = read([tag(f'~<tool_call>\n~<invoke name="{name}">{text}~</invoke>\n~</tool_call>')])
    assert answer.content == ""
    [(found, arguments)] = answer.parsed
    assert found == name
    return arguments


# Reasoning


def test_a_block_is_reasoning_and_the_rest_content():
    answer = read(["<mm:think>need weather</mm:think>Checking."], tools=None)
    assert (answer.reasoning, answer.content) == ("need weather", "Checking.")


def test_a_block_after_other_text_is_content():
    text = "Hm. <mm:think>so</mm:think> Yes."
    answer = read([text], tools=None)
    assert (answer.reasoning, answer.content) == ("", text)


def test_a_prompt_that_opens_the_block_starts_in_reasoning():
    answer = read(["simple sum</mm:think>4"], start=Start.REASONING)
    assert (answer.reasoning, answer.content) == ("simple sum", "4")


def test_an_opening_marker_said_twice_is_dropped():
    answer = read(["\n<mm:think>a</mm:think>b"], start=Start.REASONING)
    assert (answer.reasoning, answer.content) == ("a", "b")


def test_a_stray_closing_marker_at_the_start_is_dropped():
    assert read(["</mm:think>4"]).content == "4"
    assert read([" \n</mm:think>4"]).content == "4"
    assert read(["4</mm:think>"]).content == "4</mm:think>"


def test_never_closed_is_all_reasoning():
    answer = read(["<mm:think>on and on ", tag("~<tool_call>"), "</mm:thi"])
    assert answer.reasoning == "on and on " + tag("~<tool_call>") + "</mm:thi"
    assert answer.content == "" and answer.calls == []


def test_only_the_first_block_counts():
    text = "<mm:think>a</mm:think>b<mm:think>c</mm:think>"
    assert read([text]).content == "b<mm:think>c</mm:think>"


# Tool calls: values


def test_the_worked_example():
    text = "<mm:think>need weather</mm:think>Checking.~<tool_call>\n"
    text += '~<invoke name="get_weather">~<city>Paris~</city>~</invoke>\n~</tool_call>'
    answer = read([tag(text)])
    assert (answer.reasoning, answer.content) == ("need weather", "Checking.")
    assert answer.calls == [("get_weather", '{"city":"Paris"}')]


def test_scalars_take_the_type_of_the_schema():
    text = "~<city>12~</city>~<metric>True~</metric>~<ratio> 1.50 ~</ratio>~<limit>7.0~</limit>"
    assert call(text) == {"city": "12", "metric": True, "ratio": 1.5, "limit": 7}


def test_what_does_not_fit_its_type_stays_text():
    assert call("~<metric>maybe~</metric>~<limit>many~</limit>") == {
        "metric": "maybe",
        "limit": "many",
    }


def test_null_is_null_where_the_schema_allows_it():
    assert call("~<note>null~</note>~<limit>null~</limit>") == {"note": None, "limit": None}
    assert call("~<note>nullable~</note>~<city>null~</city>") == {
        "note": "nullable",
        "city": "null",
    }
    assert call("~<note>nu~</note>~<limit>~</limit>") == {"note": "nu", "limit": None}


def test_arrays():
    items = "~<days>~<item>1~</item>~<item>2~</item>~</days>"
    assert call(items) == {"days": [1, 2]}
    assert call("~<days>[1, 2]~</days>") == {"days": [1, 2]}
    assert call("~<days>1~</days>") == {"days": [1]}
    assert call("~<days>~</days>~<tags>~</tags>") == {"days": [], "tags": []}
    assert call("~<days>1~</days>~<days>2~</days>~<city>x~</city>") == {"days": [1, 2], "city": "x"}
    assert call("~<tags>a~</tags>~<tags>~<item>b~</item>~</tags>") == {"tags": ["a", "b"]}
    assert call("~<tags>~<item>a~</item>\n~<item>[b]~</item>~</tags>") == {"tags": ["a", "[b]"]}


def test_objects():
    text = "~<place>~<lat>1.5~</lat>~<inside>~<name>a~</name>~</inside>~</place>"
    assert call(text) == {"place": {"lat": 1.5, "inside": {"name": "a"}}}
    assert call('~<place>{"lat": 2}~</place>') == {"place": {"lat": 2}}
    assert call("~<place>~</place>") == {"place": {}}
    assert call("~<place>at ~<lat>1~</lat> north~</place>") == {
        "place": {"lat": 1, "$text": "at  north"}
    }


def test_a_branch_of_the_schema_decides_between_array_and_object():
    assert call("~<either>~<item>1~</item>~</either>") == {"either": [1]}
    assert call("~<either>~<a>1~</a>~</either>") == {"either": {"a": 1}}


def test_without_a_schema_values_are_typed_by_their_looks():
    text = "~<a>1~</a>~<b>true~</b>~<c>007~</c>~<d>~<item>x~</item>~<item>2~</item>~</d>"
    text += "~<e>~<f>null~</f>~</e>~<g>1~</g>~<g>2~</g>"
    assert call(text, "echo") == {
        "a": 1,
        "b": True,
        "c": "007",
        "d": ["x", 2],
        "e": {"f": None},
        "g": [1, 2],
    }


def test_a_call_without_parameters():
    assert call("") == {}
    assert call("\n") == {}
    assert call('{"city": "Paris"}') == {"city": "Paris"}
    assert call("Paris") == {"$text": "Paris"}


def test_tags_inside_a_string_are_its_text():
    text = tag("a ~<b>bold~</b> <i>")
    assert call(f"~<city>{text}~</city>") == {"city": text}


def test_a_name_that_comes_again_keeps_both_values():
    text = "~<city>a~</city>~<ratio>1~</ratio>~<city>b~</city>"
    assert call(text) == {"city": "a\nb", "ratio": 1}
    assert call("~<a>1~</a>~<b>2~</b>~<a>~<x>3~</x>~</a>", "echo") == {"a": [1, {"x": 3}], "b": 2}


def test_a_string_that_comes_again_after_another_one_is_dropped():
    text = "~<city>a~</city>~<note>b~</note>~<city>c~</city>"
    assert call(text) == {"city": "a", "note": "b"}


def test_nesting_has_a_limit():
    text = call("~<a>" * 200 + "1" + "~</a>" * 200, "echo")
    assert json.dumps(text).count("{") < 140


# Tool calls: around and between


def test_several_calls_in_one_block():
    text = '~<tool_call>~<invoke name="echo">~<a>1~</a>~</invoke>\n'
    text += "~<invoke name='echo'>~<a>2~</a>~</invoke>~<invoke name=echo>~</invoke>~</tool_call>"
    assert read([tag(text)]).parsed == [("echo", {"a": 1}), ("echo", {"a": 2}), ("echo", {})]
    assert read([tag(text)], max_calls=1).parsed == [("echo", {"a": 1})]


def test_a_call_that_is_not_closed_ends_at_the_next():
    text = '~<tool_call>~<invoke name="echo">~<a>1~<invoke name="get_weather">~<city>b~</tool_call>'
    assert read([tag(text)]).parsed == [("echo", {"a": 1}), ("get_weather", {"city": "b"})]


def test_a_call_that_breaks_off_keeps_what_was_complete():
    start = '~<tool_call>~<invoke name="get_weather">~<ratio>1~</ratio>'
    assert read([tag(start + "~<limit>12")]).parsed == [("get_weather", {"ratio": 1})]
    assert read([tag(start + "~<days>~<item>1~</item>~<item>2")]).parsed == [
        ("get_weather", {"ratio": 1, "days": [1]})
    ]
    assert read([tag(start + "~<city>Par")]).parsed == [
        ("get_weather", {"ratio": 1, "city": "Par"})
    ]
    assert read([tag(start + "~<ci")]).parsed == [("get_weather", {"ratio": 1})]


def test_white_space_of_text_around_a_block_is_kept_and_other_is_not():
    block = '~<tool_call>~<invoke name="echo">~</invoke>\n~</tool_call>'
    assert read([tag("\n" + block + "\n")]).content == ""
    assert read([tag("Look: \n" + block + "\nDone. ")]).content == "Look: \n\nDone. "
    assert read([" \n"]).content == " \n"


def test_an_invoke_outside_a_block_is_a_call():
    assert read([tag('~<invoke name="echo">~</invoke>')]).parsed == [("echo", {})]


def test_a_stray_marker_is_text():
    assert read([tag("a ~ b ~<tool call ~</b>")]).content == tag("a ~ b ~<tool call ~</b>")


def test_without_tools_the_syntax_is_text():
    text = tag('~<tool_call>~<invoke name="echo">~</invoke>~</tool_call>')
    assert read([text], tools=None).content == text


def test_forced_text_belongs_to_the_answer():
    forced = tag('</mm:think>~<tool_call>\n~<invoke name="')
    answer = read([tag('echo">~<a>1~</a>~</invoke>')], forced=forced)
    assert answer.parsed == [("echo", {"a": 1})]


def test_strings_are_streamed():
    parser = OutputParser(tools=TOOLS)
    parser.feed(tag('~<tool_call>~<invoke name="get_weather">'))
    assert parser.feed(tag("~<city>")) == [CallArguments(0, '{"city":"')]
    assert parser.feed('Par"') == [CallArguments(0, 'Par\\"')]
    assert parser.feed(tag("is~</city>")) == [CallArguments(0, "is")]
    # The same name could follow.
    assert parser.feed(tag("~<days>~<item>1~</item>")) == [CallArguments(0, '","days":[1')]
    assert parser.feed(tag("~<item>2~</item>")) == [CallArguments(0, ",2")]


def test_a_schema_that_refers_to_itself_ends():
    schema = {"properties": {"a": {"$ref": "#/properties/a"}, "b": {"anyOf": [{"$ref": "#"}]}}}
    assert Schema.of(schema).member("a").types == frozenset()
    assert Schema.of(schema).member("b").types == {"object"}


# Any split of any text

FRAGMENTS = (
    *("<mm:think>", "</mm:think>", NS, "<", ">", "/", " ", "\n", "null", "1", "[1,2]", '{"a":1}'),
    *("<tool_call>", "</tool_call>", '<invoke name="get_weather">', '<invoke name="echo">'),
    *("</invoke>", "<city>", "</city>", "<days>", "</days>", "<item>", "</item>", "<place>"),
    *("</place>", "<name>", "</name>", "<x>", "</x>", "text", "\u2028", '"', "\\", "é", "<note>"),
    *("</note>", "<either>", "</either>", "<tags>", "</tags>", "<x/>"),
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.sampled_from(FRAGMENTS).map(lambda fragment: NS + fragment),
        st.text(max_size=5),
    ),
    max_size=30,
).map("".join)


@st.composite
def split_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    if draw(st.booleans()):
        text = tag('~<tool_call>~<invoke name="get_weather">') + text
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    ends = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in zip(ends, ends[1:], strict=False)]


@settings(max_examples=400 * SCALE, deadline=None)
@given(split_texts(), st.sampled_from(list(Start)), st.sampled_from([None, TOOLS]), st.booleans())
def test_chunks_do_not_matter(split, start, tools, cut):
    text, chunks = split
    options = {"start": start, "tools": tools, "cut": cut}
    whole = read([text], **options)
    assert read(chunks, **options) == whole
    assert read(text, **options) == whole
    for _, arguments in whole.calls[: len(whole.calls) - (whole.open_call is not None)]:
        assert isinstance(json.loads(arguments), dict)


@settings(max_examples=200 * SCALE, deadline=None)
@given(TEXTS)
@example("</mm:think><mm:think></mm:think>")
@example("<mm:think></mm:think></mm:think>")
def test_nothing_but_markers_and_the_space_before_them_is_lost(text):
    """One block, with closing markers of nothing before it and behind it."""
    answer = read([text], tools=None)
    leading = r"(\s*</mm:think>)*(\s*<mm:think>)?"
    closing = r"(</mm:think>(\s*</mm:think>)*)?"
    kept = [re.escape(part) for part in (answer.reasoning, answer.content)]
    assert re.fullmatch(leading + kept[0] + closing + kept[1], text)
