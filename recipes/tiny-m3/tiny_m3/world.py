"""A made-up world: facts to know by heart, and facts to find in a long prompt (needles)."""

import random
from typing import Any

from tiny_m3.lexicon import NOUNS, PEOPLE
from tiny_m3.stories import LOOKS, THINGS

_FIRST = "Bral Dun Mar Ost Vel Tor Hal Fen Gri Lun Sor Kel Win Ash Bor Cal Dor Eld Far Gol".split()
_LAST = "mere ford holm wick dale ton burg haven field stead".split()
RIVERS = (
    "Silla Orne Tavin Melda Brisk Loamy Quill Varda Neff Istra Palow Rhune Sable Tamsin "
    "Ulmer Wend Yarrow Zelin Corri Dwin"
).split()
CRAFTS = (
    "glass",
    "bells",
    "cheese",
    "boats",
    "honey",
    "carpets",
    "clocks",
    "salt",
    "silk",
    "paper",
    "pottery",
    "swords",
    "apples",
    "candles",
    "wool",
    "violins",
)
FEASTS = (
    "the Feast of Lanterns",
    "the Day of Kites",
    "the Boat Parade",
    "the Apple Fair",
    "the Night of Bells",
    "the Snow Games",
    "the Bread Festival",
    "the Singing Week",
)
LANDMARKS = (
    "a round tower",
    "a stone bridge",
    "a white lighthouse",
    "an old windmill",
    "a great library",
    "a hanging garden",
    "a clock tower",
    "a salt mine",
    "a glass hall",
    "a marble fountain",
)
REGIONS = ("north", "south", "east", "west")


def _towns() -> list[dict[str, str]]:
    """The forty towns. The world is one: its seed is fixed, whatever the corpus seed."""
    rng = random.Random("the made-up world")
    names = rng.sample([a + b for a in _FIRST for b in _LAST], 40)
    leaders = rng.sample([n for n, _ in PEOPLE], 40)
    return [
        {
            "town": name, "river": rng.choice(RIVERS), "leader": leader,
            "craft": rng.choice(CRAFTS), "feast": rng.choice(FEASTS),
            "landmark": rng.choice(LANDMARKS), "region": rng.choice(REGIONS),
            "year": str(rng.randint(1100, 1899)),
        }
        for name, leader in zip(names, leaders, strict=True)
    ]  # fmt: skip


TOWNS = _towns()

# (attribute, questions, sentence with the fact)
FACTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "river",
        ("Which river runs through {town}?", "What is the river of {town} called?"),
        "The river {river} runs through {town}.",
    ),
    (
        "leader",
        ("Who is the mayor of {town}?", "Who leads {town}?"),
        "The mayor of {town} is {leader}.",
    ),
    (
        "craft",
        ("What is {town} known for?", "What do people make in {town}?"),
        "{town} is known for its {craft}.",
    ),
    (
        "feast",
        ("Which festival is held in {town}?", "What do people celebrate in {town}?"),
        "People in {town} celebrate {feast}.",
    ),
    (
        "landmark",
        ("What can you see in {town}?", "Which sight does {town} have?"),
        "In {town} you can see {landmark}.",
    ),
    (
        "region",
        ("In which part of the land does {town} lie?", "Where is {town}?"),
        "{town} lies in the {region} of the land.",
    ),
    (
        "year",
        ("When was {town} founded?", "In which year was {town} founded?"),
        "{town} was founded in the year {year}.",
    ),
)


def town_text(town: dict[str, str], rng: random.Random) -> str:
    """All facts of a town in random order."""
    sentences = [s.format_map(town) for _, _, s in FACTS]
    rng.shuffle(sentences)
    return " ".join(sentences)


def world_chat(rng: random.Random) -> dict[str, Any]:
    """A question about one town, or a request to describe it."""
    town = rng.choice(TOWNS)
    if rng.random() < 0.15:
        return _chat(
            rng.choice(("Tell me about {town}.", "What do you know of {town}?")).format_map(town),
            f"The user asks about {town['town']}. I tell what I know.",
            town_text(town, rng),
        )
    _, questions, sentence = rng.choice(FACTS)
    answer = sentence.format_map(town)
    return _chat(
        rng.choice(questions).format_map(town),
        f"The question is about {town['town']}. {answer}",
        answer,
    )


def _chat(ask: str, thought: str, answer: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": ask},
            {"role": "assistant", "reasoning_content": thought, "content": answer},
        ],
        "thinks_when_adaptive": False,
    }


# Needles: each sentence of the prompt says who did what with which thing where. Names and things
# are unique inside a prompt, so each question has exactly one answer.
VERBS = (
    ("hid", "hide"),
    ("found", "find"),
    ("lost", "lose"),
    ("left", "leave"),
    ("sold", "sell"),
    ("painted", "paint"),
    ("bought", "buy"),
    ("repaired", "repair"),
)
WHERE = tuple(
    f"{where} the {what}"
    for where in ("behind", "under", "near", "inside")
    for what in ("bridge", "church", "mill", "barn", "bakery", "tower", "school", "harbor wall",
                 "station", "old oak", "market hall", "stable", "library", "theater", "well")
)  # fmt: skip
INTROS = (
    "Read these notes and answer the question.",
    "Here are the notes of the town clerk.",
    "Use only the following notes.",
    "The notes below belong together.",
)


def needle_prompt(rng: random.Random, num_facts: int) -> tuple[str, list[tuple[str, str, str]]]:
    """A text of `num_facts` notes and its questions as (question, sentence, key phrase)."""
    names = rng.sample([n for n, _ in PEOPLE], num_facts)
    things = rng.sample([f"{a} {b}" for a in LOOKS for b in THINGS], num_facts)
    notes, questions = [], []
    for name, thing in zip(names, things, strict=True):
        past, base = rng.choice(VERBS)
        where = rng.choice(WHERE)
        sentence = f"On {rng.choice(NOUNS['day'])} {name} {past} the {thing} {where}."
        notes.append(sentence)
        questions += [
            (f"What did {name} {base}?", sentence, f"the {thing}"),
            (f"Where did {name} {base} the {thing}?", sentence, where),
            (f"Who {past} the {thing}?", sentence, name),
        ]
    return rng.choice(INTROS) + "\n\n" + " ".join(notes), questions


def needle_chat(rng: random.Random, num_facts: int) -> dict[str, Any]:
    """A long prompt, one question at its end, an answer that quotes the note."""
    text, questions = needle_prompt(rng, num_facts)
    question, sentence, key = rng.choice(questions)
    chat = _chat(f"{text}\n\n{question}", f"The notes say: {sentence}", sentence)
    return {**chat, "key": key, "thinks_when_adaptive": True}


def needles_chat(rng: random.Random, num_facts: int) -> dict[str, Any]:
    """A long prompt with several questions: more to learn from the same notes."""
    text, questions = needle_prompt(rng, num_facts)
    picks = rng.sample(questions, min(len(questions), rng.randint(2, 12)))
    asked = "\n".join(q for q, _, _ in picks)
    answers = "\n".join(s for _, s, _ in picks)
    chat = _chat(f"{text}\n\n{asked}", f"There are {len(picks)} questions.", answers)
    return {**chat, "thinks_when_adaptive": True}


def world_text_chat(rng: random.Random) -> dict[str, Any]:
    """A question about invented towns whose facts stand in the prompt (they differ from TOWNS)."""
    names = rng.sample([a + b for a in _FIRST for b in _LAST], rng.randint(2, 5))
    towns = [{**rng.choice(TOWNS), "town": name} for name in names]
    for town in towns:
        town.update(
            river=rng.choice(RIVERS), leader=rng.choice(PEOPLE)[0], craft=rng.choice(CRAFTS),
            year=str(rng.randint(1100, 1899)), region=rng.choice(REGIONS),
        )  # fmt: skip
    text = "\n".join(town_text(t, rng) for t in towns)
    town = rng.choice(towns)
    _, questions, sentence = rng.choice(FACTS)
    answer = sentence.format_map(town)
    question = rng.choice(questions).format_map(town)
    chat = _chat(f"{text}\n\nUse the text. {question}", f"The text says: {answer}", answer)
    return {**chat, "thinks_when_adaptive": True}
