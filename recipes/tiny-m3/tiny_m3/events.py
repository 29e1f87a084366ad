"""What happens to a number, in many words: the sentences of composed.py's running stories.

They stand in wordings.toml; the markup is that of wording.py.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

WORDINGS = tomllib.loads((Path(__file__).parent / "wordings.toml").read_text())


@dataclass(frozen=True, slots=True)
class Amount:
    """Something that is measured: dollars, liters, people."""

    unit: str
    starts: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    asks: tuple[str, ...]


def _texts(name: str) -> tuple[str, ...]:
    return tuple(WORDINGS["events"][name])


STARTS, GAINS, LOSSES = _texts("starts"), _texts("gains"), _texts("losses")
GROUPS, TWO_PARTS = _texts("groups"), _texts("two_parts")
ASKS, OTHER_ASKS, BOTH_ASKS = _texts("asks"), _texts("other_asks"), _texts("both_asks")
DIFFERENCE_ASKS, THEN, FILLERS = _texts("difference_asks"), _texts("then"), _texts("fillers")
# (sentence, operation, number)
FACTORS: tuple[tuple[str, str, int], ...] = tuple(
    (s, op, n) for s, op, n in WORDINGS["events"]["factors"]
)
FACTOR_COMPARES: tuple[tuple[str, str, int], ...] = tuple(
    (s, op, n) for s, op, n in WORDINGS["events"]["factor_compares"]
)
# (sentence, operation), (sentence, question => answer)
COMPARES: tuple[tuple[str, str], ...] = tuple((s, op) for s, op in WORDINGS["events"]["compares"])
SHARES: tuple[tuple[str, str], ...] = tuple((s, ask) for s, ask in WORDINGS["events"]["shares"])
PRICES: tuple[tuple[str, str], ...] = tuple((s, ask) for s, ask in WORDINGS["events"]["prices"])
AMOUNTS = tuple(
    Amount(a["unit"], tuple(a["starts"]), tuple(a["gains"]), tuple(a["losses"]), tuple(a["asks"]))
    for a in WORDINGS["amount"]
)
