"""What was prepared of the request in hand, where its body was prepared as a whole."""

from contextvars import ContextVar

from msgspec import Struct

from eaglerun.server.parsers.reasoning import Start


class Prompt(Struct, frozen=True):
    """A prompt, ready for the engine.

    start   what the answer begins with
    forced  text at its end that belongs to the answer
    tails   the ways to go on with the forced text, one for each tool: its text and token ids
    """

    token_ids: tuple[int, ...]
    start: Start = Start.TURN
    forced: str = ""
    tails: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def with_tail(self, text: str, token_ids: tuple[int, ...]) -> "Prompt":
        return Prompt(self.token_ids + token_ids, self.start, self.forced + text)


class Reduced(Struct):
    """A body that is valid, with a stub where its prompt stood, and what became of the prompt.

    prompt   of a conversation
    prompts  of a completion: each one's text (where it is echoed) and ids
    """

    body: bytes
    prompt: Prompt | None = None
    prompts: list[tuple[str, tuple[int, ...]]] | None = None


PREPARED: ContextVar[Reduced | None] = ContextVar("prepared", default=None)
