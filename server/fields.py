"""Kinds of fields: what one value in a request may be, and what the OpenAPI document says of it.

Ranges of sampling parameters are those of eaglerun.messages.SamplingParams, which checks them.
"""

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, get_args

import orjson
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
MAX_BIAS = 100

Int = Annotated[int, Field(strict=True, ge=-_INT32, le=_INT32)]
Seed = Annotated[int, Field(strict=True, ge=-(2**63), le=2**63 - 1)]
Float = Annotated[float, Field(strict=True)]
Bool = Annotated[bool, Field(strict=True)]
# Ranges are checked by SamplingParams and Limits; these say them to readers of the document.
Temperature = Annotated[Float, Field(json_schema_extra={"minimum": 0, "maximum": 100})]
Share = Annotated[Float, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
PositiveShare = Annotated[Float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]
Factor = Annotated[Float, Field(json_schema_extra={"minimum": 0.01, "maximum": 100})]
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


def neutral(*allowed: object) -> BeforeValidator:
    """Refuses all but null and the values of a field that ask for nothing."""

    def check(value: object) -> object:
        # 1 == True in Python; in JSON they differ.
        if value is not None and not any(
            value == one and type(value) is type(one) for one in allowed
        ):
            shown = " or ".join(orjson.dumps(one).decode() for one in allowed)
            raise unsupported(f"is not supported by this server: only {shown} is accepted")
        return value

    return BeforeValidator(check)


# Clients mark with it what others should cache: nothing here changes by it.
_IGNORED = "cache_control"


class Strict(BaseModel):
    """A JSON object without unknown members. A member that is null is absent."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: object) -> object:
        # One error for all unknown members, where pydantic would make one for each.
        if isinstance(values, Mapping):
            fields, nullable = cls.model_fields, _nullable(cls)
            values = {
                name: value
                for name, value in values.items()
                if (value is not None or name in nullable) and (name != _IGNORED or name in fields)
            }
            unknown = [name for name in values if name not in fields]
            if unknown:
                name = str(unknown[0])[:64]
                raise PydanticCustomError(
                    "unsupported",
                    "is not a field of this API{hint}",
                    {"field": name, "hint": nearest(name, cls.model_fields)},
                )
        return values


@cache
def _nullable(model: type[BaseModel]) -> frozenset[str]:
    """The fields to which null may be given: required ones, which say what is wrong with it, and
    those whose type has it, for there it may mean something else than nothing."""
    return frozenset(
        name
        for name, field in model.model_fields.items()
        if field.is_required() or NoneType in (field.annotation, *get_args(field.annotation))
    )


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
    for key, bias in value.items():
        shown = f'of "{str(key)[:64]}"'
        if not (str(key).isascii() and str(key).isdecimal() and len(str(key)) < 10):
            raise unsupported(f"the key {shown[3:]} is no token id")
        if type(bias) not in (int, float):
            raise unsupported(f"the bias {shown} is no number")
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise unsupported(f"the bias {shown} is not in [-{MAX_BIAS}, {MAX_BIAS}]")
    return {int(key): float(bias) for key, bias in value.items()}


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

# OpenAI's own limits.
MAX_METADATA = 16


def _few(value: object) -> object:
    if isinstance(value, Mapping) and len(value) > MAX_METADATA:
        raise unsupported(f"{len(value)} pairs given, allowed {MAX_METADATA}")
    return value


# OpenAI takes texts alone; others send numbers too.
_MetadataValue = Annotated[str, Field(max_length=512)] | Int | float | bool | None
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], _MetadataValue],
    Field(max_length=MAX_METADATA),
    BeforeValidator(_few),
]
# Whoever asks, in the client's words; the log repeats it.
User = Annotated[str, Field(max_length=512)]

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
        known = ("type", "text", "annotations", "logprobs", _IGNORED)
        extra = [name for name in part if name not in known and part[name] is not None]
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


# The degrees of thinking that clients ask for, as the modes that MiniMax-M3 has.
EFFORTS = {
    "none": "disabled",
    "minimal": "adaptive",
    "low": "adaptive",
    "medium": "adaptive",
    "high": "enabled",
    "xhigh": "enabled",
    "max": "enabled",
}


def _effort(value: object) -> object:
    if not isinstance(value, str) or value not in EFFORTS:
        raise unsupported(f"should be one of {', '.join(EFFORTS)}")
    return value


Effort = Annotated[str, BeforeValidator(_effort), WithJsonSchema({"enum": list(EFFORTS)})]
