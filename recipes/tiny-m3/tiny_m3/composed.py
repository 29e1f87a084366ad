"""Word problems composed from single events, so that verbs and not whole texts carry the sums.

Templates teach their own wording; these teach that "loses" takes away and "each" multiplies, in any
order, with sentences in between that do not matter.
"""

import random

from tiny_m3.arithmetic import Problem, work
from tiny_m3.lexicon import NOUNS, PEOPLE, fill

# What happens to a number of things. {n} is the number, {x} the thing; He acts, name2 helps.
GAINS = (
    "{He} finds {n} more.", "{name2} gives {him} {n} {x}.", "Then {he} buys {n} more {x}.",
    "{He} gets {n} {x} as a gift.", "{He} wins {n} {x}.", "On {day} {he} collects {n} more {x}.",
    "Later {n} more {x} arrive.", "{n} new {x} are added.", "{name2} brings {n} {x}.",
    "{He} picks up {n} {x}.", "{He} makes {n} more {x}.", "Another {n} {x} come in.",
)  # fmt: skip
LOSSES = (
    "{He} loses {n} of them.", "{He} gives {n} {x} to {name2}.", "{He} sells {n} of them.",
    "{n} of them break.", "Then {n} {x} are taken away.", "{name2} borrows {n} {x}.",
    "{He} throws away {n} {x}.", "{n} {x} get lost.", "{He} uses {n} of them.",
    "{He} gives away {n} {x}.", "On {day} {n} {x} disappear.", "{n} of the {x} are bad.",
)  # fmt: skip
STARTS = (
    "{name} has {n} {x}.", "{name} starts with {n} {x}.", "There are {n} {x} in the {site}.",
    "{name} owns {n} {x}.", "In a {shop} there are {n} {x}.", "{name} counts {n} {x}.",
    "At first {name} has {n} {x}.", "{name} keeps {n} {x} at home.",
)  # fmt: skip
GROUPS = (
    "{name} has {m} {box} with {n} {x} in each.", "There are {m} rows of {n} {x}.",
    "{name} buys {m} {box} of {n} {x} each.", "{m} children bring {n} {x} each.",
    "{name} fills {m} {box}, and each holds {n} {x}.", "Each of {m} {box} holds {n} {x}.",
    "{name} makes {n} {x} a day for {m} days.", "{m} people have {n} {x} each.",
)  # fmt: skip
SHARES = (
    "They are shared equally among {n} friends. How many {x} does each friend get?",
    "{He} puts them into {n} equal {box}. How many {x} are in each?",
    "{n} children divide them equally. How many {x} does each child get?",
    "They are split into groups of {n}. How many groups are there?",
)  # fmt: skip
PRICES = (
    "Each costs {n} dollars. How many dollars do they cost together?",
    "{name} sells each for {n} dollars. How many dollars does {he} get?",
    "Every one weighs {n} kilos. How many kilos do they weigh?",
    "Each needs {n} minutes. How many minutes does it take?",
)  # fmt: skip
MORE = ("{name2} has {n} more {x} than that.", "{name2} has {n} {x} more.")
FEWER = ("{name2} has {n} fewer {x} than that.", "{name2} has {n} {x} fewer.")
TIMES = ("{name2} has {n} times as many {x}.", "{name2} has {n} times that number.")
ASKS = (
    "How many {x} are there now?", "How many {x} does that make?", "How many {x} are left?",
    "How many {x} are there in the end?", "What is the number of {x} now?",
)  # fmt: skip
OTHER_ASKS = ("How many {x} does {name2} have?", "What is the number of {x} of {name2}?")
BOTH_ASKS = ("How many {x} do both have together?", "How many {x} are there altogether?")
# Money and measures: an amount that rises and falls.
AMOUNTS = (
    ("dollars", "{name} has {n} dollars.",
     ("{He} earns {n} dollars.", "{name2} pays {him} {n} dollars.", "{He} finds {n} dollars.",
      "{He} gets {n} dollars for {his} work."),
     ("{He} spends {n} dollars.", "{He} buys a {x1} for {n} dollars.", 
      "A ticket costs {n} dollars.", "{He} pays {n} dollars for lunch.",
      "{He} gets {n} dollars off.", "{He} loses {n} dollars."),
     "How many dollars does {he} have now?"),
    ("dollars", "A {x1} costs {n} dollars.",
     ("The price goes up by {n} dollars.", "Delivery costs {n} dollars more.",
      "A box for it costs {n} dollars."),
     ("In the sale it is {n} dollars cheaper.", "{name} gets {n} dollars off.",
      "A coupon takes {n} dollars off."),
     "How many dollars does it cost now?"),
    ("meters", "A path is {n} meters long.",
     ("It gets {n} meters longer.", "A piece of {n} meters is added.",
      "A second path is {n} meters longer. We look at the second one."),
     ("It is made {n} meters shorter.", "{n} meters are cut off.",
      "A second path is {n} meters shorter. We look at the second one."),
     "How many meters long is it?"),
    ("liters", "A barrel holds {n} liters of {drink}.",
     ("{n} liters are filled in.", "{name} adds {n} liters.", "It rains {n} liters into it."),
     ("{n} liters run out.", "{name} takes {n} liters.", "{n} liters are drunk."),
     "How many liters are in it now?"),
    ("people", "There are {n} people in the {site}.",
     ("{n} people come in.", "{n} more people arrive.", "A group of {n} people joins them."),
     ("{n} people leave.", "{n} people go home.", "{n} people get off."),
     "How many people are there now?"),
    ("pages", "{name} wants to read {n} pages.",
     ("{name2} tells {him} to read {n} more.", "{n} pages are added."),
     ("{He} reads {n} pages.", "On {day} {he} reads {n} pages.", "{He} skips {n} pages."),
     "How many pages are left?"),
)  # fmt: skip
FILLERS = (
    "It is {day}.", "The sun is shining.", "{name2} is {k} years old.", "The {site} is open.",
    "{name} likes {color}.", "It is {k} o'clock.", "{name2} watches.", "The {shop} is far away.",
    "{name} is happy about it.",
)  # fmt: skip
THINGS = ("fruit", "bake", "toy", "flower", "supply", "tool", "wear", "reading", "animal")


class Story:
    """Sentences, steps and the running number of one problem."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        (name, forms), (name2, _) = rng.sample(PEOPLE, 2)
        self.words = {
            "name": name, "name2": name2, "He": forms[0], "he": forms[1], "his": forms[2],
            "him": forms[3], "x": rng.choice(NOUNS[rng.choice(THINGS)]),
            "x1": rng.choice(("book", "lamp", "coat", "game", "ball", "chair", "kite", "bag")),
            **{slot: rng.choice(NOUNS[slot])
               for slot in ("day", "site", "shop", "box", "color", "drink")},
        }  # fmt: skip
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.value = 0

    def say(self, choices: tuple[str, ...], **numbers: int) -> None:
        """Add one of the sentences."""
        self.sentences.append(self.fill(self.rng.choice(choices), **numbers))

    def fill(self, text: str, **numbers: int) -> str:
        """The sentence; who has not been named yet is named instead of a pronoun."""
        words = {**self.words, **{k: str(v) for k, v in numbers.items()}}
        name = words["name"]
        if not any(name in s for s in self.sentences) and "{name}" not in text:
            words.update(He=name, he=name, him=name, his=name + "'s")
        return fill(text, words)

    def step(self, x: int, op: str, y: int, unit: str) -> None:
        """Add a worked step; its result is the new number."""
        chain, self.value = work(x, op, y)
        self.steps.append(f"{chain} {unit}.")

    def filler(self) -> None:
        """Now and then a sentence that does not matter."""
        if self.rng.random() < 0.2:
            self.say(FILLERS, k=self.rng.randint(6, 60))

    def change(self, gains: tuple[str, ...], losses: tuple[str, ...], unit: str) -> None:
        """One gain or loss."""
        number = self.rng.randint(2, self.rng.choice((12, 60, 120)))
        if self.value > number + 1 and self.rng.random() < 0.5:
            self.say(losses, n=number)
            self.step(self.value, "-", number, unit)
        else:
            self.say(gains, n=number)
            self.step(self.value, "+", number, unit)


def generate(rng: random.Random) -> Problem:
    """One composed problem of one to three steps."""
    while True:
        story = Story(rng)
        try:
            ask, unit = (_amount if rng.random() < 0.3 else _things)(story)
        except ValueError:  # a result out of range or not whole
            continue
        break
    story.sentences.append(story.fill(ask))
    return Problem(
        "composed", " ".join(story.sentences), tuple(story.steps),
        f"The answer is {story.value} {unit}.", story.value, (),
    )  # fmt: skip


def _amount(story: Story) -> tuple[str, str]:
    """Money, length, volume, people, pages."""
    rng = story.rng
    unit, start, gains, losses, ask = rng.choice(AMOUNTS)
    story.value = rng.randint(10, rng.choice((60, 200, 600)))
    story.say((start,), n=story.value)
    for _ in range(rng.randint(1, 3)):
        story.filler()
        story.change(gains, losses, unit)
    return ask, unit


def _things(story: Story) -> tuple[str, str]:
    """Countable things: a start, changes, and a last turn."""
    rng, unit = story.rng, story.words["x"]
    changes = rng.randint(0, 2)
    if rng.random() < 0.45:
        groups, each = rng.randint(2, 15), rng.randint(2, 30)
        story.say(GROUPS, m=groups, n=each)
        story.step(groups, "*", each, unit)
        changes = min(changes, 1)
    else:
        story.value = rng.randint(5, rng.choice((40, 150, 400)))
        story.say(STARTS, n=story.value)
    for _ in range(changes):
        story.filler()
        story.change(GAINS, LOSSES, unit)
    story.filler()
    last = rng.randrange(5) if story.steps else rng.randrange(1, 5)
    if last == 0:
        return rng.choice(ASKS), unit
    if last == 1:
        divisors = [d for d in range(2, 13) if story.value % d == 0 and story.value > d]
        if not divisors:
            raise ValueError("nothing divides it")
        number = rng.choice(divisors)
        ask = rng.choice(SHARES)
        unit = "groups" if "groups" in ask else unit
        story.step(story.value, "/", number, unit)
    elif last == 2:
        number, ask = rng.randint(2, 9), rng.choice(PRICES)
        unit = next(u for u in ("dollars", "kilos", "minutes") if u in ask)
        story.step(story.value, "*", number, unit)
    else:
        first = story.value
        number = _compare(story, unit)
        if last == 4 and len(story.steps) < 3:
            story.step(first, "+", story.value, unit)
            return rng.choice(BOTH_ASKS), unit
        return rng.choice(OTHER_ASKS), unit
    return ask.replace("{n}", str(number)), unit


def _compare(story: Story, unit: str) -> int:
    """The second person's number, from the first's."""
    kind = story.rng.randrange(3)
    number = story.rng.randint(2, 9 if kind == 2 else 50)
    story.say((MORE, FEWER, TIMES)[kind], n=number)
    story.step(story.value, "+-*"[kind], number, unit)
    return number
