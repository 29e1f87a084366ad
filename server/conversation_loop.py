"""The loop of eaglerun chat: it reads lines, shows answers, and obeys lines with a slash."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from eaglerun.config import nearest
from eaglerun.conversation import THINKING_MODES
from eaglerun.errors import EaglerunError, RankFailed, RequestError
from eaglerun.messages import MAX_DRAFT_TOKENS
from eaglerun.server.partners import Ending, Partner, Piece, Wish
from eaglerun.server.terminal import DIM, RED, Screen, Tints, acceptance_words, is_text

COMMANDS = {
    "/help": "these lines",
    "/reset": "forget the conversation so far",
    "/drafts": "/drafts N asks for at most N drafts a step, /drafts alone tells how many it is",
    "/thinking": f"/thinking MODE sets the thinking mode: {', '.join(THINKING_MODES)}",
    "/system": "/system TEXT sets what the model is told first, and forgets the conversation",
    "/quit": "leave; so do /exit, Ctrl-D, and Ctrl-C twice",
}
_ENDS = frozenset({"/quit", "/exit"})


@dataclass
class _Count:
    """Counts one answer while it comes."""

    begin_s: float = field(default_factory=time.perf_counter)
    content: list[str] = field(default_factory=list)
    num_steps: int = 0
    num_tokens: int = 0
    in_thinking: bool = False
    ending: Ending | None = None


class Talk:
    """One conversation. ``read_line`` asks for a line, showing its argument where somebody looks;
    it raises EOFError at the end of input.

    ``failed`` says whether any question was left without its answer.
    """

    def __init__(
        self,
        partner: Partner,
        screen: Screen,
        read_line: Callable[[str], str],
        wish: Wish,
        system: str | None,
    ) -> None:
        self._partner = partner
        self._screen = screen
        self._read_line = read_line
        self._wish = wish
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self.failed = False

    def run(self) -> None:
        """Talk until /quit, the end of input, or a second Ctrl-C.

        Raises  RankFailed where the engine's device hangs.
        """
        interrupted = False
        while True:
            try:
                line = self._read_line("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._screen.note("")
                if interrupted:
                    return
                interrupted = True
                self._screen.note("Ctrl-C again, /quit or Ctrl-D leaves", DIM)
                continue
            interrupted = False
            text = line.strip()
            if text in _ENDS:
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    self._obey(text)
                elif text:
                    self._ask(text.removeprefix("/"))
            except RankFailed:
                # No further question would be answered.
                self._screen.end_line()
                raise
            except EaglerunError as error:
                self.failed = True
                self._screen.end_line()
                self._screen.note(f"eaglerun: {error}", RED)
            except KeyboardInterrupt:
                self.failed = interrupted = True
                self._screen.note("")
                self._screen.note("stopped; the question and what there was are forgotten", DIM)

    def _obey(self, text: str) -> None:
        name, _, value = text.partition(" ")
        value = value.strip()
        match name:
            case "/help":
                for known, words in COMMANDS.items():
                    self._screen.note(f"{known:10} {words}")
                self._screen.note("A message that begins with a slash is written with two.")
            case "/reset":
                self._messages = []
                self._screen.note("the conversation begins anew", DIM)
            case "/drafts":
                self._set_drafts(value)
            case "/thinking":
                self._set_thinking(value)
            case "/system":
                self._system = value or None
                self._messages = []
                self._screen.note("the conversation begins anew", DIM)
            case _:
                hint = nearest(name, COMMANDS)
                self._screen.note(f"unknown command {name}{hint}; /help lists them", RED)

    def _set_drafts(self, value: str) -> None:
        most = self._partner.most_drafts
        if most is None:
            self._screen.note("this server takes no number of drafts", RED)
            return
        if value:
            allowed = [str(count) for count in range(min(most, MAX_DRAFT_TOKENS) + 1)]
            if value not in allowed:
                self._screen.note(f"/drafts {value}: allowed are {', '.join(allowed)}", RED)
                return
            self._wish = replace(self._wish, num_draft_tokens=int(value))
        now = self._wish.num_draft_tokens
        self._screen.note(f"at most {most if now is None else now} drafts a step", DIM)

    def _set_thinking(self, value: str) -> None:
        if value not in THINKING_MODES:
            self._screen.note(f"/thinking {value}: allowed are {', '.join(THINKING_MODES)}", RED)
            return
        self._wish = replace(self._wish, thinking=value)
        self._screen.note(f"thinking is {value}", DIM)

    def _ask(self, question: str) -> None:
        """Answer; the turn is remembered once the answer is whole."""
        if not is_text(question):
            raise RequestError("message", "is no text in this terminal's encoding")
        turn = {"role": "user", "content": question}
        first = [] if self._system is None else [{"role": "system", "content": self._system}]
        count = _Count()
        tints = Tints()
        answer = self._partner.answer([*first, *self._messages, turn], self._wish)
        with contextlib.closing(answer):
            for piece in answer:
                if isinstance(piece, Ending):
                    count.ending = piece
                else:
                    self._show(piece, tints, count)
        seconds = time.perf_counter() - count.begin_s
        self._screen.write("\n", drafted=False)
        self._screen.note(_summary(count, seconds, self._wish.max_tokens), DIM)
        said = {"role": "assistant", "content": "".join(count.content)}
        self._messages += [turn, said]

    def _show(self, piece: Piece, tints: Tints, count: _Count) -> None:
        count.num_steps += bool(piece.tokens)
        count.num_tokens += len(piece.tokens)
        tints.add(piece.tokens)
        for text, drafted in tints.split(piece.reasoning):
            count.in_thinking = True
            self._screen.think(text, drafted)
        for text, drafted in tints.split(piece.content):
            if count.in_thinking:
                count.in_thinking = False
                self._screen.think("\n", False)
            self._screen.write(text, drafted)
        count.content.append(piece.content)


def _summary(count: _Count, seconds: float, max_tokens: int) -> str:
    """Tokens, steps, time and acceptance of an answer, as far as they are known."""
    ending = count.ending
    assert ending is not None
    num_tokens = count.num_tokens or ending.num_tokens
    words = f"{seconds:.2f} s"
    if num_tokens is not None:
        steps = f" in {count.num_steps} steps" if count.num_steps else ""
        words = f"{num_tokens} tokens{steps}, {words}, {num_tokens / seconds:.1f} tokens/s"
    if ending.speculation is not None:
        words += acceptance_words(ending.speculation) or ", without drafts"
    if ending.finish_reason == "length":
        full = num_tokens is None or num_tokens >= max_tokens
        words += ", cut at " + (f"--max-tokens {max_tokens}" if full else "the model's length")
    return words
