"""What is refused, and what the client reads: every message names its field."""

import pytest
from fake_engine import MODEL, FakeEngine, Reply, make_app, post

from eaglerun.errors import CapacityError, EngineError, RequestError
from eaglerun.server.settings import Limits

APP = make_app()
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: object) -> Reply:
    return post(APP, "/v1/chat/completions", {"messages": [USER]} | fields)


def completion(**fields: object) -> Reply:
    return post(APP, "/v1/completions", {"prompt": "hi"} | fields)


def responses(**fields: object) -> Reply:
    return post(APP, "/v1/responses", {"input": "hi"} | fields)


def refusal(reply: Reply) -> tuple[str | None, str]:
    """(param, message) of a 400; the message has nothing of ours in it."""
    error = reply.error
    assert reply.status == 400, reply.body
    assert error["type"] == "invalid_request_error"
    for word in ("/", "0x", "Traceback", "object at", "None", "Error"):
        assert word not in error["message"].replace("application/json", "")
    return error["param"], error["message"]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"strem": True}, "strem", 'did you mean "stream"?'),
        ({"functions": [TOOL["function"]]}, "functions", "only [] is accepted"),
        ({"function_call": {"name": "f"}}, "function_call", 'only "none" or "auto" is accepted'),
        ({"audio": {}}, "audio", "not supported"),
        ({"verbosity": "low"}, "verbosity", 'only "medium" is accepted'),
        ({"bad_words": ["x"]}, "bad_words", "only [] is accepted"),
        ({"allowed_token_ids": [1]}, "allowed_token_ids", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "only false"),
        ({"length_penalty": 0.5}, "length_penalty", "only 1"),
        ({"detokenize": False}, "detokenize", "only true"),
        ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids", "only false"),
        ({"echo": True}, "echo", "only false"),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "not a field"),
        ({"thinking": {"type": "on"}}, "thinking.type", "should be 'enabled'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens", "not a"),
        (
            {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"enable_thinking": False}},
            "thinking.type",
            "contradicts chat_template_kwargs.enable_thinking",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": "yes"}},
            "chat_template_kwargs.enable_thinking",
            "should be true or false",
        ),
        (
            {"thinking": {"type": "disabled"}, "reasoning_effort": "high"},
            "reasoning_effort",
            "high contradicts thinking.type",
        ),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "allowed are -1 and from 1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "must be in [0, 20]"),
        ({"continue_final_message": True}, "continue_final_message", "not the assistant"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
            "contradicts",
        ),
        (
            {"add_generation_prompt": False, "tools": [TOOL], "tool_choice": "required"},
            "tool_choice",
            "beginning of a turn",
        ),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "must be in [1,"),
        ({"modalities": ["text", "audio"]}, "modalities[1]", "should be 'text'"),
        ({"response_format": {"type": "json_object"}}, "response_format", "structured output"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "structured output"),
        ({"reasoning_effort": "much"}, "reasoning_effort", "one of none, minimal, low"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "not in [0, 100]"),
        ({"top_p": 0}, "top_p", "not in (0, 1]"),
        ({"top_k": 1.5}, "top_k", "valid integer"),
        ({"top_k": 2**40}, "top_k", "less than or equal"),
        ({"min_p": 2}, "min_p", "not in [0, 1]"),
        ({"presence_penalty": 3}, "presence_penalty", "not in [-2, 2]"),
        ({"repetition_penalty": 0}, "repetition_penalty", "not in [0.01, 100]"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "not in [0.01, 100]"),
        ({"n": 0}, "n", "must be in [1, 128]"),
        ({"n": 17}, "n", "allowed 16"),
        ({"seed": "x"}, "seed", "valid integer"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"stop": [""]}, "stop[0]", "at least 1 character"),
        ({"stop": ["a"] * 17}, "stop", "17 given, allowed 16"),
        ({"stop": "a" * 257}, "stop", "longer than 256"),
        ({"max_tokens": 0}, "max_tokens", "must be in [1,"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs from"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "exceeds max_tokens"),
        ({"max_tokens": 4090}, "messages", "exceed the model's length of 4096"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be in [0, 20]"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias", 'the key "a" is no token id'),
        ({"logit_bias": {"5": 1, "6": 101}}, "logit_bias", 'bias of "6" is not in [-100, 100]'),
        ({"logit_bias": {"5": "x"}}, "logit_bias", 'the bias of "5" is no number'),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream_options": {"chunks": 1}}, "stream_options.chunks", "not a field"),
        ({"speculation": {"num_draft_tokens": 9}}, "speculation.num_draft_tokens", "equal to 8"),
        ({"speculation": {"num_draft_tokens": 4}}, "speculation.num_draft_tokens", "drafts 3"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "allowed are thinking"),
        (
            {"chat_template_kwargs": {"thinking_mode": "off"}},
            "chat_template_kwargs.thinking_mode",
            "allowed are enabled, disabled, adaptive",
        ),
        (
            {"chat_template_kwargs": {"thinking_mode": "enabled"}, "reasoning_effort": "none"},
            "reasoning_effort",
            "contradicts",
        ),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "should be one of root"),
        (
            {"messages": [{"role": "assistant", "reasoning": "a", "reasoning_content": "b"}]},
            "messages[0].reasoning",
            "differs from reasoning_content",
        ),
        ({"messages": [USER, {"role": "bot", "content": ""}]}, "messages[1].role", "should be"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content",
            "parts of type image_url are not supported, only text",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": []}]},
            "messages[0].tool_calls",
            "is not a field of this API",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "required"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages", "no root here"),
        ({"tools": [TOOL] * 2}, "tools", "two have the same name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "should be 'function'"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
            "tools[0].function.strict",
            "structured output",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": 'f"'}}]},
            "tools[0].function.name",
            "match pattern",
        ),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tool_choice": "any", "tools": [TOOL]}, "tool_choice", "none, auto, required"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
            "tool_choice",
            "names no function",
        ),
    ],
)
def test_chat_refusals(fields, param, words):
    found, message = refusal(chat(**fields))
    assert found == param
    assert message.startswith(f"{param}: ") and words in message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": []}, "prompt", "should be a string"),
        ({"prompt": ["a", 1]}, "prompt", "should be a string"),
        ({"prompt": [[1], [300]]}, "prompt", "below 262"),
        ({"prompt": ["a"] * 65}, "prompt", "65 prompts, allowed 64"),
        ({"prompt": ""}, "prompt", "is empty"),
        ({"best_of": 2}, "best_of", "2 is not supported"),
        ({"suffix": "x"}, "suffix", 'only "" is accepted'),
        ({"max_tokens": 0}, "max_tokens", "0 needs echo"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "cannot be streamed"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"echo": True, "logprobs": 1, "stream": True}, "echo", "cannot be streamed"),
        ({"messages": [USER]}, "messages", "not a field"),
        ({"max_tokens": 4096}, "prompt", "2 tokens and an answer of up to 4096 exceed"),
    ],
)
def test_completion_refusals(fields, param, words):
    found, message = refusal(completion(**fields))
    assert found == param
    assert message.startswith(f"{param}: ") and words in message


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "not supported"),
        ({"background": True}, "background", "should be False"),
        ({"truncation": "auto"}, "truncation", "should be 'disabled'"),
        ({"include": ["x"]}, "include[0]", "should be 'reasoning.encrypted_content'"),
        ({"reasoning": {"effort": "much"}}, "reasoning.effort", "one of none, minimal, low"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", 'only "auto"'),
        ({"max_output_tokens": 0}, "max_output_tokens", "must be in [1,"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens", "exceeds max_output_tokens"),
        ({"max_output_tokens": 4095}, "input", "exceed the model's length"),
        (
            {"reasoning": {"effort": "none"}, "thinking": {"type": "enabled"}},
            "reasoning.effort",
            "none contradicts thinking.type",
        ),
        ({"input": [{"role": "root", "content": "x"}]}, "input", "no root here"),
        ({"top_logprobs": 2}, "top_logprobs", "only 0"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "structured output"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type", "should be 'function'"),
        ({"tools": [{"type": "function", "name": "f", "strict": True}]}, "tools[0].strict", "true"),
        (
            {"input": [{"type": "item_reference", "id": "msg_1"}]},
            "input[0].id",
            '"msg_1" cannot be resolved: this server stores no items',
        ),
        ({"input": [{"id": "rs_2"}]}, "input[0].id", '"rs_2" cannot be resolved'),
        ({"input": [{"role": "user"}]}, "input[0]", "an item of type message needs content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content",
            "input_image are not supported",
        ),
        ({"speculation": {"tokens": True}}, "speculation.tokens", "chat and completions only"),
        ({"n": 2}, "n", "not a field"),
    ],
)
def test_responses_refusals(fields, param, words):
    found, message = refusal(responses(**fields))
    assert found == param
    assert message.startswith(f"{param}: ") and words in message


def test_a_body_that_is_no_json_object():
    for chunk in (b"{", b'{"messages": [', b'"\\ud800"', b"[1]", b"null", b""):
        reply = post(APP, "/v1/chat/completions", None, chunks=[chunk])
        assert reply.status == 400, chunk
        assert "JSON" in reply.error["message"]
    reply = post(APP, "/v1/chat/completions", {}, headers={"content-type": "text/plain"})
    assert "sent as application/json" in refusal(reply)[1]


def test_many_unknown_fields_make_one_error():
    message = refusal(chat(**{f"x{i}": i for i in range(50_000)}))[1]
    assert message == "x0: is not a field of this API"


def test_another_model_is_a_404():
    for path, body in (
        ("/v1/chat/completions", {"messages": [USER]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/tokenize", {"prompt": "x"}),
    ):
        reply = post(APP, path, body | {"model": "other"})
        assert reply.status == 404 and reply.error["code"] == "model_not_found"
        assert post(APP, path, body | {"model": MODEL}).status == 200


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (CapacityError("the queue is full"), 503, "the queue is full"),
        (EngineError("worker at 0x7f died in /srv/x"), 503, "the engine is not running"),
        (RequestError("prompt", "is too odd"), 400, "messages: is too odd"),
        (RequestError("num_draft_tokens", "no"), 400, "speculation.num_draft_tokens: no"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(error, status, words, stream):
    app = make_app(FakeEngine(refusal=error))
    reply = post(app, "/v1/chat/completions", {"messages": [USER], "stream": stream})
    assert reply.status == status
    assert reply.error["message"] == words
    assert ("retry-after" in reply.headers) == (status == 503)


def test_an_engine_that_is_not_ready():
    app = make_app(FakeEngine(ready=False))
    reply = post(app, "/v1/chat/completions", {"messages": [USER]})
    assert reply.status == 503 and reply.headers["retry-after"] == "1"


def test_prompts_have_a_length():
    app = make_app(limits=Limits(max_prompt_chars=500))
    body = {"messages": [{"role": "user", "content": "x" * 600}]}
    assert "too long" in refusal(post(app, "/v1/chat/completions", body))[1]
    assert "longer than 500" in refusal(post(app, "/v1/completions", {"prompt": "x" * 600}))[1]


def test_preparation_is_bounded():
    app = make_app(limits=Limits(max_preparing=0))
    reply = post(app, "/v1/chat/completions", {"messages": [USER]})
    assert reply.status == 503 and "retry-after" in reply.headers
