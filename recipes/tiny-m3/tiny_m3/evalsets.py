"""Held-out problems: other seeds, other templates, needles in long prompts."""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tiny_m3 import arithmetic, templates
from tiny_m3.world import needle_prompt

EVAL_SEED = "held-out"
VISITORS = Path(__file__).parents[1] / "visitor_questions.jsonl"


@dataclass(frozen=True, slots=True)
class WordProblem:
    """One line of a word-problem file."""

    id: str
    template: str
    question: str
    answer: int


@dataclass(frozen=True, slots=True)
class Needle:
    """One line of a needle file: notes, and questions with the phrase a right answer contains."""

    id: str
    context: str
    questions: tuple[dict[str, str], ...]


def held_out_seeds(num: int) -> list[WordProblem]:
    """Problems of trained templates on the evaluation side of the split."""
    rng = random.Random(f"{EVAL_SEED}/seeds")
    out: list[WordProblem] = []
    while len(out) < num:
        problem = arithmetic.generate(rng.choice(templates.TRAINED), rng)
        if arithmetic.is_for_eval(problem.question):
            out.append(_word_problem(f"seed-{len(out):04d}", problem))
    return out


def held_out_templates(num: int) -> list[WordProblem]:
    """Problems of the templates that training never sees, the same number of each."""
    rng = random.Random(f"{EVAL_SEED}/templates")
    return [
        _word_problem(
            f"template-{i:04d}",
            arithmetic.generate(templates.HELD_OUT[i % len(templates.HELD_OUT)], rng),
        )
        for i in range(num)
    ]


def visitors() -> list[WordProblem]:
    """Questions in visitors' own words, written by hand and never trained on."""
    lines = VISITORS.read_text().splitlines()
    return [WordProblem(f"visitor-{i:04d}", "visitor", **json.loads(line))
            for i, line in enumerate(lines)]  # fmt: skip


def _word_problem(name: str, problem: arithmetic.Problem) -> WordProblem:
    return WordProblem(name, problem.template, problem.question, problem.answer)


# The questions of one note, in needle_prompt's order. A name leads forward to what follows it;
# "who" has to be answered backward, from the thing to a name before it.
KINDS = ("what", "where", "who")
FORWARD = ("what", "where")
BACKWARD = ("who",)


def needles(
    num_contexts: int, questions_each: int, num_facts: int, kinds: tuple[str, ...] = FORWARD
) -> list[Needle]:
    """Long prompts; the questions of one prompt fall in different parts of it."""
    out = []
    for i in range(num_contexts):
        rng = random.Random(f"{EVAL_SEED}/needles/{num_facts}/{i}")
        text, all_questions = needle_prompt(rng, num_facts)
        questions = [q for j, q in enumerate(all_questions) if KINDS[j % len(KINDS)] in kinds]
        per_part = len(questions) // questions_each
        chosen = [rng.choice(questions[j * per_part : (j + 1) * per_part])
                  for j in range(questions_each)]  # fmt: skip
        out.append(
            Needle(
                f"needle-{num_facts}-{i:03d}",
                text,
                tuple({"question": q, "answer": key} for q, _, key in chosen),
            )
        )
    return out


def as_json(item: WordProblem | Needle) -> dict[str, Any]:
    """The item as a JSON line's object."""
    return asdict(item)


def needle_messages(needle: Needle, question: str) -> list[dict[str, str]]:
    """The chat that asks one question of a needle."""
    return [{"role": "user", "content": f"{needle.context}\n\n{question}"}]
