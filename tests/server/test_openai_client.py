"""The official client against our server, over a real socket.

EAGLERUN_TEST_URL (http://host:port/v1) points the file at a running server, with
EAGLERUN_TEST_KEY where that wants one; without it, the application is served here by a scripted
engine. What the tests ask must hold for both.
"""

import asyncio
import json
import os
import socket
import threading
from collections.abc import Iterator

import openai
import pytest
import uvicorn
from fake_engine import TOKENIZER, FakeEngine, Script, make_app

from eaglerun.messages import Request

NS = "]<]minimax[>["
KEY = os.environ.get("EAGLERUN_TEST_KEY", "sk-test")
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}
TOOL = {"type": "function", "function": WEATHER}
USER = {"role": "user", "content": "What is 2 + 2?"}


def script(request: Request, index: int) -> str:
    """Thinks where the prompt lets it, and finishes a call that the prompt began."""
    prompt = TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False)
    if prompt.endswith('<invoke name="get_weather">'):
        return f"{NS}<city>Paris{NS}</city>{NS}</invoke>\n{NS}</tool_call>"
    if prompt.endswith("<mm:think>"):
        return "Two and two.</mm:think>It is 4, of course."
    return "It is 4, of course."


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    given = os.environ.get("EAGLERUN_TEST_URL")
    if given:
        yield given
        return
    app = make_app(FakeEngine(Script(script)), api_keys=(KEY,))
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def client(base_url: str) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0, http_client=http) as made:
        yield made


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_models(client, model):
    assert client.models.retrieve(model).id == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no/such-model")
    assert caught.value.code == "model_not_found"
    assert caught.value.request_id


def test_a_wrong_key(base_url):
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(base_url=base_url, api_key="no", max_retries=0, http_client=http) as wrong:
        if "EAGLERUN_TEST_URL" in os.environ and "EAGLERUN_TEST_KEY" not in os.environ:
            assert wrong.models.list().data
            return
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()


def test_chat(client, model):
    answer = client.chat.completions.create(
        model=model, messages=[USER], max_completion_tokens=200, temperature=0, seed=1
    )
    [choice] = answer.choices
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    assert choice.message.content is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    assert answer.usage.completion_tokens_details.reasoning_tokens is not None


def test_chat_streams_the_same(client, model):
    fields = {"model": model, "messages": [USER], "max_tokens": 60, "temperature": 0}
    answer = client.chat.completions.create(**fields)
    text, finishes, usages = "", [], []
    with client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            if chunk.usage is not None:
                usages.append(chunk.usage)
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if choice.finish_reason:
                    finishes.append(choice.finish_reason)
    assert text == answer.choices[0].message.content
    assert finishes == [answer.choices[0].finish_reason]
    [usage] = usages
    assert usage.completion_tokens == answer.usage.completion_tokens


def test_chat_stream_helper(client, model):
    with client.chat.completions.stream(model=model, messages=[USER], max_tokens=40) as stream:
        kinds = {event.type for event in stream}
    assert "chunk" in kinds and "content.done" in kinds
    assert stream.get_final_completion().choices[0].message.content is not None


def test_reasoning(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[USER],
        max_tokens=200,
        temperature=0,
        extra_body={"chat_template_kwargs": {"thinking_mode": "enabled"}},
    )
    message = answer.choices[0].message
    assert message.reasoning_content
    assert message.reasoning == message.reasoning_content
    assert "mm:think" not in (message.content or "") + message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_tools(client, model, choice):
    fields = {
        "model": model,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "tool_choice": choice,
        "max_tokens": 100,
        "temperature": 0,
    }
    [found] = client.chat.completions.create(**fields).choices
    # The call of a function that was named is no reason of its own, as at OpenAI.
    assert found.finish_reason == ("tool_calls" if choice == "required" else "stop")
    call = found.message.tool_calls[0]
    assert call.type == "function" and call.id
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments), dict)

    name, arguments = "", ""
    for chunk in client.chat.completions.create(**fields, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.index == 0:
                name += delta.function.name or ""
                arguments += delta.function.arguments or ""
    assert (name, arguments) == ("get_weather", call.function.arguments)

    answered = client.chat.completions.create(
        model=model,
        messages=[
            *fields["messages"],
            found.message,
            {"role": "tool", "tool_call_id": call.id, "content": "sunny, 20 degrees"},
        ],
        tools=[TOOL],
        max_tokens=50,
    )
    assert answered.choices[0].finish_reason


def test_three_answers_with_logprobs(client, model):
    answer = client.chat.completions.create(
        model=model,
        messages=[USER],
        n=3,
        seed=5,
        logprobs=True,
        top_logprobs=2,
        max_tokens=8,
        reasoning_effort="none",
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        tokens = choice.logprobs.content
        assert 0 < len(tokens) <= 8
        for token in tokens:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
            assert bytes(token.bytes).decode(errors="replace") == token.token


def test_completions(client, model):
    answer = client.completions.create(
        model=model, prompt=["One, two,", "A, b,"], max_tokens=5, n=2, temperature=0, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs.tokens for choice in answer.choices)
    echoed = client.completions.create(model=model, prompt="One, two,", max_tokens=5, echo=True)
    assert echoed.choices[0].text.startswith("One, two,")
    pieces = client.completions.create(
        model=model, prompt="One, two,", max_tokens=5, temperature=0, stream=True
    )
    text = "".join(choice.text for piece in pieces for choice in piece.choices)
    assert text == answer.choices[0].text


def test_speculation_of_one_request(client, model):
    def report(num_draft_tokens: int | None) -> dict[str, object]:
        answer = client.chat.completions.create(
            model=model,
            messages=[USER],
            n=2,
            max_tokens=30,
            temperature=0,
            extra_body={"speculation": {"num_draft_tokens": num_draft_tokens, "report": True}},
        )
        return answer.metrics["speculative_decoding"]

    assert report(0)["num_spec_steps"] == 0
    found = report(None)
    assert len(found["per_choice"]) == 2
    assert found["mean_acceptance_length"] >= 1


def test_responses(client, model):
    answer = client.responses.create(
        model=model, input="What is 2 + 2?", instructions="Be brief.", max_output_tokens=60
    )
    assert answer.status in ("completed", "incomplete")
    assert answer.output[-1].type in ("message", "reasoning")
    assert isinstance(answer.output_text, str)
    text, last = "", None
    for event in client.responses.create(
        model=model, input=[USER], temperature=0, max_output_tokens=60, stream=True
    ):
        if event.type == "response.output_text.delta":
            text += event.delta
        last = event
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == text


def test_responses_functions(client, model):
    tool = {"type": "function", **WEATHER, "strict": False}
    answer = client.responses.create(
        model=model,
        input="What is the weather in Paris?",
        tools=[tool],
        tool_choice={"type": "function", "name": "get_weather"},
        max_output_tokens=100,
        temperature=0,
    )
    call = answer.output[0]
    assert call.type == "function_call" and call.name == "get_weather"
    assert isinstance(json.loads(call.arguments), dict)
    more = client.responses.create(
        model=model,
        input=[
            {"role": "user", "content": "What is the weather in Paris?"},
            *[item.model_dump(exclude_none=True) for item in answer.output],
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
        tools=[tool],
        max_output_tokens=50,
    )
    assert more.status in ("completed", "incomplete")


def test_errors_name_the_field(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=model, messages=[USER], response_format={"type": "json_object"}
        )
    assert caught.value.param == "response_format"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[USER], extra_body={"strem": 1})
    assert caught.value.param == "strem"


def test_the_asynchronous_client(base_url, model):
    async def run() -> None:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key=KEY, max_retries=0, http_client=http
        ) as client:

            async def text() -> str:
                stream = await client.chat.completions.create(
                    model=model, messages=[USER], max_tokens=20, temperature=0, stream=True
                )
                pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
                return "".join(pieces)

            texts = await asyncio.gather(*(text() for _ in range(8)))
            assert len(set(texts)) == 1
            answer = await client.responses.create(model=model, input="hi", max_output_tokens=9)
            assert answer.usage.output_tokens > 0
            # Leaving early must not hurt those who stay.
            leaving = await client.chat.completions.create(
                model=model, messages=[USER], max_tokens=200, stream=True
            )
            await leaving.__aiter__().__anext__()
            await leaving.close()
            assert await text() == texts[0]

    asyncio.run(run())
