"""From a checked body to a running answer: prompt, sampling parameters, requests, writer."""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from msgspec import structs

from eaglerun.errors import RequestError
from eaglerun.messages import Request, SamplingParams
from eaglerun.server import answers
from eaglerun.server.chat import Chat, template_values
from eaglerun.server.chat_answer import ChatBody, ChatOptions, ChatStream
from eaglerun.server.client import EngineClient
from eaglerun.server.completion_answer import (
    CompletionBody,
    CompletionOptions,
    CompletionStream,
    EchoedPrompt,
)
from eaglerun.server.failures import RETRY_AFTER, ApiError, new_id, refuse
from eaglerun.server.forced import with_chosen_tool
from eaglerun.server.identity import CLIENT
from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.prepared import PREPARED, Prompt
from eaglerun.server.protocol import (
    ChatCompletionRequest,
    ChatFields,
    CompletionRequest,
    DetokenizeRequest,
    Generation,
    TokenizeRequest,
)
from eaglerun.server.responses_answer import ResponsesBody, ResponsesStream
from eaglerun.server.responses_protocol import ResponsesRequest
from eaglerun.server.settings import Settings
from eaglerun.server.stream import Answer
from eaglerun.server.tool_use import ToolUse, tool_use

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """What the routes work with."""

    client: EngineClient
    settings: Settings
    chat: Chat

    def check_model(self, name: str | None) -> None:
        """404 for a model that is not served here."""
        if name is not None and name not in self.settings.model_names:
            raise ApiError(404, "this server has no model of that name", "model", "model_not_found")

    @property
    def model(self) -> str:
        return self.settings.model_names[0]


async def chat_completion(backend: Backend, body: ChatCompletionRequest) -> Answer:
    """POST /v1/chat/completions."""
    _check(backend, body)
    functions = [tool.function for tool in body.tools or ()]
    choice = body.tool_choice
    named = None if choice is None or isinstance(choice, str) else choice.function.name
    tools = tool_use(
        [function.model_dump(exclude_none=True, exclude={"strict"}) for function in functions],
        choice if isinstance(choice, str) else None,
        named,
        backend.settings.limits.max_tools,
    )
    _check_continuation(body, tools)
    include_usage = _include_usage(body)
    sampling, names = _chat_sampling(body, backend.settings)
    prompt = await backend.chat.prompt(
        body.messages,
        tools.for_template,
        forced=tools.forced,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        template_kwargs=template_values(
            body.chat_template_kwargs,
            backend.settings,
            thinking=body.thinking.type if body.thinking else None,
            effort=body.reasoning_effort,
        ),
    )
    id_ = f"chatcmpl-{new_id()}"
    prompt, request = await _request(backend, body, id_, prompt, sampling, names)
    options = _chat_options(
        backend,
        body,
        request,
        prompt,
        tools,
        num_top_logprobs=sampling.logprobs,
        include_usage=include_usage,
        continuous_usage=_continuous_usage(body),
        trace=body.speculation.tokens,
        return_token_ids=bool(body.return_token_ids),
    )
    writer = ChatStream(options) if body.stream else ChatBody(options)
    return Answer(backend.client, [request], writer, names)


async def response(backend: Backend, body: ResponsesRequest) -> Answer:
    """POST /v1/responses."""
    _check(backend, body)
    if body.speculation.tokens:
        raise refuse("speculation.tokens", "is there for chat and completions only")
    choice = body.tool_choice
    tools = tool_use(
        [
            tool.model_dump(exclude_none=True, exclude={"strict", "type"})
            for tool in body.tools or ()
        ],
        choice if isinstance(choice, str) else None,
        None if choice is None or isinstance(choice, str) else choice.name,
        backend.settings.limits.max_tools,
    )
    names = {"prompt": "input", "max_tokens": "max_output_tokens"}
    with _named(names):
        sampling = body.params(
            backend.settings, n=1, max_tokens=body.max_output_tokens, logprobs=None
        )
    prompt = await backend.chat.prompt(
        body.messages(),
        tools.for_template,
        forced=tools.forced,
        template_kwargs=template_values(
            body.chat_template_kwargs,
            backend.settings,
            thinking=body.thinking.type if body.thinking else None,
            effort=body.effort,
            effort_field="reasoning.effort",
        ),
        field="input",
    )
    id_ = f"resp_{new_id()}"
    prompt, request = await _request(backend, body, id_, prompt, sampling, names)
    options = _chat_options(backend, body, request, prompt, tools)
    echo = _response_echo(body, sampling)
    writer = ResponsesStream(options, echo) if body.stream else ResponsesBody(options, echo)
    return Answer(backend.client, [request], writer, names)


async def completion(backend: Backend, body: CompletionRequest) -> Answer:
    """POST /v1/completions: every prompt is a request of its own."""
    _check(backend, body)
    if len(body.prompts) > backend.settings.limits.max_prompts:
        allowed = backend.settings.limits.max_prompts
        raise refuse("prompt", f"{len(body.prompts)} prompts, allowed {allowed}")
    if body.stream and body.echo and body.logprobs is not None:
        raise refuse("echo", "with logprobs cannot be streamed")
    sampling = _completion_sampling(body, backend.settings)
    names: dict[str, str] = {}
    prompts = [
        (text, _truncated(backend, body, ids, sampling))
        for text, ids in await _tokenised(backend, body)
    ]
    if body.truncate_prompt_tokens is not None and body.echo:
        prompts = [(await backend.chat.decode(ids, True), ids) for _, ids in prompts]
    id_ = f"cmpl-{new_id()}"
    options = CompletionOptions(
        id=id_,
        created=int(time.time()),
        model=backend.model,
        prompts={
            f"{id_}-{i}": EchoedPrompt(i * sampling.n, text, ids)
            for i, (text, ids) in enumerate(prompts)
        },
        n=sampling.n,
        vocabulary=backend.chat.vocabulary,
        num_draft_tokens=_num_draft_tokens(backend, sampling),
        echo=bool(body.echo),
        echo_only=body.max_tokens == 0,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        include_usage=_include_usage(body),
        continuous_usage=_continuous_usage(body),
        report=body.speculation.report,
        trace=body.speculation.tokens,
    )
    requests = [
        _checked(backend, body, request_id, prompt.token_ids, sampling, names)
        for request_id, prompt in options.prompts.items()
    ]
    writer = CompletionStream(options) if body.stream else CompletionBody(options)
    return Answer(backend.client, requests, writer, names)


def _check(backend: Backend, body: Generation) -> None:
    """What can be refused before any work."""
    backend.check_model(body.model)
    status = backend.client.status()
    if not status.ready:
        raise ApiError(503, "the model is not ready", headers=RETRY_AFTER)
    if body.priority and not CLIENT.get().may_prioritise:
        raise refuse("priority", "is not open to this client; the operator may (--allow-priority)")
    wish, most = body.speculation.num_draft_tokens, status.num_draft_tokens
    if wish is not None and wish > most:
        raise refuse("speculation.num_draft_tokens", f"{wish} given, this server drafts {most}")


def _chat_sampling(
    body: ChatCompletionRequest, settings: Settings
) -> tuple[SamplingParams, dict[str, str]]:
    """Sampling parameters, and the request's names of those that it calls otherwise."""
    if body.top_logprobs and not body.logprobs:
        raise refuse("top_logprobs", "needs logprobs to be true")
    _check_prompt_logprobs(body)
    names = {"prompt": "messages", "logprobs": "top_logprobs"}
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    elif body.max_tokens not in (None, max_tokens):
        raise refuse("max_tokens", "differs from max_completion_tokens")
    else:
        names["max_tokens"] = "max_completion_tokens"
    with _named(names):
        sampling = body.params(
            settings,
            n=_n(body.n),
            max_tokens=max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            prompt_logprobs=body.prompt_logprobs,
        )
    return sampling, names


def _completion_sampling(body: CompletionRequest, settings: Settings) -> SamplingParams:
    """Sampling parameters; an echo alone still makes one token, which its answer leaves out."""
    if body.best_of not in (None, _n(body.n)):
        raise refuse("best_of", f"{body.best_of} is not supported: only as many as n are made")
    if body.max_tokens == 0 and not body.echo:
        raise refuse("max_tokens", "0 needs echo to be true, for there would be no answer")
    _check_prompt_logprobs(body)
    sampling = body.params(
        settings,
        n=_n(body.n),
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    if body.echo and body.logprobs is not None:
        most = max(sampling.logprobs or 0, sampling.prompt_logprobs or 0)
        sampling = replace(sampling, prompt_logprobs=most)
    return sampling


def _check_continuation(body: ChatCompletionRequest, tools: ToolUse) -> None:
    """Which turn the answer belongs to."""
    if body.continue_final_message and body.add_generation_prompt:
        if "add_generation_prompt" in body.model_fields_set:
            raise refuse("add_generation_prompt", "contradicts continue_final_message")
    begins_turn = body.add_generation_prompt and not body.continue_final_message
    if tools.forced and not begins_turn:
        raise refuse("tool_choice", "a call can be forced at the beginning of a turn only")


def _check_prompt_logprobs(body: ChatCompletionRequest | CompletionRequest) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise refuse("prompt_logprobs", "cannot be streamed")


@contextmanager
def _named(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of sampling parameters, by the route's names of the fields."""
    try:
        yield
    except RequestError as error:
        # Only this one is named in messages about other fields.
        message = error.message.replace("max_tokens", names.get("max_tokens", "max_tokens"))
        raise RequestError(names.get(error.field, error.field), message) from error


def _truncated(
    backend: Backend,
    body: Generation,
    token_ids: tuple[int, ...],
    sampling: SamplingParams,
    more: int = 0,
) -> tuple[int, ...]:
    """The prompt, without what truncate_prompt_tokens cuts off its beginning.

    ``more`` tokens may come to it.
    """
    most = body.truncate_prompt_tokens
    if most is None:
        return token_ids
    if most == 0 or most < -1:
        raise refuse("truncate_prompt_tokens", f"{most} given, allowed are -1 and from 1 on")
    if most == -1:
        limit = backend.client.status().max_model_len
        most = max(1, limit - more - (sampling.max_tokens or 1))
    return token_ids[-most:]


async def _request(
    backend: Backend,
    body: Generation,
    id_: str,
    prompt: Prompt,
    sampling: SamplingParams,
    names: Mapping[str, str],
) -> tuple[Prompt, Request]:
    """The engine's request, and the prompt with the tool that it calls, if it is forced to."""
    longest = max((len(ids) for _, ids in prompt.tails), default=0)
    token_ids = _truncated(backend, body, prompt.token_ids, sampling, longest)
    prompt = structs.replace(prompt, token_ids=token_ids)
    request = _checked(backend, body, id_, token_ids, sampling, names, longest)
    if prompt.tails:
        with _named(names):
            prompt = await with_chosen_tool(backend.client, prompt, request)
        request = replace(request, prompt_ids=prompt.token_ids)
    return prompt, request


def _checked(
    backend: Backend,
    body: Generation,
    id_: str,
    token_ids: tuple[int, ...],
    sampling: SamplingParams,
    names: Mapping[str, str],
    more: int = 0,
) -> Request:
    """The engine's request. A prompt and answer that cannot fit are refused here.

    ``more`` tokens may come to the prompt.
    """
    limit = backend.client.status().max_model_len
    wanted = len(token_ids) + more + (sampling.max_tokens or 1)
    if wanted > limit:
        raise refuse(
            names.get("prompt", "prompt"),
            f"{len(token_ids)} tokens and an answer of up to {sampling.max_tokens or 1} exceed "
            f"the model's length of {limit}",
            "context_length_exceeded",
        )
    if backend.settings.log_prompts:
        text = backend.chat.vocabulary.decode(token_ids, skip_special_tokens=False)
        log.info("%s: user %r, prompt %r, %s", id_, body.user, text, sampling)
    else:
        log.debug("%s: user %r, %d prompt tokens", id_, body.user, len(token_ids))
    client = CLIENT.get()
    # A client's own salt cannot be another's name.
    salt = f"{client.salt}:{body.cache_salt}" if client.salt else body.cache_salt
    return Request(id_, token_ids, sampling, body.priority, salt)


def _chat_options(
    backend: Backend,
    body: ChatFields,
    request: Request,
    prompt: Prompt,
    tools: ToolUse,
    *,
    num_top_logprobs: int | None = None,
    include_usage: bool = False,
    continuous_usage: bool = False,
    trace: bool = False,
    return_token_ids: bool = False,
) -> ChatOptions:
    max_calls = 1 if body.parallel_tool_calls is False else None

    def new_parser() -> OutputParser:
        return OutputParser(
            start=prompt.start,
            tools=tools.schemas,
            max_calls=max_calls,
            forced=prompt.forced,
        )

    return ChatOptions(
        id=request.request_id,
        created=int(time.time()),
        model=backend.model,
        n=request.sampling.n,
        new_parser=new_parser,
        vocabulary=backend.chat.vocabulary,
        prompt_ids=request.prompt_ids,
        num_draft_tokens=_num_draft_tokens(backend, request.sampling),
        is_named_call=tools.is_named,
        num_top_logprobs=num_top_logprobs,
        skip_special_tokens=request.sampling.skip_special_tokens,
        prompt_logprobs=request.sampling.prompt_logprobs,
        return_token_ids=return_token_ids,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        include_reasoning=body.include_reasoning,
        report=body.speculation.report,
        trace=trace,
    )


def _num_draft_tokens(backend: Backend, sampling: SamplingParams) -> int:
    most = backend.client.status().num_draft_tokens
    return most if sampling.num_draft_tokens is None else sampling.num_draft_tokens


async def _tokenised(
    backend: Backend, body: CompletionRequest
) -> list[tuple[str, tuple[int, ...]]]:
    """Text and ids of every prompt; of prompts given as ids the text only if it is echoed."""
    prepared = PREPARED.get()
    if prepared is not None and prepared.prompts is not None:
        return prepared.prompts
    chat, limit = backend.chat, backend.client.status().max_model_len
    texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
    if texts:
        ids = await chat.encode(texts, body.add_special_tokens)
        return list(zip(texts, ids, strict=True))
    found = []
    for prompt in body.prompts:
        assert not isinstance(prompt, str)
        if max(prompt[:limit], default=-1) >= chat.vocabulary.size:
            raise refuse("prompt", f"token ids must be below {chat.vocabulary.size}")
        text = await chat.decode(prompt[:limit], True) if body.echo else ""
        found.append((text, prompt))
    return found


async def tokenize(backend: Backend, body: TokenizeRequest) -> answers.Tokenized:
    """POST /tokenize."""
    chat = backend.chat
    backend.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise refuse("prompt", "give either a prompt or messages")
    if body.messages is not None:
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        prompt = await chat.prompt(
            body.messages,
            tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs=template_values(body.chat_template_kwargs, backend.settings),
        )
        ids = prompt.token_ids
    else:
        [ids] = await chat.encode([body.prompt or ""], body.add_special_tokens is not False)
    pieces = chat.vocabulary.piece_text
    return answers.Tokenized(
        count=len(ids),
        max_model_len=backend.client.status().max_model_len,
        tokens=list(ids),
        token_strs=[pieces(id_) for id_ in ids] if body.return_token_strs else None,
    )


async def detokenize(backend: Backend, body: DetokenizeRequest) -> answers.Detokenized:
    """POST /detokenize."""
    chat = backend.chat
    backend.check_model(body.model)
    limit = backend.client.status().max_model_len
    if len(body.tokens) > limit:
        raise refuse("tokens", f"{len(body.tokens)} given, the model's length is {limit}")
    if max(body.tokens, default=-1) >= chat.vocabulary.size:
        raise refuse("tokens", f"ids must be below {chat.vocabulary.size}")
    return answers.Detokenized(
        prompt=await chat.decode(tuple(body.tokens), body.skip_special_tokens)
    )


def _include_usage(body: ChatCompletionRequest | CompletionRequest) -> bool:
    wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
    if wanted and not body.stream:
        raise refuse("stream_options", "needs stream to be true")
    return wanted


def _continuous_usage(body: ChatCompletionRequest | CompletionRequest) -> bool:
    """True if every chunk is to say what was used so far; that goes with usage at the end."""
    options = body.stream_options
    return _include_usage(body) and bool(options and options.continuous_usage_stats)


def _n(n: int | None) -> int:
    return 1 if n is None else n


def _response_echo(body: ResponsesRequest, sampling: SamplingParams) -> Mapping[str, Any]:
    """The fields of a response object that repeat the request."""
    dumped = body.model_dump(mode="json", include={"tools", "tool_choice", "metadata"})
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": dumped["metadata"] or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": body.effort, "summary": None},
        "store": False,
        "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": dumped["tool_choice"] or "auto",
        "tools": dumped["tools"] or [],
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "background": False,
        "user": body.user,
    }
