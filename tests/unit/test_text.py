"""Text of a token stream: the whole is what the tokenizer decodes, stop strings end it exactly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from eaglerun.plan.text import TextStream


def byte_tokenizer() -> Tokenizer:
    """One token per byte: characters of several bytes arrive in pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def run(
    ids: list[int], stop: tuple[str, ...] = (), include: bool = False
) -> tuple[str, str | None]:
    stream = TextStream(TOKENIZER, stop, include, True)
    text = ""
    for token in ids:
        delta = stream.push(token)
        text += delta.text
        if delta.stop is not None:
            return text, delta.stop
    return text + stream.finish(), None


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_any_text_with_any_stops(text: str, stops: list[str]):
    ids = TOKENIZER.encode(text).ids
    assert run(ids) == (text, None)
    at = [(text.find(s), s) for s in stops if s in text]
    got, stop = run(ids, tuple(stops))
    if not at:
        assert (got, stop) == (text, None)
        return
    # The first stop string to be complete ends the text; at a tie, the one that begins first.
    end = min(i + len(s) for i, s in at)
    begin = min(i for i, s in at if i + len(s) == end)
    assert got == text[:begin] and stop == text[begin:end]
    assert run(ids, tuple(stops), include=True)[0] == text[:end]


def test_special_tokens_and_incomplete_bytes():
    eos = TOKENIZER.token_to_id("<eos>")
    assert run([*TOKENIZER.encode("hi").ids, eos]) == ("hi", None)
    assert run(TOKENIZER.encode("é").ids[:1]) == ("\ufffd", None)


def test_a_possible_stop_is_held_back():
    stream = TextStream(TOKENIZER, ("###",), False, True)
    texts = [stream.push(i).text for i in TOKENIZER.encode("a##b##").ids]
    assert texts == ["a", "", "", "##b", "", ""]
    assert stream.finish() == "##"


@pytest.mark.parametrize("may_stop", [True, False])
def test_stop_strings_wait_for_min_tokens(may_stop: bool):
    stream = TextStream(TOKENIZER, ("b",), False, True)
    (token,) = TOKENIZER.encode("b").ids
    delta = stream.push(token, may_stop)
    assert (delta.text, delta.stop) == (("", "b") if may_stop else ("b", None))
