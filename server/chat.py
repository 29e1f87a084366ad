"""From a conversation to token ids: MiniMax-M3's template, its thinking modes and forced calls."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from tokenizers import Tokenizer

from eaglerun.errors import CheckpointError, RequestError
from eaglerun.server.failures import overloaded, refuse
from eaglerun.server.parsers.reasoning import THINK_CLOSE, THINK_OPEN, Start
from eaglerun.server.parsers.tools import INVOKE, TOOL_BLOCK
from eaglerun.server.protocol import AssistantMessage, Message, ToolCall
from eaglerun.server.settings import Limits, SamplingDefaults, Settings
from eaglerun.server.template import ChatTemplate
from eaglerun.server.vocabulary import Vocabulary

THINKING_MODES = ("enabled", "disabled", "adaptive")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, ready for the engine.

    start   what the answer begins with
    forced  text at its end that belongs to the answer
    """

    token_ids: tuple[int, ...]
    start: Start = Start.TURN
    forced: str = ""


@dataclass(frozen=True, slots=True)
class Forced:
    """A tool call that must be made; of a certain tool, or (None) of any."""

    tool: str | None


class Chat:
    """A checkpoint's tokenizer and template, worked by a few threads of its own.

    Rendering and tokenising a long conversation takes long; on the event loop it would hold up
    every stream. ``close`` ends the threads; new ones start if there is more to do.
    """

    def __init__(
        self, vocabulary: Vocabulary, template: ChatTemplate | None, limits: Limits
    ) -> None:
        self.vocabulary = vocabulary
        self._template = template
        self._limits = limits
        self._threads = _threads()
        self._num_preparing = 0

    def close(self) -> None:
        threads, self._threads = self._threads, _threads()
        threads.shutdown(wait=True, cancel_futures=True)

    async def prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        forced: Forced | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, object],
    ) -> Prompt:
        """The prompt of a conversation; ApiError names what is wrong with it."""
        turns = [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]

        def work() -> Prompt:
            if self._template is None:
                raise refuse("messages", "the model has no chat template")
            text = self._template.render(
                turns,
                tools or None,
                self._limits.max_prompt_chars,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )
            return self._prompt(text, forced)

        return await self._run(work)

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Plain texts as token ids."""
        if sum(map(len, texts)) > self._limits.max_prompt_chars:
            raise refuse("prompt", f"longer than {self._limits.max_prompt_chars} characters")
        return await self._run(
            lambda: [self.vocabulary.encode(text, add_special_tokens) for text in texts]
        )

    async def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return await self._run(lambda: self.vocabulary.decode(ids, skip_special_tokens))

    def _prompt(self, text: str, forced: Forced | None) -> Prompt:
        call = ""
        if forced is not None:
            # A turn without thinking begins with the closing marker, as the template writes it.
            call = "" if text.endswith(THINK_CLOSE) else THINK_CLOSE
            call += TOOL_BLOCK + INVOKE
            if forced.tool is not None:
                call += f'{forced.tool}">'
        ids = self.vocabulary.encode(text + call, add_special_tokens=False)
        start = Start.REASONING if text.endswith(THINK_OPEN) else Start.TURN
        return Prompt(ids, start, call)

    async def _run(self, work: Callable[[], _T]) -> _T:
        if self._num_preparing >= self._limits.max_preparing:
            raise overloaded("too many prompts are being prepared")
        self._num_preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._num_preparing -= 1


def _threads() -> ThreadPoolExecutor:
    """Threads start when there is work."""
    return ThreadPoolExecutor(2, thread_name_prefix="eaglerun-chat")


def template_values(
    given: Mapping[str, object] | None, settings: Settings, effort: str | None = None
) -> dict[str, object]:
    """chat_template_kwargs, if all of its names and values are allowed."""
    values = dict(given or {})
    if effort == "none":
        if values.setdefault("thinking_mode", "disabled") != "disabled":
            raise refuse("reasoning_effort", "none contradicts chat_template_kwargs.thinking_mode")
    for name, value in values.items():
        param = f"chat_template_kwargs.{name[:64]}"
        if name not in settings.template_kwargs:
            raise refuse(param, f"allowed are {', '.join(settings.template_kwargs) or 'none'}")
        if name == "thinking_mode" and value not in THINKING_MODES:
            raise refuse(param, f"allowed are {', '.join(THINKING_MODES)}")
        if not isinstance(value, str | bool | int | float):
            raise refuse(param, "should be a string, a number or a boolean")
    return values


def _turn(message: Message, param: str) -> dict[str, Any]:
    """A message as templates expect it; arguments of calls become objects."""
    turn = message.model_dump(
        include={"role", "content", "name", "reasoning_content", "tool_call_id"},
        exclude_none=True,
    )
    turn.setdefault("content", None)
    calls = []
    for i, call in enumerate(_tool_calls(message)):
        try:
            arguments = orjson.loads(call.function.arguments or "{}")
        except orjson.JSONDecodeError:
            arguments = None
        if not isinstance(arguments, dict):
            raise refuse(f"{param}.tool_calls[{i}].function.arguments", "should be a JSON object")
        function = {"name": call.function.name, "arguments": arguments}
        calls.append({"id": call.id, "type": "function", "function": function})
    if calls:
        turn["tool_calls"] = calls
    return turn


def _tool_calls(message: Message) -> list[ToolCall]:
    calls = message.tool_calls if isinstance(message, AssistantMessage) else None
    return calls or []


def load_chat(path: Path, limits: Limits, template_file: Path | None = None) -> Chat:
    """Tokenizer and template of a checkpoint's directory.

    ``template_file`` takes the place of the checkpoint's template. Raises CheckpointError where a
    file is missing or broken; a checkpoint without a template can still complete text.
    """
    tokenizer_file = path / "tokenizer.json"
    if not tokenizer_file.is_file():
        raise CheckpointError(f"{tokenizer_file} is missing: the server needs a tokenizer")
    vocabulary = Vocabulary(Tokenizer.from_file(str(tokenizer_file)))
    config = _read_json(path / "tokenizer_config.json")
    files = [template_file] if template_file else [path / "chat_template.jinja"]
    source = config.get("chat_template")
    for file in files:
        if file.is_file():
            source = file.read_text(encoding="utf-8")
        elif file is template_file:
            raise CheckpointError(f"the chat template {file} does not exist")
    special = {
        name: text
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (text := _token_text(config.get(name))) is not None
    }
    template = None
    if isinstance(source, str):
        template = ChatTemplate(source, special, limits.template_seconds)
    return Chat(vocabulary, template, limits)


def load_sampling(path: Path) -> SamplingDefaults:
    """Sampling defaults of a checkpoint: its generation_config.json, where it has one.

    CheckpointError for values that no request could ask for.
    """
    config = _read_json(path / "generation_config.json")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingDefaults(**values)
    except RequestError as error:
        raise CheckpointError(f"{path / 'generation_config.json'}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _token_text(token: object) -> str | None:
    """A special token as tokenizer_config.json writes it: plain, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
