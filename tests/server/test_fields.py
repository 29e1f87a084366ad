"""Requests as clients really send them, field by field: with an effect, without, or refused."""

from pathlib import Path
from typing import Any

import pytest
from fake_engine import TOKENIZER, FakeEngine, Reply, Script, Stage, make_app, post

import eaglerun.configs as demo
from eaglerun.messages import Request

NS = "]<]minimax[>["
USER = {"role": "user", "content": "hi"}
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [USER]},
    COMPLETIONS: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
}
CACHED = {"cache_control": {"type": "ephemeral"}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}

STAGE = Stage()


def says(text: str, **script: Any) -> FakeEngine:
    return FakeEngine(Script(lambda request, index: text, **script))


def send(engine: FakeEngine, path: str, **fields: Any) -> Reply:
    reply = STAGE.post(engine, path, BODIES[path] | fields)
    assert reply.status == 200, reply.body
    return reply


def prompt_of(engine: FakeEngine) -> str:
    return prompt_text(engine.requests[-1])


def prompt_text(request: Request) -> str:
    return TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False)


def told(path: str, **fields: Any) -> tuple[str, Any]:
    """The prompt and the sampling that the engine is asked for."""
    engine = says("x")
    send(engine, path, **fields)
    return prompt_of(engine), engine.requests[-1].sampling


# Without effect

NO_EFFECT: list[tuple[str, dict[str, Any]]] = [
    ("metadata", {"metadata": {"a": "b", "c": 1}}),
    ("store", {"store": True}),
    ("not-store", {"store": False}),
    ("service-tier", {"service_tier": "flex"}),
    ("safety-identifier", {"safety_identifier": "u1"}),
    ("cache-key", {"prompt_cache_key": "k", "prompt_cache_retention": "24h"}),
    ("user", {"user": "u"}),
    ("cache-control", CACHED),
    ("bad-words-none", {"bad_words": []}),
    ("beam-search-off", {"use_beam_search": False, "length_penalty": 1.0}),
    ("defaults-of-vllm", {"detokenize": True, "spaces_between_special_tokens": True}),
    ("tokens-as-text", {"return_tokens_as_token_ids": False}),
    ("unknown-null", {"some_field_of_tomorrow": None}),
]
OF_ONE_ROUTE: list[tuple[str, str, dict[str, Any]]] = [
    ("no-functions", CHAT, {"functions": [], "function_call": "auto"}),
    ("prediction", CHAT, {"prediction": {"type": "content", "content": "hi"}}),
    ("verbosity", CHAT, {"verbosity": "medium"}),
    ("modalities", CHAT, {"modalities": ["text"]}),
    ("response-format", CHAT, {"response_format": {"type": "text"}}),
    ("no-echo", CHAT, {"echo": False}),
    ("no-usage", CHAT, {"stream_options": {"include_usage": False}}),
    ("best-of-one", COMPLETIONS, {"best_of": 1}),
    ("empty-suffix", COMPLETIONS, {"suffix": ""}),
    ("verbosity-of-text", RESPONSES, {"text": {"verbosity": "medium"}}),
    ("summary", RESPONSES, {"reasoning": {"summary": "auto"}}),
    ("encrypted-reasoning", RESPONSES, {"include": ["reasoning.encrypted_content"]}),
    ("tool-calls-on-the-server", RESPONSES, {"max_tool_calls": 3, "background": False}),
    ("top-logprobs-none", RESPONSES, {"top_logprobs": 0, "truncation": "disabled"}),
]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(
            pytest.param(path, fields, id=f"{path[4:]}-{id_}")
            for id_, fields in NO_EFFECT
            for path in BODIES
        ),
        *(pytest.param(path, fields, id=id_) for id_, path, fields in OF_ONE_ROUTE),
    ],
)
def test_a_field_without_effect_is_accepted(path, fields):
    assert told(path, **fields) == told(path)


def nullable_fields(path: str) -> list[str]:
    """All fields of a route's document but the required one."""
    document = STAGE.get("/openapi.json").json()
    body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    return [field for field in document["components"]["schemas"][name]["properties"]]


@pytest.mark.parametrize("path", BODIES)
def test_a_field_that_is_null_is_absent(path):
    fields = [name for name in nullable_fields(path) if name not in BODIES[path]]
    assert len(fields) > 30
    for name in fields:
        found = told(path, **{name: None})
        # A completion's length is 16 unless it is said, and null says that it has no limit.
        assert name == "max_tokens" or found == told(path)


def test_members_that_are_null_are_absent():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    nulls = dict.fromkeys(("name", "tool_calls", "tool_call_id", "refusal", "audio", "anything"))
    messages = [
        {"role": "user", "content": "hi"} | nulls,
        {"role": "assistant", "content": None, "tool_calls": [call | {"index": None}]},
        {"role": "tool", "tool_call_id": "c", "content": "x", "name": None, "tool_calls": None},
    ]
    function = FUNCTION | {"description": None, "strict": None, "anything": None}
    fields = {"tools": [TOOL | {"function": function}], "stream_options": {"include_usage": None}}
    assert told(CHAT, messages=messages, **fields)[0].endswith("]~b]tool\nx[e~[\n]~b]ai\n")
    part = {"type": "input_text", "text": "hi", "annotations": None, "detail": None}
    item = {"role": "user", "content": [part], "id": None, "status": None, "type": None}
    assert told(RESPONSES, input=[item]) == told(RESPONSES)


def test_cache_control_is_ignored_anywhere():
    part = {"type": "text", "text": "hi"}
    plain = {"messages": [{"role": "user", "content": [part]}], "tools": [TOOL]}
    marked = {
        "messages": [{"role": "user", "content": [part | CACHED]} | CACHED],
        "tools": [{"type": "function", "function": FUNCTION | CACHED} | CACHED],
    }
    assert told(CHAT, **marked, **CACHED) == told(CHAT, **plain)
    item = {"role": "user", "content": [{"type": "input_text", "text": "hi"} | CACHED]} | CACHED
    assert told(RESPONSES, input=[item]) == told(RESPONSES)
    # A parameter of that name is the tool's own.
    own = {"type": "object", "properties": {"cache_control": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": own}}]
    assert '"cache_control"' in told(CHAT, tools=tools)[0]


# Histories


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_a_history_has_two_names(name):
    turn = {"role": "assistant", "content": "4", name: "sum"}
    prompt, _ = told(CHAT, messages=[USER, turn, USER])
    assert "<mm:think>sum</mm:think>4[e~[" in prompt


def test_an_answer_comes_back_as_it_was():
    engine = says("<mm:think>sum</mm:think>4")
    message = send(engine, CHAT).json()["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == "sum"
    prompt, _ = told(CHAT, messages=[USER, message, USER])
    assert "<mm:think>sum</mm:think>4[e~[" in prompt


BROKEN = ['{"city": ', "[1]", '"Paris"', "null", "5", "not json", '{"a": 1}}']


@pytest.mark.parametrize("arguments", BROKEN)
def test_broken_arguments_of_a_history_are_rendered_as_they_are(arguments):
    """Fake_engine's template wants an object, so they are the text of a call without elements."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c", "content": "no"}
    prompt, _ = told(CHAT, messages=[USER, {"role": "assistant", "tool_calls": [call]}, result])
    assert f'{NS}<invoke name="f">{NS}<$text>{arguments}{NS}</$text>{NS}</invoke>' in prompt
    items = [
        {"role": "user", "content": "hi"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c", "output": "no"},
    ]
    assert told(RESPONSES, input=items)[0] == prompt


@pytest.mark.parametrize("arguments", BROKEN)
def test_the_demos_template_writes_broken_arguments_as_they_are(arguments):
    template = Path(demo.__file__).parent / "demo" / "target" / "chat_template.jinja"
    engine = says("ok")
    app = make_app(engine, template.read_text())
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}]
    assert post(app, CHAT, {"messages": messages}).status == 200
    assert f'{NS}<invoke name="f">{arguments}{NS}</invoke>' in prompt_of(engine)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        ({"arguments": ""}, ""),
        ({"arguments": None}, ""),
        ({}, ""),
        ({"arguments": {"a": "b"}}, f"{NS}<a>b{NS}</a>"),
        ({"arguments": ["a"]}, f'{NS}<$text>["a"]{NS}</$text>'),
    ],
)
def test_other_kinds_of_arguments_in_a_history(function, text):
    call = {"id": "c", "type": "function", "function": {"name": "f"} | function}
    prompt, _ = told(CHAT, messages=[USER, {"role": "assistant", "tool_calls": [call]}, USER])
    assert f'{NS}<invoke name="f">{text}{NS}</invoke>' in prompt


def test_a_history_may_call_what_does_not_exist():
    engine = says(f'{NS}<tool_call>{NS}<invoke name="delete all!">{NS}</invoke>{NS}</tool_call>')
    message = send(engine, CHAT, tools=[TOOL]).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["name"] == "delete all!"
    prompt, _ = told(CHAT, messages=[USER, message, USER], tools=[TOOL])
    assert f'{NS}<invoke name="delete all!">{NS}</invoke>' in prompt
    responses_tool = {"type": "function", **FUNCTION}
    items = send(engine, RESPONSES, tools=[responses_tool]).json()["output"]
    prompt, _ = told(RESPONSES, input=[USER, *items, USER], tools=[responses_tool])
    assert f'{NS}<invoke name="delete all!">{NS}</invoke>' in prompt


@pytest.mark.parametrize("turn", [{"content": None}, {"content": ""}, {}, {"tool_calls": []}])
def test_a_turn_that_was_interrupted_is_empty(turn):
    prompt, _ = told(CHAT, messages=[USER, {"role": "assistant"} | turn, USER])
    assert "]~b]ai\n</mm:think>[e~[\n]~b]user" in prompt


@pytest.mark.parametrize("turn", [{"content": None}, {"content": []}, {"content": ""}])
def test_an_item_that_was_interrupted_is_empty(turn):
    item = {"type": "message", "role": "assistant"} | turn
    prompt, _ = told(RESPONSES, input=[USER, item, USER])
    assert "]~b]ai\n</mm:think>[e~[\n]~b]user" in prompt


def test_reasoning_that_was_interrupted_is_a_turn():
    item = {
        "type": "reasoning",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "h"}],
    }
    prompt, _ = told(RESPONSES, input=[USER, item, USER])
    assert "<mm:think>h</mm:think>[e~[\n]~b]user" in prompt
    assert told(RESPONSES, input=[USER, item])[0].endswith("<mm:think>h</mm:think>[e~[\n]~b]ai\n")


# How to think

MODES = {"enabled": "<mm:think>", "disabled": "</mm:think>", "adaptive": "]~b]ai\n"}


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({"thinking": {"type": "enabled"}}, "enabled"),
        ({"thinking": {"type": "disabled"}}, "disabled"),
        ({"thinking": {"type": "adaptive"}}, "adaptive"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enabled"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "disabled"),
        ({"chat_template_kwargs": {"enable_thinking": None, "thinking_mode": None}}, "adaptive"),
        (
            {
                "thinking": {"type": "enabled"},
                "chat_template_kwargs": {"enable_thinking": True, "thinking_mode": "enabled"},
            },
            "enabled",
        ),
    ],
)
@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_ways_to_say_how_to_think(path, fields, mode):
    prompt, _ = told(path, **fields)
    assert prompt.endswith(MODES[mode]) and f"mode: {mode}." in prompt


@pytest.mark.parametrize(
    ("effort", "mode"),
    [
        ("none", "disabled"),
        ("minimal", "adaptive"),
        ("low", "adaptive"),
        ("medium", "adaptive"),
        ("high", "enabled"),
        ("xhigh", "enabled"),
        ("max", "enabled"),
    ],
)
def test_efforts_are_the_modes_that_there_are(effort, mode):
    prompt, _ = told(CHAT, reasoning_effort=effort)
    assert prompt.endswith(MODES[mode]) and f"mode: {mode}." in prompt
    assert told(RESPONSES, reasoning={"effort": effort})[0] == prompt
    # A mode that is said too decides, where the two agree on thinking at all.
    said = "disabled" if effort == "none" else "enabled"
    prompt, _ = told(CHAT, reasoning_effort=effort, thinking={"type": said})
    assert f"mode: {said}." in prompt


# Where the answer begins


def test_the_final_message_goes_on():
    engine = says("ris is <mm:think> big")
    turn = {"role": "assistant", "content": "Pa "}
    fields = {"continue_final_message": True, "messages": [USER, turn]}
    answer = send(engine, CHAT, **fields).json()
    assert prompt_of(engine).endswith("]~b]ai\n</mm:think>Pa ")
    assert answer["choices"][0]["message"]["content"] == "ris is <mm:think> big"
    more = fields | {"add_generation_prompt": False}
    assert told(CHAT, **more)[0] == prompt_of(engine)
    tokens = STAGE.post(engine, "/tokenize", fields).json()["tokens"]
    assert tuple(tokens) == engine.requests[0].prompt_ids


def test_reasoning_goes_on():
    engine = says("m</mm:think>4")
    turn = {"role": "assistant", "content": None, "reasoning": "su"}
    answer = send(engine, CHAT, messages=[USER, turn], continue_final_message=True).json()
    assert prompt_of(engine).endswith("<mm:think>su")
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("m", "4")


def test_an_answer_without_a_turn_of_its_own():
    assert told(CHAT, add_generation_prompt=False)[0].endswith("]~b]user\nhi[e~[\n")


@pytest.mark.parametrize(
    ("fields", "end"),
    [({}, "hi"), ({"truncate_prompt_tokens": 1}, "i"), ({"truncate_prompt_tokens": -1}, "hi")],
)
def test_prompts_are_truncated_from_their_beginning(fields, end):
    engine = says("!")
    answer = send(engine, COMPLETIONS, echo=True, **fields).json()
    assert prompt_of(engine) == end and answer["choices"][0]["text"] == end + "!"
    assert answer["usage"]["prompt_tokens"] == len(end)


def test_long_prompts_are_truncated_to_what_fits():
    engine = says("x")
    ids = list(range(100)) * 50
    send(engine, COMPLETIONS, prompt=ids, truncate_prompt_tokens=-1, max_tokens=96)
    assert engine.requests[0].prompt_ids == tuple(ids[-4000:])
    send(engine, CHAT, truncate_prompt_tokens=3)
    assert prompt_of(engine) == "ai\n"


# What more may be in an answer


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_echo_without_an_answer(logprobs):
    engine = says("never")
    fields = {"prompt": ["ab", "c"], "max_tokens": 0, "echo": True, "logprobs": logprobs}
    answer = send(engine, COMPLETIONS, **fields).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ab", "c"]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b"]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [None, -0.5]
        return
    events = send(engine, COMPLETIONS, stream=True, **fields).events()
    texts = ["", ""]
    for event in events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == ["ab", "c"]


def test_log_probabilities_of_a_prompt():
    expected = [
        None,
        {
            "72": {"logprob": -0.5, "rank": 1, "decoded_token": "i"},
            "73": {"logprob": -1.5, "rank": 2, "decoded_token": "j"},
        },
    ]
    answer = send(says("x"), COMPLETIONS, prompt_logprobs=2).json()
    assert answer["choices"][0]["prompt_logprobs"] == expected
    answer = send(says("x"), CHAT, prompt_logprobs=0, n=2).json()
    found = answer["prompt_logprobs"]
    assert found[0] is None and len(found) == answer["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in found[1:])


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_token_ids_of_an_answer(path):
    engine = says("abc")
    fields = {"return_token_ids": True, "n": 2}
    answer = send(engine, path, **fields).json()
    prompt_ids = list(engine.requests[0].prompt_ids)
    ids = [*TOKENIZER.encode("abc").ids, TOKENIZER.token_to_id("[e~[")]
    place = answer if path == CHAT else answer["choices"][0]
    assert place["prompt_token_ids"] == prompt_ids
    assert [choice["token_ids"] for choice in answer["choices"]] == [ids, ids]

    *events, _ = send(engine, path, stream=True, **fields).events()
    first, streamed = [], [[], []]
    for event in events:
        for choice in event["choices"]:
            place = event if path == CHAT else choice
            first += [place["prompt_token_ids"]] if "prompt_token_ids" in place else []
            streamed[choice["index"]] += choice.get("token_ids", [])
    assert first == [prompt_ids, prompt_ids] and streamed == [ids, ids]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_in_every_chunk(path):
    options = {"include_usage": True, "continuous_usage_stats": True}
    engine = says("abcdef", groups=(2,))
    *events, _ = send(engine, path, stream=True, stream_options=options).events()
    num_prompt = len(engine.requests[0].prompt_ids)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and {2, 4, 6, 7} <= set(counts)
    for event in events:
        usage = event["usage"]
        assert usage["prompt_tokens"] == num_prompt
        assert usage["total_tokens"] == num_prompt + usage["completion_tokens"]
    assert events[-1]["choices"] == []


@pytest.mark.parametrize("groups", [(1,), (3,), (50,)])
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("<mm:think>sum</mm:think>né", ["n", "\ufffd", "\ufffd"]),
        ("</mm:think>4", ["4"]),
        (f'Hm. {NS}<tool_call>{NS}<invoke name="get_weather">', ["H", "m", ".", " "]),
        ("<mm:think>on and on", []),
    ],
)
def test_log_probabilities_are_the_contents(text, tokens, groups):
    engine = says(text, groups=groups)
    fields = {"logprobs": True, "top_logprobs": 1, "tools": [TOOL]}
    [choice] = send(engine, CHAT, **fields).json()["choices"]
    assert [token["token"] for token in choice["logprobs"]["content"]] == tokens
    streamed = []
    for event in send(engine, CHAT, stream=True, **fields).events()[:-1]:
        for part in event["choices"]:
            streamed += (part["logprobs"] or {"content": []})["content"]
    assert streamed == choice["logprobs"]["content"]


# Calls

CALL = f'{NS}<tool_call>\n{NS}<invoke name="get_weather">{NS}<city>Paris{NS}</city>{NS}</invoke>'


def chat_of(events: list[Any]) -> tuple[str, str, list[str], str]:
    """Content, reasoning, arguments of the calls and the reason of the end of a stream."""
    content, reasoning, calls, reason = "", "", [], ""
    for event in events[:-1]:
        for choice in event["choices"]:
            delta = choice["delta"]
            content += delta.get("content", "")
            reasoning += delta.get("reasoning", "")
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    calls.append("")
                calls[call["index"]] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return content, reasoning, calls, reason


@pytest.mark.parametrize("limit", [1, 5, 13, 33, 48, 55, 60, 65])
def test_a_limit_inside_a_call_shows_no_markup(limit):
    fields = {"tools": [TOOL], "max_tokens": limit, "thinking": {"type": "disabled"}}
    engine = says(CALL, groups=(1, 3, 2))
    [choice] = send(engine, CHAT, **fields).json()["choices"]
    message = choice["message"]
    calls = [call["function"]["arguments"] for call in message.get("tool_calls", ())]
    assert (message["content"] or "", choice["finish_reason"]) == ("", "length")
    content, _, streamed, reason = chat_of(send(engine, CHAT, stream=True, **fields).events())
    assert (content, streamed, reason) == ("", calls, "length")
    assert all(text and '{"city":"Paris"'.startswith(text) for text in calls)


def test_a_forced_call_that_is_cut_off_does_not_look_complete():
    engine = says(f"{NS}<city>Paris{NS}</city>{NS}</invoke>{NS}</tool_call>")
    choice = {"type": "function", "name": "get_weather"}
    fields = {"tools": [{"type": "function", **FUNCTION}], "tool_choice": choice}
    for limit, arguments in (
        (1, "{"),
        (7, '{"city":"'),
        (9, '{"city":"Pa'),
        (13, '{"city":"Paris'),
    ):
        fields["max_output_tokens"] = limit
        answer = send(engine, RESPONSES, **fields).json()
        [item] = answer["output"]
        assert (item["status"], item["arguments"]) == ("incomplete", arguments)
        assert answer["status"] == "incomplete"
        events = send(engine, RESPONSES, stream=True, **fields).events()
        assert events[-1]["response"]["output"][0]["status"] == "incomplete"
        assert events[-1]["type"] == "response.incomplete"
    fields["max_output_tokens"] = 40
    [item] = send(engine, RESPONSES, **fields).json()["output"]
    assert (item["status"], item["arguments"]) == ("completed", '{"city":"Paris"}')


def tools(*names: str) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def chooser(*wishes: str) -> FakeEngine:
    """An engine that goes on with a name of ``wishes`` wherever a call's name stands open."""

    def answer(request: Request, index: int) -> str:
        begun = prompt_text(request).rpartition(f"{NS}<invoke ")[2]
        if begun.endswith('">'):
            return f"{NS}</invoke>{NS}</tool_call>"
        tails = [f'name="{wish}">' for wish in wishes]
        return next(tail[len(begun) :] for tail in tails if tail.startswith(begun))

    return FakeEngine(Script(answer))


def test_a_required_call_chooses_among_the_offered_tools():
    engine = chooser("get_time")
    offered = tools("get_weather", "get_time", "get_text", "send")
    answer = send(engine, CHAT, tools=offered, tool_choice="required").json()
    [choice] = answer["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_time"]
    assert choice["finish_reason"] == "tool_calls"
    # Asked at each parting of the names: g or s, w or t, i or e; and then for the call.
    *asked, last = engine.requests
    bytes_of = [{TOKENIZER.decode([id_]) for id_ in r.sampling.logit_bias} for r in asked]
    assert bytes_of == [{"g", "s"}, {"w", "t"}, {"i", "e"}]
    assert all(set(r.sampling.logit_bias.values()) == {100.0} for r in asked)
    assert all((r.sampling.max_tokens, r.sampling.n) == (1, 1) for r in asked)
    assert prompt_text(last).endswith(f'</mm:think>{NS}<tool_call>\n{NS}<invoke name="get_time">')


def test_a_required_call_of_a_tool_that_is_not_offered_is_an_error():
    engine = says("xyz")
    body = BODIES[CHAT] | {"tools": tools("a1", "b2"), "tool_choice": "required"}
    reply = STAGE.post(engine, CHAT, body)
    assert reply.status == 500
    assert (reply.error["param"], reply.error["code"]) == ("tool_choice", "no_tool_chosen")


def test_a_required_call_of_the_only_tool_asks_nothing():
    engine = chooser("python")
    answer = send(engine, CHAT, tools=tools("python"), tool_choice="required").json()
    [call] = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "python" and len(engine.requests) == 1


def test_names_that_begin_each_other_can_be_told_apart():
    for wish in ("get", "get_all", "get_all_of"):
        engine = chooser(wish)
        fields = {"tools": tools("get", "get_all", "get_all_of"), "tool_choice": "required"}
        [choice] = send(engine, CHAT, **fields).json()["choices"]
        assert choice["message"]["tool_calls"][0]["function"]["name"] == wish


def test_other_calls_after_a_forced_one_are_dropped():
    rest = f'{NS}</invoke>{NS}<invoke name="b">{NS}</invoke>{NS}<invoke name="c">{NS}</invoke>'
    engine = FakeEngine(Script(lambda r, i: rest if prompt_text(r).endswith('">') else "a"))
    named = {"type": "function", "function": {"name": "a"}}
    for choice, found in (("required", ["a", "b"]), (named, ["a"])):
        answer = send(engine, CHAT, tools=tools("a", "b"), tool_choice=choice).json()
        calls = answer["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == found


def test_an_engine_that_fails_while_a_tool_is_chosen():
    engine = says("a", fail=0)
    body = BODIES[CHAT] | {"tools": tools("a", "b"), "tool_choice": "required", "stream": True}
    reply = STAGE.post(engine, CHAT, body)
    assert reply.status == 503 and reply.error["message"] == "the engine died"


def test_text_around_a_call_keeps_its_space():
    engine = says(f"Look: \n{CALL}{NS}</tool_call>\nDone. ")
    answer = send(engine, CHAT, tools=[TOOL]).json()
    assert answer["choices"][0]["message"]["content"] == "Look: \n\nDone. "
