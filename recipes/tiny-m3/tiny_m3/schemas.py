"""Situations of everyday sums, each in many wordings (wordings.toml; markup: wording.py).

A schema has a text, questions with their answer sentences, worked steps "x op y = name unit" and
number ranges as in word_problems.toml. They share no wording with the held-out templates.
"""

import random
import re
from dataclasses import dataclass

from tiny_m3.arithmetic import draw_slots
from tiny_m3.events import WORDINGS

_STEP = re.compile(r"(\w+)([-+*/])(\w+)=(\w+) (.+)")


@dataclass(frozen=True, slots=True)
class Schema:
    """One situation."""

    text: str
    asks: tuple[str, ...]
    steps: tuple[tuple[str, str, str, str, str], ...]
    numbers: tuple[tuple[str, str], ...]

    def draw(self, rng: random.Random) -> dict[str, int]:
        """Values of the numbers that stand in the text or in the steps."""
        return draw_slots(self.numbers, rng)


def _schema(text: str, steps: str, numbers: str, asks: tuple[str, ...]) -> Schema:
    parsed: list[tuple[str, str, str, str, str]] = []
    for step in steps.split("; "):
        match = _STEP.fullmatch(step)
        if match is None:
            raise ValueError(f"cannot read the step {step!r}")
        parsed.append((match[1], match[2], match[3], match[4], match[5]))
    pairs = []
    for number in numbers.split():
        slot, _, spec = number.partition("=")
        pairs.append((slot, f"={spec}" if spec[0].isalpha() else spec))
    return Schema(text, asks, tuple(parsed), tuple(pairs))


SCHEMAS = tuple(
    _schema(s["text"], s["steps"], s["numbers"], tuple(s["asks"])) for s in WORDINGS["schema"]
)
# (part, how many each has, the things that have them)
PARTS: tuple[tuple[str, int, tuple[str, ...]], ...] = tuple(
    (p["name"], p["each"], tuple(p["wholes"].split())) for p in WORDINGS["part"]
)
