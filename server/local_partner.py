"""A terminal conversation with an engine in this process."""

import contextlib
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from types import FrameType

from eaglerun.errors import ConfigError
from eaglerun.llm import LLM, RequestOutput
from eaglerun.messages import Finished, SamplingParams, Tokens
from eaglerun.server.parsers.output import OutputParser
from eaglerun.server.parsers.parts import Content, Part, Reasoning
from eaglerun.server.parsers.reasoning import THINK_OPEN, Start
from eaglerun.server.partners import Answer, Ending, Messages, Piece, Wish
from eaglerun.server.vocabulary import Vocabulary

Events = Generator[Tokens | Finished, None, None]


class InProcess:
    """Answers of an LLM in this process."""

    def __init__(self, llm: LLM) -> None:
        tokenizer = llm.engine.tokenizer
        if tokenizer is None:
            raise ConfigError(f"{llm.engine.model_name} has no tokenizer.json, and so no text")
        self.name = llm.engine.model_name
        self.most_drafts: int | None = llm.engine.num_draft_tokens
        self._llm = llm
        self._vocabulary = Vocabulary(tokenizer)

    def answer(self, messages: Messages, wish: Wish) -> Answer:
        values = {} if wish.thinking is None else {"thinking_mode": wish.thinking}
        [prompt] = self._llm.chat_prompts(messages, chat_template_kwargs=values)
        parser = _parser(self._vocabulary, prompt)
        with contextlib.closing(_shielded(self._llm.stream(prompt, _sampling(wish)))) as events:
            for event in events:
                if isinstance(event, Finished):
                    yield _piece(parser.finish())
                    yield Ending(event.reason, event.num_output_tokens, event.speculation)
                else:
                    yield _piece(parser.feed(event.text), self._tokens(event))

    def _tokens(self, event: Tokens) -> tuple[tuple[str, bool], ...]:
        return tuple(
            (self._vocabulary.piece_text(id_), i < event.num_accepted)
            for i, id_ in enumerate(event.token_ids)
        )


def parts_of(llm: LLM, output: RequestOutput) -> tuple[str, str]:
    """Thinking and answer in the text of LLM.chat."""
    assert llm.engine.tokenizer is not None
    vocabulary = Vocabulary(llm.engine.tokenizer)
    parser = _parser(vocabulary, output.prompt_ids)
    piece = _piece([*parser.feed(output.text), *parser.finish()])
    return piece.reasoning, piece.content


def _parser(vocabulary: Vocabulary, prompt: Sequence[int]) -> OutputParser:
    """A parser of the answer, which begins inside the thinking block if the prompt opened it."""
    # The marker is one token, or at most as many as it has bytes.
    end = vocabulary.decode(tuple(prompt[-len(THINK_OPEN) :]), skip_special_tokens=False)
    return OutputParser(start=Start.REASONING if end.endswith(THINK_OPEN) else Start.TURN)


def _piece(parts: Sequence[Part], tokens: tuple[tuple[str, bool], ...] = ()) -> Piece:
    return Piece(
        "".join(part.text for part in parts if isinstance(part, Reasoning)),
        "".join(part.text for part in parts if isinstance(part, Content)),
        tokens,
    )


def _sampling(wish: Wish) -> SamplingParams:
    return SamplingParams(
        temperature=wish.temperature,
        top_p=wish.top_p,
        max_tokens=wish.max_tokens,
        stop=wish.stop,
        num_draft_tokens=wish.num_draft_tokens,
    )


def _shielded(events: Events) -> Events:
    """The events; Ctrl-C comes through between two steps of the engine, never inside one."""
    with contextlib.closing(events):
        while True:
            with _held_back():
                event = next(events, None)
            if event is None:
                return
            yield event


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Hold a first Ctrl-C back until the end of the block; a second comes through at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt
