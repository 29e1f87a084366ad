"""The processes that parse large bodies, render templates and tokenise, away from the event loop.

The HTTP process forks one of them before it has an event loop or a thread: the source. The source
loads the tokenizer and the template, then forks a worker whenever it is asked for one, which costs
milliseconds and shares the memory of what was loaded. A worker does one job at a time; whatever a
client or a template makes of it, the HTTP process can kill it.
"""

import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Coroutine, Generator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import orjson
from msgspec.structs import astuple
from pydantic import BaseModel, ValidationError

from eaglerun.errors import CheckpointError, RequestError
from eaglerun.messages import Request, SpeculationStats
from eaglerun.server import prepare_jobs as jobs
from eaglerun.server.bodies import check_nodes, is_nested
from eaglerun.server.chat import Chat, load_chat
from eaglerun.server.client import EngineStatus, Events
from eaglerun.server.failures import ApiError, as_api_error, refuse, validation_error
from eaglerun.server.generate import (
    Backend,
    chat_completion,
    completion,
    detokenize,
    response,
    tokenize,
)
from eaglerun.server.hosts import AllowedHosts
from eaglerun.server.link import LENGTH_BYTES, frame, length_of, read_exactly, read_frame
from eaglerun.server.prepared import Prompt, Reduced
from eaglerun.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from eaglerun.server.responses_protocol import ResponsesRequest
from eaglerun.server.settings import Limits, Settings
from eaglerun.server.stream import Answer

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LOADED = b"loaded"
SPAWN, KILL = b"spawn", b"kill "
MAX_REASON_BYTES = 1 << 17
# A tokenizer takes seconds at most; a template's constants may take for ever.
LOAD_S = 60.0
# A worker that has taken so much more memory than at its start ends after its job.
RETIRE_BYTES = 256 << 20
_PR_SET_PDEATHSIG = 1

MODELS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


# The source


def run_source(control: socket.socket) -> NoReturn:
    """The life of the forked process; it ends with the HTTP process, or is killed by it."""
    status = 1
    try:
        _die_with_parent()
        # One text at a time is no work for several threads, which would take the memory of many.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _serve_control(control)
        status = 0
    except Exception:
        log.exception("the preparation process failed")
        raise
    finally:
        # Nothing that the parent would do at its end is done here.
        os._exit(status)


def _serve_control(control: socket.socket) -> None:
    load = read_frame(control)
    if load is None:
        return
    try:
        preparer = _load(jobs.decode_load(load))
    except CheckpointError as error:
        control.sendall(frame(str(error).encode()[:MAX_REASON_BYTES]))
        return
    gc.collect()
    gc.freeze()
    control.sendall(frame(LOADED))
    while True:
        # A file comes with a frame's first bytes.
        head, files, _, _ = socket.recv_fds(control, LENGTH_BYTES, 1)
        message = read_exactly(control, length_of(head)) if len(head) == LENGTH_BYTES else None
        if message is None:
            return
        if message == SPAWN:
            control.sendall(frame(str(_spawn(control, files[0], preparer)).encode()))
        elif message.startswith(KILL):
            pid = int(message.removeprefix(KILL))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _load(load: jobs.Load) -> "Preparer":
    """A template's constants are computed when it is compiled, so that has its limits too."""
    _limit_memory(load.settings.limits)
    signal.signal(signal.SIGALRM, _on_alarm)
    try:
        with time_limit(LOAD_S):
            return Preparer.load(load)
    except ApiError:
        what = f"more than {LOAD_S:g} s"
    except MemoryError:
        what = "too much memory"
    raise CheckpointError(f"{load.path}: its tokenizer and chat template take {what} to load")


def _spawn(control: socket.socket, file: int, preparer: "Preparer") -> int:
    source = os.getpid()
    pid = os.fork()
    if pid:
        os.close(file)
        return pid
    status = 1
    try:
        _die_with_parent()
        if os.getppid() == source:
            control.close()
            with socket.socket(fileno=file) as link:
                _work(link, preparer)
        status = 0
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# A worker


def _work(link: socket.socket, preparer: "Preparer") -> None:
    """Jobs in, results out, until the other end is closed."""
    begin = _peak_bytes()
    _limit_memory(preparer.settings.limits)
    while (content := read_frame(link)) is not None:
        try:
            result = preparer.do(jobs.decode_job(content))
        except MemoryError:
            result = jobs.Refusal.of(too_costly("memory"))
        except Exception:
            log.exception("a request could not be prepared")
            link.sendall(frame(jobs.encode(jobs.Broken())))
            raise
        del content
        link.sendall(frame(jobs.encode(result)))
        if _peak_bytes() - begin > RETIRE_BYTES:
            return


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_memory(limits: Limits) -> None:
    if sys.platform != "linux":
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + limits.prepare_memory_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def too_costly(what: str) -> ApiError:
    return ApiError(400, f"the prompt takes too much {what} to prepare", code="prompt_too_costly")


class OutOfTime(Exception):
    """The alarm rang."""


def _on_alarm(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


@contextlib.contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """ApiError if the block runs longer. A block inside one long call is not interrupted; the HTTP
    process kills this one then."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except OutOfTime:
        raise too_costly("time") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Inline(Chat):
    """A Chat that works where it is called, and remembers."""

    prompt_made: Prompt | None = None
    decoded: list[str]

    async def prompt(self, *args: Any, **more: Any) -> Prompt:
        self.prompt_made = prompt = await super().prompt(*args, **more)
        if prompt.tails:
            # The model chooses the tool, where it runs; here the longest stands for it.
            return prompt.with_tail(*max(prompt.tails, key=lambda tail: len(tail[1])))
        return prompt

    async def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        text = await super().decode(ids, skip_special_tokens)
        self.decoded.append(text)
        return text

    def _text(self, *args: Any) -> str:
        signal.setitimer(signal.ITIMER_REAL, self._limits.template_seconds)
        try:
            return super()._text(*args)
        finally:
            signal.setitimer(signal.ITIMER_REAL, self._limits.prepare_seconds)

    async def _run(self, work: Any) -> Any:
        return work()


class Preparer:
    """Does jobs, as the routes would, with nothing between."""

    def __init__(self, chat: Inline, load: jobs.Load) -> None:
        self.settings = replace(load.settings, log_prompts=False)
        self._chat = chat
        self._backend = Backend(_Snapshot(load), self.settings, chat)

    @classmethod
    def load(cls, load: jobs.Load) -> "Preparer":
        template = None if load.template_file is None else Path(load.template_file)
        chat = load_chat(
            Path(load.path), load.settings.limits, template, load.max_model_len, Inline
        )
        assert isinstance(chat, Inline)
        return cls(chat, load)

    def do(self, job: jobs.Job) -> jobs.Result:
        try:
            with time_limit(self.settings.limits.prepare_seconds):
                return self._do(job)
        except (ApiError, RequestError) as error:
            return jobs.Refusal.of(as_api_error(error, {}))

    def _do(self, job: jobs.Job) -> jobs.Result:
        chat = self._chat
        match job:
            case jobs.Render():
                return jobs.Rendered(chat.render(*astuple(job)))
            case jobs.Encode(texts, add_special_tokens):
                return jobs.Encoded(chat.encode_all(texts, add_special_tokens))
            case jobs.Decode(ids, skip_special_tokens):
                return jobs.Decoded(chat.vocabulary.decode(ids, skip_special_tokens))
            case jobs.Body(path, content):
                return self._answer(path, content)

    def _answer(self, path: str, content: bytes) -> jobs.Result:
        value = self._parse(content)
        body = validated(MODELS[path], value)
        self._chat.prompt_made, self._chat.decoded = None, []
        backend = self._backend
        match body:
            case TokenizeRequest():
                return _reply(finish(tokenize(backend, body)).model_dump(exclude_none=True))
            case DetokenizeRequest():
                return _reply(finish(detokenize(backend, body)).model_dump())
            case ChatCompletionRequest():
                finish(chat_completion(backend, body))
                # The turn that goes on is the assistant's.
                role = "assistant" if body.continue_final_message else "user"
                return self._reduced(value | {"messages": [{"role": role, "content": ""}]})
            case ResponsesRequest():
                finish(response(backend, body))
                return self._reduced(value | {"input": "-"})
            case CompletionRequest():
                answer = finish(completion(backend, body))
                reduced = value | {"prompt": [[0]] * len(body.prompts)}
                return self._reduced(reduced, self._prompts(body, answer))
        raise AssertionError(path)

    def _parse(self, content: bytes) -> dict[str, Any]:
        limits = self.settings.limits
        check_nodes(content, limits)
        if is_nested(content, limits.max_nesting):
            raise ApiError(400, f"the body is nested deeper than {limits.max_nesting}")
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError:
            raise ApiError(400, "the body is not valid JSON") from None
        if not isinstance(value, dict):
            raise ApiError(400, "the body must be a JSON object, sent as application/json")
        return value

    def _reduced(
        self,
        body: dict[str, Any],
        prompts: list[tuple[str, tuple[int, ...]]] | None = None,
    ) -> jobs.Result:
        """The event loop parses what is left once more, so that must be small."""
        limits = self.settings.limits
        content = orjson.dumps(body)
        if len(content) > limits.max_rest_bytes:
            largest = max(body, key=lambda name: len(orjson.dumps(body[name])))
            raise refuse(str(largest)[:64], f"larger than {limits.max_rest_bytes} bytes")
        check_nodes(content, replace(limits, max_values=limits.max_rest_values))
        return jobs.Answered(Reduced(content, self._chat.prompt_made, prompts))

    def _prompts(
        self, body: CompletionRequest, answer: Answer
    ) -> list[tuple[str, tuple[int, ...]]]:
        texts = [""] * len(body.prompts)
        if body.echo:
            given = [prompt for prompt in body.prompts if isinstance(prompt, str)]
            # The last are of what is left of the prompts, if they were shortened.
            texts = given or self._chat.decoded[-len(body.prompts) :]
        return [(text, one.prompt_ids) for text, one in zip(texts, answer.requests, strict=True)]


class _Snapshot:
    """An EngineClient that knows the engine's numbers and runs nothing."""

    def __init__(self, load: jobs.Load) -> None:
        self._status = EngineStatus(
            ready=True,
            alive=True,
            hung=False,
            last_step_age_s=0.0,
            num_running=0,
            num_waiting=0,
            kv_usage=0.0,
            model_name=load.settings.model_names[0],
            max_model_len=load.max_model_len,
            num_draft_tokens=load.num_draft_tokens,
            config_toml="",
        )

    async def submit(self, request: Request) -> Events:
        raise AssertionError("nothing runs here")

    def check_room(self, answers: int = 1, tokens: int = 1) -> None: ...

    def status(self) -> EngineStatus:
        return self._status

    def speculation(self) -> SpeculationStats:
        return SpeculationStats()


def finish(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as end:
        result: _T = end.value
        return result
    raise AssertionError("a preparation waited")


def validated(model: type[BaseModel], value: dict[str, Any]) -> BaseModel:
    """The body as its route's model; ApiError as FastAPI's own validation would end in."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        errors = [one | {"loc": ("body", *one["loc"])} for one in found]
        raise validation_error(errors, value) from None


def _reply(value: dict[str, Any]) -> jobs.Answered:
    return jobs.Answered(reply=orjson.dumps(value))


def for_workers(settings: Settings) -> Settings:
    """Settings without what the workers need not know."""
    return replace(settings, api_keys=(), hosts=AllowedHosts(None))
