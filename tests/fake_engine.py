"""An engine client without an engine: it says what a script says, token by token.

With it come a byte-level tokenizer with MiniMax-M3's markers, a chat template in M3's layout, and
a driver that calls an ASGI application as a server would.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from eaglerun.errors import CapacityError, RequestError
from eaglerun.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    SpeculationStats,
    TokenLogprobs,
    Tokens,
)
from eaglerun.plan.text import TextStream
from eaglerun.server.app import create_app
from eaglerun.server.chat import Chat
from eaglerun.server.client import EngineClient, EngineStatus
from eaglerun.server.settings import Settings
from eaglerun.server.template import ChatTemplate
from eaglerun.server.vocabulary import Vocabulary
from eaglerun.stats import AcceptanceCounter

MODEL = "tiny/fake-m3"
SPECIAL = ("]~!b[", "]~b]", "[e~[")
MARKERS = ("]<]minimax[>[", "<mm:think>", "</mm:think>")

# The layout of MiniMax-M3: identity and thinking mode, developer's text and tools, then the turns.
TEMPLATE = """\
{%- set ns = ']<]minimax[>[' -%}
{%- set mode = thinking_mode if thinking_mode is defined else 'adaptive' -%}
{{- bos_token + ']~b]system\\nI am a test. Current thinking mode: ' + mode + '.[e~[\\n' -}}
{{- ']~b]developer' -}}
{%- for message in messages if message.role in ('system', 'developer') -%}
    {{- '\\n' + message.content -}}
{%- endfor -%}
{%- for tool in tools or [] -%}
    {{- '\\n<tool>' + (tool.function | tojson) + '</tool>' -}}
{%- endfor -%}
{{- '[e~[\\n' -}}
{%- for message in messages if message.role not in ('system', 'developer') -%}
    {%- if message.role == 'root' -%}{{- raise_exception('no root here') -}}{%- endif -%}
    {{- ']~b]' + ('ai' if message.role == 'assistant' else message.role) + '\\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- if message.reasoning_content -%}
            {{- '<mm:think>' + message.reasoning_content -}}
        {%- endif -%}
        {{- '</mm:think>' -}}
    {%- endif -%}
    {{- message.content or '' -}}
    {%- for call in message.tool_calls or [] -%}
        {{- ns + '<tool_call>' + ns + '<invoke name="' + call.function.name + '">' -}}
        {%- for name, value in call.function.arguments.items() -%}
            {{- ns + '<' + name + '>' + value + ns + '</' + name + '>' -}}
        {%- endfor -%}
        {{- ns + '</invoke>' + ns + '</tool_call>' -}}
    {%- endfor -%}
    {{- '[e~[\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ']~b]ai\\n' -}}
    {{- {'enabled': '<mm:think>', 'disabled': '</mm:think>'}.get(mode, '') -}}
{%- endif -%}"""


def make_tokenizer() -> Tokenizer:
    """256 bytes, then M3's special tokens, then its markers, which are not special."""
    vocabulary = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False) for text in MARKERS])
    return tokenizer


TOKENIZER = make_tokenizer()
EOS = TOKENIZER.token_to_id("[e~[")


@dataclass(frozen=True)
class Script:
    """What the engine says to a request.

    answer  text of sequence ``index``; the end of it is EOS
    groups  tokens of the successive events (the last repeats); of g > 1 the last was no draft
    fail    break off with Failed after so many events
    gate    if given, every event waits for a permit of this semaphore
    burst   all events of a sequence are ready at once
    """

    answer: Callable[[Request, int], str] = lambda request, index: f"answer {index}"
    groups: tuple[int, ...] = (1, 3, 2)
    fail: int | None = None
    gate: asyncio.Semaphore | None = None
    burst: bool = False


@dataclass
class FakeEngine:
    """An EngineClient. ``requests`` and ``aborted`` record what was asked of it."""

    script: Script = field(default_factory=Script)
    refusal: Exception | None = None
    num_draft_tokens: int = 3
    max_model_len: int = 4096
    ready: bool = True
    alive: bool = True
    hung: bool = False
    draining: bool = False
    stage: str = ""
    is_full: bool = False
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def check_room(self, answers: int = 1, tokens: int = 1) -> None:
        if self.is_full:
            raise CapacityError("the queue is full")

    async def submit(self, request: Request) -> "FakeEvents":
        if self.refusal is not None:
            raise self.refusal
        if not request.prompt_ids:
            raise RequestError("prompt", "is empty")
        self.requests.append(request)
        return FakeEvents(self, request)

    def status(self) -> EngineStatus:
        return EngineStatus(
            ready=self.ready,
            alive=self.alive,
            hung=self.hung,
            draining=self.draining,
            stage=self.stage,
            last_step_age_s=0.0,
            num_running=0,
            num_waiting=0,
            kv_usage=0.0,
            model_name=MODEL,
            max_model_len=self.max_model_len,
            num_draft_tokens=self.num_draft_tokens,
            config_toml='[model]\nmodel = "demo"\n',
        )

    def speculation(self) -> SpeculationStats:
        counter = AcceptanceCounter()
        counter.add(3, 3)
        counter.add(3, 1)
        return counter.stats()


class Stage:
    """An application is slow to make: this one asks whichever engine stands on the stage."""

    def __init__(self) -> None:
        self._engine = FakeEngine()
        self._app = make_app(self, priority_keys=("all",))

    def post(self, engine: FakeEngine, path: str, body: object) -> "Reply":
        self._engine = engine
        return post(self._app, path, body)

    def get(self, path: str) -> "Reply":
        return get(self._app, path)

    async def submit(self, request: Request) -> "FakeEvents":
        return await self._engine.submit(request)

    def check_room(self, answers: int = 1, tokens: int = 1) -> None:
        self._engine.check_room(answers, tokens)

    def status(self) -> EngineStatus:
        return self._engine.status()

    def speculation(self) -> SpeculationStats:
        return self._engine.speculation()


class FakeEvents:
    """The events of one request; sequences take turns."""

    def __init__(self, engine: FakeEngine, request: Request) -> None:
        self._engine = engine
        self._request = request
        script = engine.script
        lives = [life(request, i, script) for i in range(request.sampling.n)]
        self._events = list(interleave(lives))
        if script.fail is not None:
            failed = Failed(request.request_id, "the engine died")
            self._events[script.fail :] = [failed]

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        gate = self._engine.script.gate
        if gate is not None:
            await gate.acquire()
        if not self._events:
            raise StopAsyncIteration
        return self._events.pop(0)

    def take_ready(self) -> list[Event]:
        if not self._engine.script.burst:
            return []
        ready, self._events = self._events, []
        return ready

    async def aclose(self) -> None:
        if self._events:
            self._engine.aborted.append(self._request.request_id)
            self._events = []


def interleave(lives: Iterable[list[Event]]) -> Iterable[Event]:
    lives = list(lives)
    for i in range(max(map(len, lives))):
        yield from (life[i] for life in lives if i < len(life))


def life(request: Request, index: int, script: Script) -> list[Event]:
    """The events of one sequence: stop strings, max_tokens and EOS end it as in the engine."""
    sampling, id_ = request.sampling, request.request_id
    text = TextStream(
        TOKENIZER,
        sampling.stop,
        sampling.include_stop_str_in_output,
        sampling.skip_special_tokens,
    )
    ids = [*TOKENIZER.encode(script.answer(request, index), add_special_tokens=False).ids, EOS]
    limit = min(len(ids), sampling.max_tokens or len(ids))
    events: list[Event] = []
    reason, stop_reason = FinishReason.LENGTH, None
    counter = AcceptanceCounter()
    groups = list(script.groups)
    drafts = 8 if sampling.num_draft_tokens is None else sampling.num_draft_tokens
    max_group = max(1, drafts)
    done = 0
    while done < limit and reason is not FinishReason.STOP:
        size = groups.pop(0) if len(groups) > 1 else groups[0]
        size = min(size, limit - done, max_group)
        said, group = "", ids[done : done + size]
        if size > 1:
            counter.add(size, size - 1)
        used = 0
        for token in group:
            used, done = used + 1, done + 1
            if token == EOS:
                reason = FinishReason.STOP
                break
            delta = text.push(token)
            said += delta.text
            if delta.stop is not None:
                reason, stop_reason = FinishReason.STOP, delta.stop
                break
        group = group[:used]
        if reason is FinishReason.STOP and stop_reason is None or done >= limit:
            said += text.finish()
        logprobs = ()
        if sampling.logprobs is not None:
            logprobs = tuple(logprobs_of(token, sampling.logprobs) for token in group)
        events.append(Tokens(id_, index, tuple(group), said, size - 1, logprobs))
    prompt_logprobs = None
    if sampling.prompt_logprobs is not None:
        first, *rest = request.prompt_ids
        prompt_logprobs = (None, *(logprobs_of(t, sampling.prompt_logprobs) for t in rest))
    events.append(
        Finished(
            request_id=id_,
            index=index,
            reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(request.prompt_ids),
            num_output_tokens=done,
            num_cached_tokens=len(request.prompt_ids) // 2,
            seed=sampling.seed or 0,
            speculation=counter.stats(),
            prompt_logprobs=prompt_logprobs,
        )
    )
    return events


def logprobs_of(token: int, num_top: int) -> TokenLogprobs:
    top = tuple(((token + i) % 256, -0.5 - i) for i in range(num_top))
    return TokenLogprobs(token, -0.5, 0, top)


def make_app(
    engine: EngineClient | None = None, template: str = TEMPLATE, **settings: Any
) -> FastAPI:
    made = Settings(**({"model_names": (MODEL,), "created": 1, "version": "0"} | settings))
    chat_template = ChatTemplate(
        template, {"bos_token": "]~!b[", "eos_token": "[e~["}, made.limits.template_seconds
    )
    chat = Chat(Vocabulary(TOKENIZER), chat_template, made.limits)
    return create_app(engine or FakeEngine(), made, chat)


# Calling an application


@dataclass
class Reply:
    """An HTTP answer, and (for tests of streams) the chunks in which its body came."""

    status: int
    headers: dict[str, str]
    chunks: list[bytes]

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        assert error["request_id"] == self.headers["x-request-id"]
        return error

    def events(self) -> list[Any]:
        """The data of server-sent events, "[DONE]" as it is."""
        found = re.findall(rb"^data: (.*)$", self.body, re.MULTILINE)
        return [data.decode() if data == b"[DONE]" else json.loads(data) for data in found]


async def call(
    app: FastAPI,
    method: str,
    path: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    gone: asyncio.Event | None = None,
    chunks: Sequence[bytes] | None = None,
    reply: Reply | None = None,
    client: str = "127.0.0.1",
) -> Reply:
    """One request. ``gone``: the client goes away when it is set. ``chunks``: the raw body.

    ``reply`` is filled as the answer comes, for what must be seen of one that raises.
    """
    if chunks is None:
        chunks = [] if body is None else [json.dumps(body).encode()]
    given = {"content-type": "application/json"} | dict(headers or {})
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        "client": (client, 1),
        "server": ("127.0.0.1", 80),
    }
    parts = list(chunks) or [b""]
    reply = Reply(0, {}, []) if reply is None else reply
    never = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if parts:
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}
        await (gone or never).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            reply.status = message["status"]
            reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif message.get("body"):
            reply.chunks.append(message["body"])

    await app(scope, receive, send)
    return reply


def post(app: FastAPI, path: str, body: object, **more: Any) -> Reply:
    return asyncio.run(call(app, "POST", path, body, **more))


def get(app: FastAPI, path: str, **more: Any) -> Reply:
    return asyncio.run(call(app, "GET", path, **more))
