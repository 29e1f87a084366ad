"""Word problems composed from single events, so that verbs and not whole texts carry the sums.

Templates (word_problems.toml) teach their own wording. Here a problem is a chain of events or one
of schemas.py's situations, put into words by wording.py: actors, pronouns, tenses, orders and
sentences that do not matter all vary, so that "loses" takes away and "each" multiplies wherever
they stand.
"""

import random
import re
from collections.abc import Callable

from tiny_m3 import events
from tiny_m3.arithmetic import Problem, step_line, work
from tiny_m3.schemas import PARTS, SCHEMAS, Schema
from tiny_m3.things import draw_words
from tiny_m3.wording import Text, spin, tidy

MAX_START = (20, 60, 150, 400, 900)
MAX_CHANGE = (12, 30, 60, 120, 300)


class Story:
    """Sentences, steps and the running number of one problem."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.text = Text(rng, draw_words(rng))
        self.sentences: list[str] = []
        self.steps: list[tuple[int, str, int, str]] = []  # x, op, y, unit
        self.value = 0
        self.numbers: dict[str, int] = {}

    def say(self, template: str, lead: bool = False, **numbers: int) -> None:
        """Add a sentence, with `lead` perhaps joined to the one before or led in by "Then"."""
        template = spin(template, self.rng)
        named: dict[str, int] = {}
        for slot, value in numbers.items():
            name = f"n{len(self.numbers)}"
            named[name] = self.numbers[name] = value
            template = template.replace(f"{{{slot}}}", f"{{{name}}}")
        if lead and self._joins(template):
            # "Tom has 5 apples and buys 3 more."
            link = self.rng.choice((" and ", ", then ", " and then ", ", and ", " but "))
            added = _without_subject(self.text.fill(template, named))
            self.sentences[-1] = self.sentences[-1].rstrip(". ") + link + added
        else:
            if lead and self.rng.random() < 0.35:
                template = self.rng.choice(events.THEN) + _lower(template)
            self.sentences.append(self.text.fill(template, named))
            if not template.startswith("{S}"):
                self.text.topic = ""

    def _joins(self, template: str) -> bool:
        """Whether a sentence about S goes on with the one before it."""
        return (
            template.startswith("{S} <")
            and self.text.topic == "S"
            and self.sentences[-1].count(" ") < 14
            and self.rng.random() < 0.3
        )

    def step(self, x: int, op: str, y: int, unit: str) -> None:
        """Add a worked step; its result is the new number."""
        self.value = work(x, op, y)[1]
        self.steps.append((x, op, y, unit))

    def filler(self, share: float = 0.15) -> None:
        """Now and then a sentence that does not matter."""
        if self.rng.random() < share:
            self.say(self.rng.choice(events.FILLERS), k=self.rng.randint(6, 60))

    def pick(self, asks: tuple[str, ...]) -> str:
        """One of the questions; none that names somebody of whom the story never spoke."""
        fitting = [a for a in asks if "{S" not in a or "S" in self.text.named]
        return self.rng.choice(fitting or asks)

    def close(self, ask: str, unit: str) -> Problem:
        """The finished problem; `ask` is "question => answer"."""
        rng = self.rng
        question, answer = spin(ask, rng).split(" => ")
        asked = self.text.fill(question, self.numbers)
        if (
            rng.random() < 0.1
            and 0 < len(self.sentences) < 4
            and "!" not in "".join(self.sentences)
        ):
            body = [s.strip().rstrip(".") for s in self.sentences]
            body = [body[0], *(_lower(b) for b in body[1:])]
            listed = ", ".join(body[:-1]) + (" and " if len(body) > 1 else "") + body[-1]
            asked = asked.rstrip("?.")
            if "?" in question and rng.random() < 0.5:
                everything = f"{asked} if {_lower(listed)}?"
            else:
                everything = (
                    f"If {_lower(listed)}, {_lower(asked)}{'?' if '?' in question else '.'}"
                )
        else:
            everything = " ".join([*self.sentences, asked])
        if rng.random() < 0.1:
            everything = _with_signs(everything)
        lines = tuple(
            step_line(x, op, y, self.text.after(counted, {})) for x, op, y, counted in self.steps
        )
        told = {**self.numbers, "ans": self.value}
        final = tidy(self.text.after(answer, told))
        return Problem("composed", tidy(everything), lines, final, self.value, ())


def _without_subject(sentence: str) -> str:
    """Tom buys 3 more. -> buys 3 more. Roles have two words."""
    words = sentence.split(" ")
    start = 2 if words[0].lower() in ("the", "a", "an", "my") else 1
    return " ".join(words[start:])


# Words that begin a sentence and are small within one.
_SMALL = frozenset(
    """The There He She It They A An In On Each Every Half Then Later, After Next, Soon Finally,
    Also, How What At My Another Afterwards, For Everyone One Two If Everything Today Yesterday,
    Delivery""".split()
)


def _lower(sentence: str) -> str:
    """A sentence within another one: its first word small, unless it is a name or I."""
    first = sentence.split(" ")[0]
    return sentence[0].lower() + sentence[1:] if first in _SMALL else sentence


def _with_signs(text: str) -> str:
    """14 dollars -> $14."""
    return re.sub(r"\b(\d+) dollars", r"$\1", text)


def generate(rng: random.Random) -> Problem:
    """One composed problem of one to four steps."""
    kinds: tuple[Callable[[random.Random], Problem], ...] = (_things, _amounts, _situation, _parts)
    while True:
        (kind,) = rng.choices(kinds, (34, 14, 50, 2))
        try:
            return kind(rng)
        except ValueError:  # a result out of range or not whole
            continue


def _change(story: Story, gains: tuple[str, ...], losses: tuple[str, ...], unit: str) -> None:
    """One gain or loss."""
    rng = story.rng
    number = rng.randint(2, rng.choice(MAX_CHANGE))
    if story.value > number + 1 and rng.random() < 0.55:
        story.say(rng.choice(losses), True, n=number)
        story.step(story.value, "-", number, unit)
    else:
        story.say(rng.choice(gains), True, n=number)
        story.step(story.value, "+", number, unit)


def _amounts(rng: random.Random) -> Problem:
    """Money, lengths, volumes, weights, crowds, pages, points, degrees."""
    story = Story(rng)
    amount = rng.choice(events.AMOUNTS)
    story.value = rng.randint(10, rng.choice(MAX_START))
    story.say(rng.choice(amount.starts), n=story.value)
    for _ in range(rng.choice((1, 2, 2, 2, 3))):
        story.filler()
        _change(story, amount.gains, amount.losses, amount.unit)
    return story.close(story.pick(amount.asks), amount.unit)


def _start(story: Story) -> int:
    """The first number of a chain of things; returns how many changes may follow."""
    rng, unit = story.rng, "{x}"
    kind = rng.random()
    if kind < 0.28:
        groups, each = rng.randint(2, rng.choice((9, 15, 25))), rng.randint(2, 30)
        template = spin(rng.choice(events.GROUPS), rng)
        early = template.index("{m}") < template.index("{n}")
        slots = ("m", "n") if early else ("n", "m")
        story.say(template, **{s: groups if s == "m" else each for s in slots})
        story.step(groups, "*", each, unit)
        return rng.choice((0, 1, 1, 2))
    if kind < 0.42:
        a, b = rng.randint(2, rng.choice(MAX_CHANGE)), rng.randint(2, rng.choice(MAX_CHANGE))
        story.say(rng.choice(events.TWO_PARTS), a=a, b=b)
        story.step(a, "+", b, unit)
        return rng.choice((0, 1, 1, 2))
    story.value = rng.randint(4, rng.choice(MAX_START))
    story.say(rng.choice(events.STARTS), n=story.value)
    return rng.choice((0, 1, 1, 2, 2, 2, 3))


def _things(rng: random.Random) -> Problem:
    """Countable things: a start, changes, and a last turn."""
    story, unit = Story(rng), "{x}"
    for _ in range(_start(story)):
        story.filler()
        if rng.random() < 0.1:
            sentence, op, number = rng.choice(events.FACTORS)
            story.say(sentence, True)
            story.step(story.value, op, number, unit)
        elif rng.random() < 0.08 and len(story.steps) < 2:
            groups, each = rng.randint(2, 9), rng.randint(2, 20)
            story.say("{S} [<buy>|<get>|<find>] {m} {box} [of|with] {n} {x}[| each].", True,
                      m=groups, n=each)  # fmt: skip
            before = story.value
            story.step(groups, "*", each, unit)
            story.step(before, "+", story.value, unit)
        else:
            _change(story, events.GAINS, events.LOSSES, unit)
    story.filler(0.1)
    last = rng.random()
    if story.steps and (last < 0.6 or len(story.steps) > 2):
        return story.close(story.pick(events.ASKS), unit)
    if last < 0.72:
        return _share(story)
    if last < 0.82:
        number = rng.randint(2, 12)
        sentence, ask = rng.choice(events.PRICES)
        story.say(sentence, d=number)
        unit = next(u for u in ("dollars", "kilos", "minutes", "{y}") if u in ask)
        story.step(story.value, "*", number, unit)
        return story.close(ask, unit)
    return _compare(story)


def _share(story: Story) -> Problem:
    """The number divided."""
    rng = story.rng
    divisors = [d for d in range(2, 13) if story.value % d == 0 and story.value > d]
    if not divisors:
        raise ValueError("nothing divides it")
    number = rng.choice(divisors)
    sentence, ask = rng.choice(events.SHARES)
    ask = spin(ask, rng)
    story.say(sentence, True, d=number)
    unit = next((u for u in ("{box}", "groups", "{periods}") if u in ask.split("=>")[1]), "{x}")
    story.step(story.value, "/", number, unit)
    return story.close(ask, unit)


def _compare(story: Story) -> Problem:
    """The second person's number, from the first's."""
    rng, unit, first = story.rng, "{x}", story.value
    if rng.random() < 0.3:
        sentence, op, number = rng.choice(events.FACTOR_COMPARES)
        story.say(sentence)
    else:
        sentence, op = rng.choice(events.COMPARES)
        number = rng.randint(2, 9 if op == "*" else rng.choice((12, 50, 90)))
        story.say(sentence, n=number)
    story.step(first, op, number, unit)
    last = rng.random()
    if last < 0.45 and len(story.steps) < 4:
        story.step(first, "+", story.value, unit)
        return story.close(rng.choice(events.BOTH_ASKS), unit)
    if last < 0.55 and op == "/":
        story.step(first, "-", story.value, unit)
        return story.close(rng.choice(events.DIFFERENCE_ASKS), unit)
    return story.close(rng.choice(events.OTHER_ASKS), unit)


def _situation(rng: random.Random) -> Problem:
    """One of the schemas, perhaps with one more event at its end."""
    schema: Schema = rng.choice(SCHEMAS)
    story = Story(rng)
    numbers = schema.draw(rng)
    if min(numbers.values()) < 2:
        raise ValueError("too small a number")
    for sentence in spin(schema.text, rng).split(". "):
        story.sentences.append(story.text.fill(sentence.rstrip(".") + ".", numbers))
        story.filler(0.08)
    story.numbers.update(numbers)
    known = dict(numbers)
    for x, op, y, name, unit in schema.steps:
        values = [int(v) if v.isdigit() else known[v] for v in (x, y)]
        story.step(values[0], op, values[1], unit)
        known[name] = story.value
    return story.close(rng.choice(schema.asks), schema.steps[-1][4])


def _parts(rng: random.Random) -> Problem:
    """The legs of nine cows: one factor is known and not told."""
    story = Story(rng)
    part, each, wholes = rng.choice(PARTS)
    whole, number = rng.choice(wholes), rng.randint(2, 30)
    ask = rng.choice(("How many {part} do {a} {whole} have?", "How many {part} are in {a} {whole}?",
                      "How many {part} have {a} {whole}?", "{a} {whole} have how many {part}?",
                      "How many {part} are there in {a} {whole}?"))  # fmt: skip
    story.text.words.update(part=part, whole=whole)
    story.numbers["a"] = number
    story.step(number, "*", each, part)
    return story.close(f"{ask} => {{a}} {whole} have {{ans}} {part}.", part)
