"""Kinds of fields: what one value in a request may be, and what the OpenAPI document says of it.

Ranges of sampling parameters are those of eaglerun.messages.SamplingParams, which checks them.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from eaglerun.messages import MAX_LOGPROBS
from eaglerun.server.failures import nearest

_INT32 = 2**31 - 1
# Entries of logit_bias looked at; the engine takes fewer.
MAX_BIASES = 1024

Int = Annotated[int, Field(strict=True, ge=-_INT32, le=_INT32)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
# Ranges are checked by SamplingParams and Limits; these say them to readers of the document.
Temperature = Annotated[Float, Field(json_schema_extra={"minimum": 0, "maximum": 100})]
Share = Annotated[Float, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
PositiveShare = Annotated[Float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]
Factor = Annotated[Float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 100})]
Penalty = Annotated[Float, Field(json_schema_extra={"minimum": -2, "maximum": 2})]
Count = Annotated[Int, Field(json_schema_extra={"minimum": 0})]
AtLeastOne = Annotated[Int, Field(json_schema_extra={"minimum": 1})]
NumLogprobs = Annotated[Int, Field(json_schema_extra={"minimum": 0, "maximum": MAX_LOGPROBS})]
TokenIds = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, le=_INT32)]], Field(fail_fast=True)
]


def unsupported(message: str) -> PydanticCustomError:
    """What a validator raises: ``message`` follows the field's name."""
    return PydanticCustomError("unsupported", "{message}", {"message": message})


def _absent(value: object) -> None:
    if value is not None:
        raise unsupported("is not supported by this server")


# Fields of OpenAI's API that this server does not have: null is all they may be.
Absent = Annotated[None, BeforeValidator(_absent)]


class Strict(BaseModel):
    """A JSON object without unknown members."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: object) -> object:
        # One error for all unknown members, where pydantic would make one for each.
        if isinstance(values, Mapping):
            unknown = [name for name in values if name not in cls.model_fields]
            if unknown:
                name = str(unknown[0])[:64]
                raise PydanticCustomError(
                    "unsupported",
                    "is not a field of this API{hint}",
                    {"field": name, "hint": nearest(name, cls.model_fields)},
                )
        return values


def _stop_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(fail_fast=True),
    BeforeValidator(_stop_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}},
            ]
        }
    ),
]


def _bias(value: object) -> object:
    """Token ids as JSON must write them, strings, back to integers."""
    if not isinstance(value, Mapping):
        return value
    if len(value) > MAX_BIASES:
        raise unsupported(f"{len(value)} given, allowed {MAX_BIASES}")
    ids = [int(key) if str(key).isdecimal() and len(str(key)) < 10 else None for key in value]
    if None in ids:
        raise unsupported("keys should be token ids")
    return dict(zip(ids, value.values(), strict=True))


LogitBias = Annotated[
    dict[int, Float],
    BeforeValidator(_bias),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        }
    ),
]


def _prompts(value: object) -> object:
    """One prompt or several, as text or token ids, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise unsupported("should be a string, a list of strings, token ids, or lists of those")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if _is_ids(value):
        return (tuple(value),)
    if all(isinstance(item, list) and _is_ids(item) for item in value):
        return tuple(tuple(item) for item in value)
    raise unsupported("should be a string, a list of strings, token ids, or lists of those")


def _is_ids(value: list[object]) -> bool:
    return all(type(item) is int and 0 <= item <= _INT32 for item in value)


_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_IDS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _INT32},
    "minItems": 1,
}
Prompts = Annotated[
    Any,
    BeforeValidator(_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT_SCHEMA,
                {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1},
                _IDS_SCHEMA,
                {"type": "array", "items": _IDS_SCHEMA, "minItems": 1},
            ]
        }
    ),
]

_TEXT_PARTS = ("text", "input_text", "output_text", "reasoning_text", "summary_text")


def _parts(value: object) -> object:
    """Text parts joined. Anything but text is refused before its content is looked at."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in _TEXT_PARTS:
            if isinstance(kind, str) and kind.isidentifier() and len(kind) < 32:
                raise unsupported(f"parts of type {kind} are not supported, only text")
            raise unsupported("should be text, or a list of parts of type text")
        text = part.get("text")
        extra = [name for name in part if name not in ("type", "text", "annotations", "logprobs")]
        if not isinstance(text, str) or extra:
            raise unsupported("a part of type text has a text and nothing else")
        texts.append(text)
    return "".join(texts)


TextContent = Annotated[
    str,
    BeforeValidator(_parts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {
                            "type": {"enum": list(_TEXT_PARTS)},
                            "text": {"type": "string"},
                        },
                        "required": ["type", "text"],
                    },
                },
            ]
        }
    ),
]

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]


def _not_strict(value: object) -> object:
    if value is True:
        raise unsupported("true needs structured output, which this server does not have yet")
    return value


NotStrict = Annotated[
    Bool, BeforeValidator(_not_strict), WithJsonSchema({"type": "boolean", "const": False})
]


def _effort(value: object) -> object:
    if isinstance(value, str) and value != "none":
        raise unsupported(
            "none turns thinking off; MiniMax-M3 has no degrees of it, only the modes of "
            "chat_template_kwargs.thinking_mode"
        )
    return value


NoEffort = Annotated[Literal["none"], BeforeValidator(_effort), WithJsonSchema({"const": "none"})]
