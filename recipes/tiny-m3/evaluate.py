"""Scores a target, and a draft if given, on the held-out problems; small numbers suit a CPU.

    python recipes/tiny-m3/evaluate.py configs/demo/target --draft configs/demo/draft --num 100

This is the recipe's own decoder and its own walk over the draft's rounds, independent of the
engine: `eaglerun eval` must agree with it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_m3 import checkpoints, evalsets
from tiny_m3.draft import Eagle3Draft
from tiny_m3.scoring import Speaker, acceptance
from tokenizers import Tokenizer

Sequences = Sequence[tuple[list[int], list[int]]]


def drafted(
    speaker: Speaker, draft: Eagle3Draft | None, sequences: Sequences, k: int
) -> dict[str, Any]:
    """The acceptance fields of a report, none without a draft."""
    if draft is None:
        return {}
    return acceptance(speaker.model, draft, sequences, k, min(speaker.batch, 4)).report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--draft", type=Path)
    parser.add_argument("--num", type=int, default=100, help="word problems of each kind")
    parser.add_argument("--needles", type=int, default=0, help="long prompts, four questions each")
    parser.add_argument("--facts", type=int, default=124, help="notes in a long prompt")
    parser.add_argument("-k", type=int, default=3, help="drafted tokens a round")
    parser.add_argument("--modes", nargs="+", default=["adaptive", "disabled"])
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = checkpoints.load_target(args.target).to(device).eval()
    draft = checkpoints.load_draft(args.draft).to(device).eval() if args.draft else None
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    speaker = Speaker(model, tokenizer, args.batch)
    sets = {
        "seeds": evalsets.held_out_seeds(args.num),
        "templates": evalsets.held_out_templates(args.num),
        "visitors": evalsets.visitors()[: args.num],
    }
    for name, problems in sets.items():
        for mode in args.modes if args.num else ():
            start = time.monotonic()
            scores, _, sequences = speaker.word_problems(problems, mode, 400)
            scores |= drafted(speaker, draft, sequences, args.k)
            scores["seconds"] = round(time.monotonic() - start, 1)
            print(f"{name} {mode}", json.dumps(scores), flush=True)
    if args.needles:
        for kinds in (evalsets.FORWARD, evalsets.BACKWARD):
            items = evalsets.needles(args.needles, 4, args.facts, kinds)
            for attention in ("sparse", "full") if kinds == evalsets.FORWARD else ("sparse",):
                share, length, sequences = speaker.needles(items, attention == "full", 80)
                report = {"n": len(sequences), "right": share, "prompt_tokens": round(length)}
                if attention == "sparse":
                    report |= drafted(speaker, draft, sequences, args.k)
                print(f"needles {'/'.join(kinds)} {attention}", json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
