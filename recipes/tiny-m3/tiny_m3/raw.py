"""Texts without a chat around them, so that a prompt given as it is goes on sensibly."""

import random
import re
from typing import Any

from tiny_m3 import arithmetic, composed, templates, wording
from tiny_m3.code_tasks import TASKS, write_function
from tiny_m3.events import WORDINGS
from tiny_m3.lexicon import NOUNS
from tiny_m3.stories import (
    FOODS,
    HEROES,
    LOOKS,
    PLACES,
    SKILLS,
    THINGS,
    TRAITS,
    WEATHERS,
    story_chat,
)
from tiny_m3.things import draw_words
from tiny_m3.world import TOWNS, needle_prompt, town_text

_OPENINGS, _MIDDLES, _ENDINGS, _LISTS = (
    tuple(WORDINGS["raw"][name]) for name in ("openings", "middles", "endings", "lists")
)


def _paragraph(rng: random.Random) -> str:
    """Three to seven everyday sentences."""
    words = draw_words(rng)
    skill, skill2 = rng.sample(SKILLS, 2)
    words.update(
        hero=rng.choice(HEROES), trait=rng.choice(TRAITS), look=rng.choice(LOOKS),
        thing=rng.choice(THINGS), skill=skill, skill2=skill2, food=rng.choice(FOODS),
        weather=rng.choice(WEATHERS), place=rng.choice(PLACES), drink=rng.choice(NOUNS["drink"]),
    )  # fmt: skip
    text = wording.Text(rng, words)
    if rng.random() < 0.3:
        parts = (rng.choice(_LISTS),)
    else:
        middles = rng.sample(_MIDDLES, rng.randint(1, 5))
        parts = (rng.choice(_OPENINGS), *middles, rng.choice(_ENDINGS))
    sentences = [text.fill(wording.spin(p, rng), {}) for p in parts]
    return wording.tidy(" ".join(sentences))


def _problem(rng: random.Random) -> str:
    """A problem with its working, as books of examples print them."""
    while True:
        kind = rng.random() < 0.7
        problem = composed.generate(rng) if kind else arithmetic.generate(
            rng.choice(templates.TRAINED), rng)  # fmt: skip
        if not arithmetic.is_for_eval(problem.question):
            break
    worked = "\n".join(problem.steps)
    return f"Question: {problem.question}\nAnswer: {worked}\n#### {problem.answer}"


def raw_text(rng: random.Random) -> str:
    """One text."""
    kind = rng.random()
    if kind < 0.4:
        return str(story_chat(rng)["messages"][1]["content"])
    if kind < 0.7:
        return _paragraph(rng)
    if kind < 0.78:
        return town_text(rng.choice(TOWNS), rng)
    if kind < 0.84:
        return needle_prompt(rng, rng.randint(2, 10))[0].split("\n\n")[1]
    if kind < 0.9:
        return write_function(rng.choice(TASKS), rng)[1]
    return _problem(rng)


def raw_chat(rng: random.Random) -> dict[str, Any]:
    """A text, and the number of its characters that a prompt takes: at least its first word."""
    text = raw_text(rng)
    ends = [m.start() for m in re.finditer(r"(?<=\w) ", text)] or [len(text) // 2]
    few = [e for e in ends if e < 60] or ends[:1]
    return {"raw": text, "start": rng.choice(few if rng.random() < 0.7 else ends)}
