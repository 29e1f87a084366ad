"""Copying and looking up: what a chat needs of memory, and what teaches attention to look back."""

import random
from typing import Any

from tiny_m3.lexicon import NOUNS, PEOPLE
from tiny_m3.spelling import WORDS

_THINGS = tuple(w for words in NOUNS.values() for w in words)


def _exchange(ask: str, thought: str, answer: str, thinks: bool) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": ask},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        ],
        "thinks_when_adaptive": thinks,
    }


def repeat_chat(rng: random.Random) -> dict[str, Any]:
    """Repeat words, also with numbers among them."""
    num = rng.randint(2, 30)
    words = [rng.choice(WORDS if rng.random() < 0.7 else _THINGS) for _ in range(num)]
    words = [str(rng.randint(0, 999)) if rng.random() < 0.1 else w for w in words]
    text = " ".join(words)
    ask = rng.choice(("Repeat: {}", "Repeat after me: {}", "Say this again: {}",
                      "Copy this text: {}", "Repeat these words. {}")).format(text)  # fmt: skip
    return _exchange(ask, "I repeat the words.", text, False)


def lookup_chat(rng: random.Random) -> dict[str, Any]:
    """A list of names with a value each, and one to six questions about it."""
    num = rng.randint(3, 40)
    names = rng.sample([n for n, _ in PEOPLE], num)
    kind = rng.choice(("number", "color", "fruit", "word"))
    values = [
        str(rng.randint(1, 999)) if kind == "number"
        else rng.choice(WORDS) if kind == "word"
        else rng.choice(NOUNS[kind])
        for _ in names
    ]  # fmt: skip
    separator = rng.choice(("\n", ", ", "; "))
    table = separator.join(f"{n}: {v}" for n, v in zip(names, values, strict=True))
    picks = rng.sample(range(num), min(num, rng.randint(1, 6)))
    wanted = ", ".join(names[i] for i in picks)
    ask = rng.choice(
        (
            "{table}\n\nWhat is the {kind} of {wanted}?",
            "Here is a list.\n{table}\n\nGive the {kind} of {wanted}.",
            "Look up the {kind} of {wanted}.\n\n{table}",
        )
    ).format(table=table, kind=kind, wanted=wanted)
    answer = ", ".join(f"{names[i]}: {values[i]}" for i in picks)
    return _exchange(ask, f"I look for {wanted}.", answer, True)
