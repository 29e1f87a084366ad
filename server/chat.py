"""From a conversation to token ids: MiniMax-M3's template, its thinking modes and forced calls."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import orjson

from eaglerun.chat_template import read_json, read_template
from eaglerun.conversation import THINKING_MODES
from eaglerun.errors import CheckpointError, RequestError
from eaglerun.plan.text import read_tokenizer
from eaglerun.server.failures import ApiError, new_id, overloaded, refuse
from eaglerun.server.fields import EFFORTS
from eaglerun.server.parsers.reasoning import THINK_CLOSE, THINK_OPEN, Start
from eaglerun.server.parsers.tags import MARKER
from eaglerun.server.parsers.tools import TOOL_BLOCK
from eaglerun.server.prepared import Prompt, Reduced
from eaglerun.server.protocol import AssistantMessage, Message, ToolCall
from eaglerun.server.settings import Limits, SamplingDefaults, Settings
from eaglerun.server.template import ChatTemplate
from eaglerun.server.vocabulary import Vocabulary

_T = TypeVar("_T")


class Chat:
    """A checkpoint's tokenizer and template, worked by a few threads of its own.

    Rendering and tokenising a long conversation takes long; on the event loop it would hold up
    every stream. ``close`` ends the threads; new ones start if there is more to do.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate | None,
        limits: Limits,
        max_model_len: int | None = None,
    ) -> None:
        self.vocabulary = vocabulary
        self._max_model_len = max_model_len
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
        forced: Sequence[str] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, object],
        field: str = "messages",
    ) -> Prompt:
        """The prompt of a conversation; ApiError names what is wrong with it.

        ``forced``: one of these tools must be called. ``continue_final_message``: the last message
        is the beginning of the answer. ``field`` is what the route calls the messages.
        """
        turns = [_turn(message) for message in messages]
        mark, start = "", None
        if continue_final_message:
            mark = new_id()
            start = _mark_end(turns[-1], mark)

        return await self._prepare_prompt(
            turns,
            tools or None,
            tuple(forced),
            add_generation_prompt and not mark,
            template_kwargs,
            field,
            mark,
            start,
        )

    async def _prepare_prompt(self, *conversation: Any) -> Prompt:
        return await self._run(lambda: self.render(*conversation))

    def render(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        forced: Sequence[str],
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object],
        field: str = "messages",
        mark: str = "",
        start: Start | None = None,
    ) -> Prompt:
        """The prompt of a conversation, here and now; up to the mark, if there is one."""
        text = self._text(turns, tools, add_generation_prompt, template_kwargs, field)
        if mark:
            text, found, _ = text.rpartition(mark)
            if not found:
                raise refuse(
                    "continue_final_message", "the chat template leaves the final message out"
                )
        return self._prompt(text, forced, start, field)

    def _text(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        template_kwargs: Mapping[str, object],
        field: str,
    ) -> str:
        template = self._template
        if template is None:
            raise refuse(field, "the model has no chat template")

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return template.render(
                messages,
                tools,
                self._limits.max_prompt_chars,
                add_generation_prompt=add_generation_prompt,
                **template_kwargs,
            )

        try:
            try:
                return render(turns)
            except ApiError:
                # Arguments that are no object are text, which some templates cannot write.
                changed = [_with_objects(turn) for turn in turns]
                if changed == list(turns):
                    raise
                return render(changed)
        except ApiError as error:
            raise refuse(field, error.detail.removeprefix(f"{error.param}: ")) from error

    async def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Plain texts as token ids."""
        return await self._run(lambda: self.encode_all(texts, add_special_tokens))

    def encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[int, ...]]:
        """Plain texts as token ids, here and now."""
        if sum(map(len, texts)) > self._limits.max_prompt_chars:
            raise refuse("prompt", f"longer than {self._limits.max_prompt_chars} characters")
        for text in texts:
            self._check_length(text, "prompt")
        return [self.vocabulary.encode(text, add_special_tokens) for text in texts]

    async def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        return await self._run(lambda: self.vocabulary.decode(ids, skip_special_tokens))

    async def prepare_body(self, path: str, content: bytes) -> Reduced | bytes | None:
        """A large body with its prompt prepared, or the whole answer to it; None: it is to be
        parsed like any other."""
        return None

    def _check_length(self, text: str, param: str) -> None:
        """Refuse, before it is tokenised, a text that no number of tokens allowed could hold."""
        longest, limit = self.vocabulary.longest_bytes, self._max_model_len
        if longest is None or limit is None or len(text) <= limit:
            return
        size = len(text.encode(errors="replace"))
        if size > limit * longest:
            raise refuse(
                param,
                f"{size} bytes of text exceed the model's length of {limit} tokens",
                "context_length_exceeded",
            )

    def _prompt(self, text: str, forced: Sequence[str], start: Start | None, field: str) -> Prompt:
        self._check_length(text, field)
        if start is None:
            start = Start.REASONING if text.endswith(THINK_OPEN) else Start.TURN
        if not forced:
            return Prompt(self.vocabulary.encode(text, add_special_tokens=False), start)
        # A turn without thinking begins with the closing marker, as the template writes it.
        call = "" if text.endswith(THINK_CLOSE) else THINK_CLOSE
        call += TOOL_BLOCK + MARKER
        ids = self.vocabulary.encode(text + call, add_special_tokens=False)
        texts = [f'<invoke name="{name}">' for name in forced]
        tails = [(tail, self.vocabulary.encode(tail, add_special_tokens=False)) for tail in texts]
        prompt = Prompt(ids, start, call, tuple(tails))
        return prompt if len(tails) > 1 else prompt.with_tail(*tails[0])

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
    given: Mapping[str, object] | None,
    settings: Settings,
    *,
    thinking: str | None = None,
    effort: str | None = None,
    effort_field: str = "reasoning_effort",
) -> dict[str, object]:
    """chat_template_kwargs, if all of its names and values are allowed.

    Several fields may say how to think; ApiError if they contradict each other.
    """
    values = {name: value for name, value in (given or {}).items() if value is not None}
    modes = {}
    if "thinking_mode" in values:
        modes["chat_template_kwargs.thinking_mode"] = values["thinking_mode"]
    if "enable_thinking" in values and "enable_thinking" not in settings.template_kwargs:
        wish = values.pop("enable_thinking")
        if not isinstance(wish, bool):
            raise refuse("chat_template_kwargs.enable_thinking", "should be true or false")
        modes["chat_template_kwargs.enable_thinking"] = "enabled" if wish else "disabled"
    if thinking is not None:
        modes["thinking.type"] = thinking
    for field, mode in modes.items():
        if mode != values.setdefault("thinking_mode", mode):
            raise refuse(field, f"contradicts {next(iter(modes))}")
    if effort is not None:
        # A degree of thinking says no more than on or off where the mode is said too.
        mode = values.setdefault("thinking_mode", EFFORTS[effort])
        if (mode == "disabled") != (effort == "none"):
            raise refuse(effort_field, f"{effort} contradicts {next(iter(modes))}")
    for name, value in values.items():
        param = f"chat_template_kwargs.{name[:64]}"
        if name not in settings.template_kwargs:
            raise refuse(param, f"allowed are {', '.join(settings.template_kwargs) or 'none'}")
        if name == "thinking_mode" and value not in THINKING_MODES:
            raise refuse(param, f"allowed are {', '.join(THINKING_MODES)}")
        if not isinstance(value, str | bool | int | float):
            raise refuse(param, "should be a string, a number or a boolean")
    return values


def _turn(message: Message) -> dict[str, Any]:
    """A message as templates expect it; arguments of calls become objects, if they are such."""
    turn = message.model_dump(
        include={"role", "content", "name", "reasoning_content", "tool_call_id"},
        exclude_none=True,
    )
    turn.setdefault("content", None)
    calls = []
    for call in _tool_calls(message):
        function = {"name": call.function.name, "arguments": _arguments(call.function.arguments)}
        calls.append({"id": call.id, "type": "function", "function": function})
    if calls:
        turn["tool_calls"] = calls
    elif turn["content"] is None and isinstance(message, AssistantMessage):
        # It was interrupted before a word.
        turn["content"] = ""
    return turn


def _arguments(text: str) -> dict[str, Any] | str:
    """An earlier call's arguments; what is no JSON object stays the text that it is."""
    try:
        found = orjson.loads(text or "{}")
    except orjson.JSONDecodeError:
        return text
    return found if isinstance(found, dict) else text


def _with_objects(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn whose calls all have objects as arguments; text is one under "$text"."""
    calls = [call["function"] for call in turn.get("tool_calls", ())]
    if all(isinstance(function["arguments"], dict) for function in calls):
        return turn
    changed = []
    for call in turn["tool_calls"]:
        function = call["function"]
        if isinstance(function["arguments"], str):
            function = function | {"arguments": {"$text": function["arguments"]}}
        changed.append(call | {"function": function})
    return {**turn, "tool_calls": changed}


def _mark_end(turn: dict[str, Any], mark: str) -> Start:
    """Put a mark where the answer goes on, in the last turn; and what goes on there."""
    if turn["role"] != "assistant":
        raise refuse("continue_final_message", "the final message is not the assistant's")
    if "tool_calls" in turn:
        raise refuse("continue_final_message", "the final message has tool calls")
    if not turn["content"] and turn.get("reasoning_content"):
        turn["reasoning_content"] += mark
        return Start.REASONING
    turn["content"] += mark
    return Start.CONTENT


def _tool_calls(message: Message) -> list[ToolCall]:
    calls = message.tool_calls if isinstance(message, AssistantMessage) else None
    return calls or []


def load_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer of a checkpoint's directory. CheckpointError where it is missing or broken."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the server needs a tokenizer")
    return Vocabulary(read_tokenizer(file))


def load_chat(
    path: Path,
    limits: Limits,
    template_file: Path | None = None,
    max_model_len: int | None = None,
    kind: type[Chat] = Chat,
) -> Chat:
    """Tokenizer and template of a checkpoint's directory.

    ``template_file`` takes the place of the checkpoint's template. Raises CheckpointError where a
    file is missing or broken; a checkpoint without a template can still complete text.
    """
    vocabulary = load_vocabulary(path)
    template = read_template(path, template_file)
    if template is None:
        return kind(vocabulary, None, limits, max_model_len)
    compiled = ChatTemplate(
        template.source, template.special_tokens, limits.template_seconds, template.tool_source
    )
    return kind(vocabulary, compiled, limits, max_model_len)


def load_sampling(path: Path) -> SamplingDefaults:
    """Sampling defaults of a checkpoint: its generation_config.json, where it has one.

    CheckpointError for values that no request could ask for.
    """
    config = read_json(path / "generation_config.json")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    values = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingDefaults(**values)
    except RequestError as error:
        raise CheckpointError(f"{path / 'generation_config.json'}: {error}") from None
