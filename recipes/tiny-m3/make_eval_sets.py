"""Writes the held-out problems that `eaglerun eval` asks.

python recipes/tiny-m3/make_eval_sets.py configs/demo/eval
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tiny_m3 import evalsets
from tiny_m3.evalsets import Needle, WordProblem

# 124 notes make a prompt of about 1,500 tokens.
SETS: dict[str, Callable[[], Sequence[WordProblem | Needle]]] = {
    "word_problems_seeds.jsonl": lambda: evalsets.held_out_seeds(500),
    "word_problems_templates.jsonl": lambda: evalsets.held_out_templates(240),
    "needles.jsonl": lambda: evalsets.needles(25, 4, 124),
    "needles_who.jsonl": lambda: evalsets.needles(5, 10, 124, evalsets.BACKWARD),
}


def lines(name: str) -> str:
    """The text of one file."""
    return "".join(json.dumps(evalsets.as_json(i)) + "\n" for i in SETS[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        (args.folder / name).write_text(lines(name))


if __name__ == "__main__":
    main()
