"""What clients may send to the chat, completion and token routes.

A field that would change the answer and is not honoured is refused by name. One that changes
nothing by its meaning is accepted, and so is any that is null or has its default.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from eaglerun.messages import MAX_DRAFT_TOKENS, SamplingParams
from eaglerun.server.failures import refuse
from eaglerun.server.fields import (
    Absent,
    AtLeastOne,
    Bool,
    Count,
    Effort,
    Factor,
    Int,
    LogitBias,
    Metadata,
    NotStrict,
    NumLogprobs,
    Penalty,
    PositiveShare,
    Prompts,
    Seed,
    Share,
    Stop,
    Strict,
    Temperature,
    TextContent,
    TokenIds,
    ToolName,
    User,
    neutral,
    unsupported,
)
from eaglerun.server.settings import Settings

_T = TypeVar("_T")


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value


class Speculation(Strict):
    """Speculation for one request.

    num_draft_tokens  at most so many drafts a step; 0 turns it off; null: as the engine does
    report            put metrics.speculative_decoding in the answer
    tokens            say of every token whether it was an accepted draft
    """

    num_draft_tokens: Annotated[int, Field(strict=True, ge=0, le=MAX_DRAFT_TOKENS)] | None = None
    report: Bool = False
    tokens: Bool = False


class StreamOptions(Strict):
    """``continuous_usage_stats``: usage so far in every chunk, where usage is asked for.

    ``include_obfuscation`` would pad the chunks, which are of no secret length here.
    """

    include_usage: Bool | None = None
    continuous_usage_stats: Bool | None = None
    include_obfuscation: Bool | None = None


# Fields that may only be as they are when they are left out.
OnlyFalse = Annotated[bool | None, neutral(False)]
OnlyTrue = Annotated[bool | None, neutral(True)]
OnlyOne = Annotated[float | None, neutral(1, 1.0)]
OnlyEmpty = Annotated[list[Any] | None, neutral([])]


class Generation(Strict):
    """What all routes that generate have in common.

    ``truncate_prompt_tokens``: only so many of the prompt's last tokens; -1: as many as fit.
    """

    model: str | None = None
    stream: Bool | None = None
    temperature: Temperature | None = None
    top_p: PositiveShare | None = None
    top_k: Annotated[Int, Field(json_schema_extra={"minimum": -1})] | None = None
    min_p: Share | None = None
    repetition_penalty: Factor | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: Bool = False
    min_tokens: Count | None = None
    ignore_eos: Bool = False
    skip_special_tokens: Bool = True
    logit_bias: LogitBias | None = None
    priority: Int = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    speculation: Speculation = Speculation()
    truncate_prompt_tokens: Annotated[Int, Field(json_schema_extra={"minimum": -1})] | None = None
    # No effect by their meaning: who asks, and what others keep or charge.
    user: User | None = None
    metadata: Metadata | None = None
    store: Bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    # Not honoured: their defaults only.
    allowed_token_ids: Absent = None
    bad_words: OnlyEmpty = None
    use_beam_search: OnlyFalse = None
    length_penalty: OnlyOne = None
    detokenize: OnlyTrue = None
    spaces_between_special_tokens: OnlyTrue = None
    return_tokens_as_token_ids: OnlyFalse = None

    def params(
        self,
        settings: Settings,
        *,
        n: int,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
    ) -> SamplingParams:
        """Sampling parameters, with the checkpoint's own where the request has none.

        Raises RequestError and ApiError, which name the field.
        """
        limits, defaults = settings.limits, settings.sampling
        stop = tuple(self.stop or ())
        if len(stop) > limits.max_stop:
            raise refuse("stop", f"{len(stop)} given, allowed {limits.max_stop}")
        if any(len(text) > limits.max_stop_chars for text in stop):
            raise refuse("stop", f"longer than {limits.max_stop_chars} characters")
        if n > limits.max_n:
            raise refuse("n", f"{n} given, allowed {limits.max_n}")

        return SamplingParams(
            temperature=_given(self.temperature, defaults.temperature),
            top_p=_given(self.top_p, defaults.top_p),
            top_k=_given(self.top_k, defaults.top_k),
            min_p=_given(self.min_p, defaults.min_p),
            repetition_penalty=_given(self.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_given(self.presence_penalty, 0.0),
            frequency_penalty=_given(self.frequency_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=_given(self.min_tokens, 0),
            stop=stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop_str_in_output=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            n=n,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            num_draft_tokens=self.speculation.num_draft_tokens,
        )


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Prompts
    # 0 asks for the echo alone.
    max_tokens: Count | None = 16
    n: AtLeastOne | None = None
    best_of: AtLeastOne | None = None
    echo: Bool | None = None
    logprobs: NumLogprobs | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: Bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: Bool = True
    suffix: Annotated[str | None, neutral("")] = None

    @property
    def prompts(self) -> tuple[str | tuple[int, ...], ...]:
        prompts: tuple[str | tuple[int, ...], ...] = self.prompt
        return prompts


def _arguments_text(value: object) -> object:
    """Arguments as the text that they should be; some clients send the object itself."""
    if value is None:
        return ""
    return value if isinstance(value, str) else orjson.dumps(value).decode()


ArgumentsText = Annotated[
    str,
    BeforeValidator(_arguments_text),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}),
]


# The name of a call in a history: the model may have called what does not exist.
CalledName = Annotated[str, Field(min_length=1, max_length=512)]


class CalledFunction(Strict):
    name: CalledName
    arguments: ArgumentsText = ""


class ToolCall(Strict):
    """A call in an earlier answer. Its arguments should be a JSON object as text, and need not be:
    a call that was cut off comes back in every later turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Int | None = None


# What lm-eval writes into every message besides its role and content; it says nothing.
MessageType = Literal["text", "message"] | None


class InstructionMessage(Strict):
    """What the answer must heed. ``root`` is MiniMax-M3's role above the developer's."""

    role: Literal["root", "system", "developer"]
    content: TextContent
    name: str | None = None
    type: MessageType = None


class UserMessage(Strict):
    role: Literal["user"]
    content: TextContent
    name: str | None = None
    type: MessageType = None


class AssistantMessage(Strict):
    """An earlier answer, also as this API gave it, and one that was interrupted before a word.

    ``reasoning`` is another name of ``reasoning_content``; an answer has both.
    """

    role: Literal["assistant"]
    content: TextContent | None = None
    name: str | None = None
    type: MessageType = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    refusal: Absent = None
    audio: Absent = None
    function_call: Absent = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _one_reasoning(self) -> "AssistantMessage":
        if self.reasoning is not None:
            if self.reasoning_content not in (None, self.reasoning):
                message = {"field": "reasoning", "message": "differs from reasoning_content"}
                raise PydanticCustomError("unsupported", "{message}", message)
            self.reasoning_content = self.reasoning
        return self


class ToolMessage(Strict):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: str
    name: str | None = None
    type: MessageType = None


_ROLES = ("root", "system", "developer", "user", "assistant", "tool")


def _known_role(value: object) -> object:
    if isinstance(value, Mapping) and value.get("role") not in _ROLES:
        message = {"field": "role", "message": f"should be one of {', '.join(_ROLES)}"}
        raise PydanticCustomError("unsupported", "{message}", message)
    return value


Message = Annotated[
    InstructionMessage | UserMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
    BeforeValidator(_known_role),
]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Function(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: NotStrict | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: ToolName


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


def _only_text(value: object) -> object:
    if isinstance(value, Mapping) and value.get("type") in ("json_object", "json_schema"):
        raise unsupported("only text is supported: this server has no structured output yet")
    return value


class TextFormat(Strict):
    type: Literal["text"]


ResponseFormat = Annotated[TextFormat, BeforeValidator(_only_text)]


def _choice(value: object) -> object:
    if isinstance(value, str) and value not in ("none", "auto", "required"):
        raise unsupported("should be none, auto, required or the name of a function, as an object")
    return value


ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, BeforeValidator(_choice)]


TemplateKwargs = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "properties": {
                "thinking_mode": {"enum": ["enabled", "disabled", "adaptive"]},
                "enable_thinking": {"type": "boolean"},
            },
        }
    ),
]


class Thinking(Strict):
    """MiniMax's own way to say what chat_template_kwargs.thinking_mode says."""

    type: Literal["enabled", "disabled", "adaptive"]


class ChatFields(Generation):
    """What /v1/chat/completions and /v1/responses share beyond sampling."""

    parallel_tool_calls: Bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    thinking: Thinking | None = None
    include_reasoning: Bool = True


class ChatCompletionRequest(ChatFields):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    n: AtLeastOne | None = None
    logprobs: Bool | None = None
    top_logprobs: NumLogprobs | None = None
    stream_options: StreamOptions | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: Bool | None = None
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    verbosity: Annotated[str | None, neutral("medium")] = None
    # A guess at the answer, which makes it faster elsewhere.
    prediction: dict[str, Any] | None = None
    echo: OnlyFalse = None
    audio: Absent = None
    functions: OnlyEmpty = None
    function_call: Annotated[str | None, neutral("none", "auto")] = None
    web_search_options: Absent = None


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or the messages that the chat template turns into one."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True)] | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    add_generation_prompt: Bool = True
    continue_final_message: Bool = False
    add_special_tokens: Bool | None = None
    return_token_strs: Bool = False


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: str | None = None
    tokens: TokenIds
    skip_special_tokens: Bool = False
