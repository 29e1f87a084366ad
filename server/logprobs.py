"""Log-probabilities of tokens in the two shapes that the API has for them."""

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from eaglerun.messages import TokenLogprobs
from eaglerun.server.parsers.parts import Content, Part
from eaglerun.server.vocabulary import Vocabulary

# JSON has no minus infinity; this is what OpenAI writes for a token that cannot be.
LOWEST = -9999.0


def chat_logprobs(
    tokens: Iterable[TokenLogprobs], num_top: int, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat choice: one object a token."""
    return [
        _chat_token(vocabulary, token.token_id, token.logprob)
        | {"top_logprobs": [_chat_token(vocabulary, *top) for top in token.top[:num_top]]}
        for token in tokens
    ]


def _chat_token(vocabulary: Vocabulary, id_: int, logprob: float) -> dict[str, Any]:
    piece = vocabulary.piece(id_)
    return {
        "token": piece.decode(errors="replace"),
        "logprob": max(logprob, LOWEST),
        "bytes": list(piece),
    }


class ContentTokens:
    """The tokens of an answer whose text is content: not those of reasoning, calls or markers.

    A token is known to be one of them when the content that it stands in has been parsed, which
    may be some tokens later.
    """

    def __init__(self, vocabulary: Vocabulary, skip_special_tokens: bool) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0
        # Tokens with the characters they stand for, and stretches of content, both in order.
        self._waiting: deque[tuple[int, int, TokenLogprobs]] = deque()
        self._content: deque[tuple[int, int]] = deque()
        self._num_known = 0

    def take(self, tokens: Iterable[TokenLogprobs], parts: Iterable[Part]) -> list[TokenLogprobs]:
        """Take in new tokens and parts; return the tokens that are now known to be content's."""
        self._waiting += (self._placed(token) for token in tokens)
        for part in parts:
            if type(part) is Content:
                self._num_known = part.at + len(part.text)
                self._content.append((part.at, self._num_known))
        found = []
        while self._waiting:
            start, end, token = self._waiting[0]
            while self._content and self._content[0][1] <= start:
                self._content.popleft()
            is_content = bool(self._content) and self._content[0][0] < end
            if not is_content and end > self._num_known:
                break
            self._waiting.popleft()
            if is_content:
                found.append(token)
        return found

    def _placed(self, token: TokenLogprobs) -> tuple[int, int, TokenLogprobs]:
        start = self._num_chars
        if token.token_id in self._skipped:
            return start, start, token
        piece = self._vocabulary.piece(token.token_id)
        self._num_chars += len(self._decoder.decode(piece))
        # A part of a character stands for the character to come.
        return start, max(self._num_chars, start + bool(piece)), token


def prompt_logprobs(
    prompt_ids: Sequence[int],
    known: Sequence[TokenLogprobs | None] | None,
    num_top: int,
    vocabulary: Vocabulary,
) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each token of a prompt the best tokens and itself, by id."""

    def entry(id_: int, logprob: float, rank: int) -> dict[str, Any]:
        return {
            "logprob": max(logprob, LOWEST),
            "rank": rank + 1,
            "decoded_token": vocabulary.piece_text(id_),
        }

    found: list[dict[str, Any] | None] = []
    for token in known or (None,) * len(prompt_ids):
        if token is None:
            found.append(None)
            continue
        best = {
            str(id_): entry(id_, logprob, rank)
            for rank, (id_, logprob) in enumerate(token.top[:num_top])
        }
        own = entry(token.token_id, token.logprob, token.rank)
        found.append(best | {str(token.token_id): own})
    return found


class CompletionLogprobs:
    """The ``logprobs`` object of a completion, in pieces or as a whole.

    ``text_offset`` counts the characters of the tokens' texts from the start of the text.
    """

    def __init__(self, num_top: int, vocabulary: Vocabulary) -> None:
        self._num_top = num_top
        self._vocabulary = vocabulary
        self._offset = 0

    def add(self, tokens: Iterable[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """The next tokens: id and log-probabilities (None for the first of a prompt)."""
        found: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for id_, token in tokens:
            text = self._vocabulary.piece_text(id_)
            found["tokens"].append(text)
            found["text_offset"].append(self._offset)
            self._offset += len(text)
            logprob = None if token is None else max(token.logprob, LOWEST)
            found["token_logprobs"].append(logprob)
            found["top_logprobs"].append(None if token is None else self._top(token))
        return found

    def _top(self, token: TokenLogprobs) -> dict[str, float]:
        """The best tokens by text, with the sampled one; of equal texts the best stays."""
        top = [*token.top[: self._num_top], (token.token_id, token.logprob)]
        found: dict[str, float] = {}
        for id_, logprob in top:
            found.setdefault(self._vocabulary.piece_text(id_), max(logprob, LOWEST))
        return found


def extend(logprobs: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """Two pieces of a completion's logprobs as one."""
    if logprobs is None:
        return more
    return {name: logprobs[name] + more[name] for name in more}
