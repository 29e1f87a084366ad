"""Turns marked-up sentences into English: choices, actors with their pronouns, verbs, numbers.

Markup of a sentence:
  [a|b|c]          one of the alternatives, which may be empty and may nest
  {S} {O} {T}      an actor as subject: a name, or a pronoun where nobody can mistake it
  {Sm} {Ss}        the same as object (him) and as possessive (his); likewise for O and T
  {Sn}             the actor's name
  <give>           the verb for the nearest subject before it, in the tense of the text
  <+give> <do:S>   the verb for a plural subject, and for the named actor
  {a} ... {n}      numbers;  every other slot is a word of the text
"""

import random
import re
from dataclasses import dataclass

from tiny_m3.lexicon import PEOPLE
from tiny_m3.things import IRREGULAR, MORE_NAMES, ROLES

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_TOKEN = re.compile(r"\{(\w+)\}|<([+\w]+(?: \w+)*)(?::(\w))?>")
_START = re.compile(r"((?:^|[.?!\n] ))([a-z])")
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()


@dataclass(frozen=True, slots=True)
class Actor:
    """Somebody who acts. person: "3" (he, she, it), "I" or "they"."""

    first: str
    later: str
    forms: tuple[str, str, str]  # subject, object, possessive
    person: str = "3"


def _all_people() -> tuple[Actor, ...]:
    named = [(n, (f[1], f[3], f[2])) for n, f in PEOPLE]
    named += [(n, ("she", "her", "her")) for n in MORE_NAMES["girls"]]
    named += [(n, ("he", "him", "his")) for n in MORE_NAMES["boys"]]
    return tuple(Actor(n, n, f) for n, f in named)


NAMED = _all_people()
RELATIVES = (
    "friend sister brother mother father uncle aunt neighbor cousin teacher grandmother grandfather"
).split()
ME = Actor("I", "I", ("I", "me", "my"), "I")


def draw_actors(rng: random.Random) -> dict[str, Actor]:
    """The three actors of a text: mostly people with names, now and then I or somebody's role."""
    people = rng.sample(NAMED, 3)
    actors = dict(zip("SOT", people, strict=True))
    kind = rng.random()
    if kind < 0.12:
        actors["S"] = ME
    elif kind < 0.24:
        word, forms = rng.choice(ROLES)
        actors["S"] = Actor(f"{article(word)} {word}", f"the {word}", forms)
    if rng.random() < 0.12:
        word = rng.choice(RELATIVES)
        female = word in ("sister", "mother", "aunt", "grandmother") or rng.random() < 0.3
        forms = ("she", "her", "her") if female else ("he", "him", "his")
        owner = {"I": "my"}.get(actors["S"].person, actors["S"].forms[2])
        actors["O"] = Actor(f"{owner} {word}", f"{owner} {word}", forms)
    return actors


def article(word: str) -> str:
    """a or an."""
    return "an" if word[0] in "aeiou" else "a"


def spin(text: str, rng: random.Random) -> str:
    """Decide every [a|b|c], the innermost first."""
    while "[" in text:
        text = _CHOICE.sub(lambda m: rng.choice(m[1].split("|")), text)
    return text


def conjugate(verb: str, person: str, past: bool) -> str:
    """give -> gives, gave; a second word (pick up) stays as it is."""
    base, _, rest = verb.partition(" ")
    tail = f" {rest}" if rest else ""
    if base == "be":
        if past:
            return ("was" if person in ("3", "I") else "were") + tail
        return {"3": "is", "I": "am", "they": "are"}[person] + tail
    if past:
        return IRREGULAR.get(base, _regular_past(base)) + tail
    if person != "3":
        return verb
    if base == "have":
        return "has" + tail
    if base.endswith(("s", "sh", "ch", "x", "o", "z")):
        return base + "es" + tail
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ies" + tail
    return base + "s" + tail


def _regular_past(base: str) -> str:
    if base.endswith("e"):
        return base + "d"
    if base.endswith("y") and base[-2] not in "aeiou":
        return base[:-1] + "ied"
    if base in ("drop", "stop", "plan", "swap", "trim", "grab", "pop", "jog", "rip", "slip"):
        return base + base[-1] + "ed"
    return base + "ed"


class Text:
    """One text in the making: who was named, which tense, which words, which numbers where."""

    def __init__(self, rng: random.Random, words: dict[str, str]) -> None:
        self.rng, self.words = rng, words
        self.actors = draw_actors(rng)
        self.past = rng.random() < 0.4
        self.named: set[str] = set()
        self.topic = ""  # the last subject
        self.spelled = 0.25 if rng.random() < 0.4 else 0.0  # share of small numbers in words

    def fill(self, template: str, numbers: dict[str, int]) -> str:
        """The sentence."""
        subject = "3"
        clause: str = ""

        ended = 0

        def replace(match: re.Match[str]) -> str:
            nonlocal subject, clause, ended
            if ". " in template[ended : match.start()]:
                subject, clause = "3", ""
            ended = match.end()
            slot, verb, of = match[1], match[2], match[3]
            if verb is not None:
                if of is not None:
                    person = self.actors[of].person
                elif verb[0] == "+":
                    verb, person = verb[1:], "they"
                else:
                    person = subject
                past = self.past
                if verb == "do" and past:
                    past = self.rng.random() < 0.35
                return conjugate(verb, person, past)
            if slot in numbers:
                return self._number(numbers[slot])
            if slot[0] in self.actors and slot[1:] in ("", "m", "s", "n"):
                if slot[1:] == "":
                    subject, clause = self.actors[slot].person, slot
                return self._mention(slot[0], slot[1:], clause)
            return self.words[slot]

        return _TOKEN.sub(replace, template)

    def _number(self, value: int) -> str:
        spelled = value <= 20 and self.rng.random() < self.spelled
        return NUMBER_WORDS[value] if spelled else str(value)

    def _mention(self, who: str, form: str, subject: str) -> str:
        actor = self.actors[who]
        known = who in self.named
        self.named.add(who)
        if actor.person == "I":
            return {"": "I", "m": "me", "s": "my", "n": "I"}[form]
        name = actor.later if known else actor.first
        if form == "n":
            return actor.later if known else actor.first
        others = [a for k, a in self.actors.items() if k != who and k in self.named]
        clear = known and all(a.forms[0] != actor.forms[0] for a in others)
        if form == "":
            pronoun = known and (clear or self.topic == who) and self.rng.random() < 0.7
            self.topic = who
            return actor.forms[0] if pronoun else name
        same = subject == who
        if form == "s":
            pronoun = known and (same or clear) and (same or self.rng.random() < 0.6)
            return actor.forms[2] if pronoun else name + "'s"
        pronoun = known and clear and not same and self.rng.random() < 0.7
        return actor.forms[1] if pronoun else name

    def after(self, template: str, numbers: dict[str, int]) -> str:
        """An answer sentence: the second person for I, names else, always in the present."""
        filled = template
        for who, actor in self.actors.items():
            you = actor.person == "I"
            name = actor.later.removeprefix("my ")
            if actor.later.startswith("my "):
                name = "your " + name
            for form, yours in (("", "you"), ("m", "you"), ("s", "your"), ("n", "you")):
                word = yours if you else name + ("'s" if form == "s" else "")
                filled = filled.replace(f"{{{who}{form}}}", word)
            person = "they" if you else actor.person
            filled = re.sub(
                rf"<(\w+):{who}>", lambda m, p=person: conjugate(m[1], p, False), filled
            )
        words = {**self.words, **{k: str(v) for k, v in numbers.items()}}
        return re.sub(r"\{(\w+)\}", lambda m: words[m[1]], filled)


def tidy(text: str) -> str:
    """Single spaces, no space before a mark of punctuation, capitals at the start of sentences."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r" ([.,?!])", r"\1", text)
    text = re.sub(r"\b([Aa]) (?=[aeio]|hour\b)", r"\1n ", text)
    return _START.sub(lambda m: m[1] + m[2].upper(), text)
