"""What clients may send to /v1/responses, and the conversation it means."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from eaglerun.server.fields import (
    Absent,
    AtLeastOne,
    Bool,
    Effort,
    Int,
    NotStrict,
    Strict,
    TextContent,
    ToolName,
    neutral,
    unsupported,
)
from eaglerun.server.protocol import (
    ArgumentsText,
    AssistantMessage,
    CalledFunction,
    CalledName,
    ChatFields,
    InstructionMessage,
    Message,
    ResponseFormat,
    ToolCall,
    ToolMessage,
    UserMessage,
)

UNRESOLVED = (
    '"{id}" cannot be resolved: this server stores no items, so send the item itself in its place'
)


class InputItem(Strict):
    """One item of the input: a message, an earlier call, its output, or earlier reasoning."""

    type: Literal[
        "message", "function_call", "function_call_output", "reasoning", "item_reference"
    ] = "message"
    role: Literal["root", "system", "developer", "user", "assistant"] | None = None
    content: TextContent | None = None
    call_id: str | None = None
    name: CalledName | None = None
    arguments: ArgumentsText | None = None
    output: TextContent | None = None
    summary: TextContent | None = None
    encrypted_content: Absent = None
    # Of items that come back as this server wrote them; they change nothing.
    id: str | None = None
    status: str | None = None

    @model_validator(mode="after")
    def _check_type(self) -> "InputItem":
        # The type of a reference may be left out.
        is_reference = self.id is not None and self.role is None and self.content is None
        if self.type == "item_reference" or (self.type == "message" and is_reference):
            message = {"field": "id", "message": UNRESOLVED.format(id=str(self.id)[:64])}
            raise PydanticCustomError("unsupported", "{message}", message)
        content = "" if self.role == "assistant" else self.content
        needed: dict[str, dict[str, object]] = {
            "message": {"role": self.role, "content": content},
            "function_call": {
                "call_id": self.call_id,
                "name": self.name,
                "arguments": self.arguments,
            },
            "function_call_output": {"call_id": self.call_id, "output": self.output},
            "reasoning": {},
        }
        for name, value in needed[self.type].items():
            if value is None:
                raise unsupported(f"an item of type {self.type} needs {name}")
        return self


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: NotStrict | None = None


class NamedFunctionTool(Strict):
    type: Literal["function"]
    name: ToolName


class TextOptions(Strict):
    format: ResponseFormat | None = None
    verbosity: Annotated[str | None, neutral("medium")] = None


# "auto": as good a summary as there is; here there is none, for the reasoning itself is shown.
Summary = Annotated[str | None, neutral("auto")]


class ReasoningOptions(Strict):
    effort: Effort | None = None
    summary: Summary = None
    generate_summary: Summary = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Bool | None = None


def _items(value: object) -> object:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Input = Annotated[
    list[InputItem],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(_items),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "minItems": 1, "items": {"type": "object"}},
            ]
        }
    ),
]


class ResponsesRequest(ChatFields):
    """POST /v1/responses. Nothing is stored, so nothing earlier can be referred to."""

    input: Input
    instructions: str | None = None
    max_output_tokens: AtLeastOne | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    # The reasoning comes as it is, and may be sent back so.
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    background: Literal[False] | None = None
    # It counts tools that run on the server: there are none.
    max_tool_calls: Int | None = None
    top_logprobs: Annotated[int | None, neutral(0)] = None
    previous_response_id: Absent = None
    conversation: Absent = None
    prompt: Absent = None

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def messages(self) -> list[Message]:
        """The conversation. Calls and reasoning join the assistant's turn they belong to."""
        turns: list[Message] = []
        if self.instructions is not None:
            turns.append(InstructionMessage(role="developer", content=self.instructions))
        reasoning: str | None = None
        for item in self.input:
            if item.type == "reasoning":
                reasoning = (reasoning or "") + (item.content or item.summary or "")
            elif item.type == "function_call" or item.role == "assistant":
                _add_to_assistant(turns, item, reasoning)
                reasoning = None
            else:
                _add_interrupted(turns, reasoning)
                reasoning = None
                turns.append(_other_turn(item))
        _add_interrupted(turns, reasoning)
        return turns


def _add_interrupted(turns: list[Message], reasoning: str | None) -> None:
    """A turn that broke off in its reasoning."""
    if reasoning is not None:
        turns.append(AssistantMessage(role="assistant", content="", reasoning_content=reasoning))


def _other_turn(item: InputItem) -> Message:
    """A turn that is not the assistant's."""
    if item.type == "function_call_output":
        assert item.output is not None and item.call_id is not None
        return ToolMessage(role="tool", content=item.output, tool_call_id=item.call_id)
    assert item.content is not None
    if item.role == "user":
        return UserMessage(role="user", content=item.content)
    assert item.role is not None and item.role != "assistant"
    return InstructionMessage(role=item.role, content=item.content)


def _add_to_assistant(turns: list[Message], item: InputItem, reasoning: str | None) -> None:
    """A message begins a turn; a call joins the assistant's turn before it, if there is one."""
    turn = turns[-1] if turns else None
    if item.type == "message" or not isinstance(turn, AssistantMessage):
        turn = AssistantMessage(role="assistant", content=item.content or "")
        turns.append(turn)
    if reasoning is not None:
        turn.reasoning_content = (turn.reasoning_content or "") + reasoning
    if item.name is not None and item.arguments is not None:
        function = CalledFunction(name=item.name, arguments=item.arguments)
        turn.tool_calls = [*(turn.tool_calls or ()), ToolCall(id=item.call_id, function=function)]
