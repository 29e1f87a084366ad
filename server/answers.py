"""The shapes of answers, for the OpenAPI document. Answers are written without them."""

from typing import Any, Literal

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class PromptDetails(BaseModel):
    cached_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: OutputDetails


class SpeculationReport(BaseModel):
    """vLLM's per-request numbers; mean_acceptance_length = 1 + accepted / steps."""

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: list[int]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int
    num_draft_tokens_per_pos: list[int]
    num_accepted_tokens_per_pos: list[int]
    acceptance_rate_per_pos: list[float]
    per_choice: "list[SpeculationReport] | None" = None


class Metrics(BaseModel):
    speculative_decoding: SpeculationReport


class TracedToken(BaseModel):
    """A token's text and whether it was an accepted draft."""

    text: str
    drafted: bool


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class CalledFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    tokens: list[TracedToken] | None = None


class PromptLogprob(BaseModel):
    """vLLM's entry of one token; rank 1 is the best."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    metrics: Metrics | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: list[int] | None = None
    tokens: list[TracedToken] | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: Metrics | None = None


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "cancelled"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    metrics: Metrics | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "eaglerun"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    prompt: str


EngineState = Literal["ready", "loading", "hung", "dead", "draining", "broken"]


class Readiness(BaseModel):
    """``reason``: why it is not ready."""

    status: EngineState
    reason: str | None = None
    num_running: int
    num_waiting: int


class Version(BaseModel):
    version: str


class SpeculationTotals(BaseModel):
    """Totals since start, by ATOM's names; the distributions are by accepted drafts of a step."""

    enabled: bool
    total_draft_tokens: int
    total_accepted_tokens: int
    acceptance_rate: float
    average_tokens_per_forward: float
    distribution: dict[str, int]
    distribution_percent: dict[str, float]
