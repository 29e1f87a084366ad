"""Text to token ids and back, and what each token is by itself."""

from functools import cached_property

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel


class Vocabulary:
    """A checkpoint's tokenizer. ``encode`` and ``decode`` may run in any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        self._pieces = {id_: token.content.encode() for id_, token in added.items()}
        # A byte-level token is spelled in an alphabet of 256 characters, one for each byte.
        byte_level = "ByteLevel" in repr(tokenizer.decoder)
        self._bytes = _byte_alphabet() if byte_level else None

    @cached_property
    def longest_bytes(self) -> int | None:
        """No token stands for more bytes of text; None: that cannot be told."""
        tokenizer = self._tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        # Normalizers, and tokens that take the blanks beside them, make text shorter; and only
        # byte-level tokens are spelled without one for all that is unknown.
        if self._bytes is None or tokenizer.normalizer is not None:
            return None
        if any(token.lstrip or token.rstrip for token in added):
            return None
        return max(map(len, tokenizer.get_vocab()), default=None)

    def encode(self, text: str, add_special_tokens: bool) -> tuple[int, ...]:
        # encode() keeps the interpreter lock, and with it every stream, for seconds on a long
        # prompt; the batch form gives it back.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        return tuple(encoding.ids)

    def decode(self, ids: tuple[int, ...], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a token by its exact text."""
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def piece(self, id_: int) -> bytes:
        """The bytes a token stands for, possibly a part of a character; b"" for unused ids."""
        piece = self._pieces.get(id_)
        if piece is None:
            piece = self._pieces[id_] = self._spell(id_)
        return piece

    def piece_text(self, id_: int) -> str:
        """``piece`` as text, with U+FFFD for parts of a character."""
        return self.piece(id_).decode(errors="replace")

    def _spell(self, id_: int) -> bytes:
        token = self._tokenizer.id_to_token(id_)
        if token is None:
            return b""
        if self._bytes is None:
            return self.decode((id_,), skip_special_tokens=False).encode()
        return bytes(self._bytes[char] for char in token if char in self._bytes)


def _byte_alphabet() -> dict[str, int]:
    """The byte of every character of the byte-level alphabet.

    Printable bytes of Latin-1 stand for themselves; the others, in order, for U+0100 onwards.
    """
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in kept]
    table = {chr(byte): byte for byte in kept} | {chr(256 + i): b for i, b in enumerate(moved)}
    assert table.keys() == set(ByteLevel.alphabet())
    return table
