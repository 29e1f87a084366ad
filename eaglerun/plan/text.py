"""Token ids to text, incrementally, and the search for stop strings."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from eaglerun.errors import CheckpointError


def read_tokenizer(file: Path) -> Tokenizer:
    """A checkpoint's tokenizer.json. CheckpointError where it is none."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises nothing more exact.
        words = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{file} is not a tokenizer: {words[0][:200]}") from error


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is now final, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class TextStream:
    """The text of one sequence as its tokens arrive.

    Text that could still turn into a stop string is held back until it cannot; ``finish``
    releases it. Incomplete UTF-8 waits for its remaining bytes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        include_stop: bool,
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held = ""
        # Tokens that have not become text yet.
        self._pending: list[int] = []
        self._skip_special_tokens = skip_special_tokens

    def push(self, token_id: int, may_stop: bool = True) -> TextDelta:
        """Add one token. ``may_stop`` false: its text cannot complete a stop string."""
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            self._pending.append(token_id)
            return TextDelta("")
        self._pending.clear()
        if not self._stop:
            return TextDelta(piece)
        if not may_stop:
            text, self._held = self._held + piece, ""
            return TextDelta(text)
        text = self._held + piece
        found = [(text.find(s), -len(s), s) for s in self._stop if s in text]
        if found:
            at, _, stop = min(found)
            self._held = ""
            end = at + len(stop) if self._include_stop else at
            return TextDelta(text[:end], stop)
        keep = max(_overlap(text, s) for s in self._stop)
        cut = len(text) - keep
        self._held = text[cut:]
        return TextDelta(text[:cut])

    def finish(self) -> str:
        """What was held back, once no more tokens come; U+FFFD for bytes that stay incomplete."""
        text, self._held = self._held, ""
        if self._pending:
            text += self._tokenizer.decode(
                self._pending, skip_special_tokens=self._skip_special_tokens
            )
            self._pending.clear()
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
