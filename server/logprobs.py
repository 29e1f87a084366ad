"""Log-probabilities of tokens in the two shapes that the API has for them."""

from collections.abc import Iterable
from typing import Any

from eaglerun.messages import TokenLogprobs
from eaglerun.server.vocabulary import Vocabulary

# JSON has no minus infinity; this is what OpenAI writes for a token that cannot be.
LOWEST = -9999.0


def chat_logprobs(
    tokens: Iterable[TokenLogprobs], num_top: int, vocabulary: Vocabulary
) -> list[dict[str, Any]]:
    """``logprobs.content`` of a chat choice: one object a token, whatever part it belongs to."""
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
