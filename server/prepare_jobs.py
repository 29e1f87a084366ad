"""What the HTTP process asks of its preparation processes, and what it is told.

Typed values, as msgspec bytes, one frame each (eaglerun.server.link).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from eaglerun.server.failures import ApiError
from eaglerun.server.parsers.reasoning import Start
from eaglerun.server.prepared import Prompt, Reduced
from eaglerun.server.settings import Settings


class Load(Struct):
    """What to prepare for: a checkpoint's directory, and the engine's numbers."""

    path: str
    template_file: str | None
    settings: Settings
    max_model_len: int
    num_draft_tokens: int


class Render(Struct, tag="render"):
    """A conversation, to be rendered and tokenised; arguments as Chat.render takes them."""

    turns: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    forced: tuple[str, ...]
    add_generation_prompt: bool
    template_kwargs: Mapping[str, Any]
    field: str
    mark: str
    start: Start | None


class Encode(Struct, tag="encode"):
    texts: Sequence[str]
    add_special_tokens: bool


class Decode(Struct, tag="decode"):
    ids: tuple[int, ...]
    skip_special_tokens: bool


class Body(Struct, tag="body"):
    """A request's whole body, too large to be parsed on the event loop."""

    path: str
    content: bytes


Job = Render | Encode | Decode | Body


class Rendered(Struct, tag="rendered"):
    prompt: Prompt


class Encoded(Struct, tag="encoded"):
    ids: list[tuple[int, ...]]


class Decoded(Struct, tag="decoded"):
    text: str


class Answered(Struct, tag="answered"):
    """What became of a body: what is left of it, or else the whole answer to it."""

    reduced: Reduced | None = None
    reply: bytes | None = None


class Refusal(Struct, tag="refusal"):
    """An ApiError."""

    status: int
    message: str
    param: str | None
    code: str | None
    headers: dict[str, str] | None

    def error(self) -> ApiError:
        return ApiError(self.status, self.message, self.param, self.code, self.headers)

    @classmethod
    def of(cls, error: ApiError) -> "Refusal":
        headers = None if error.headers is None else dict(error.headers)
        return cls(error.status_code, error.detail, error.param, error.code, headers)


class Broken(Struct, tag="broken"):
    """Something failed that should not; the process's log says what."""


Result = Rendered | Encoded | Decoded | Answered | Refusal | Broken

_encoder = msgspec.msgpack.Encoder()
encode: Callable[[Job | Result], bytes] = _encoder.encode
decode_job: Callable[[bytes | bytearray], Job] = msgspec.msgpack.Decoder(Job).decode
decode_result: Callable[[bytes | bytearray], Result] = msgspec.msgpack.Decoder(Result).decode


def encode_load(load: Load) -> bytes:
    return msgspec.json.encode(load)


def decode_load(content: bytes | bytearray) -> Load:
    return msgspec.json.decode(content, type=Load)
