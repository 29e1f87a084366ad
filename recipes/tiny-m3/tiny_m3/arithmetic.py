"""Word problems from templates: numbers, worked steps, answer.

A small model adds 46 and 38 reliably when the text takes the second number apart by place value:
46 + 38 = 46 + 30 + 8 = 76 + 8 = 84. `work` writes such chains; every link of a chain is a fact a
model of this size can learn (a digit table, a round number, one carry).
"""

import random
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from tiny_m3.lexicon import choose_words, fill

MAX_VALUE = 5000
EVAL_SHARE = 64  # one problem in 64 can only be evaluated on, never trained on

_STEP = re.compile(r"\[(\w+)([-+*/])(\w+)=(\w+)\]")


@dataclass(frozen=True, slots=True)
class Template:
    """One kind of word problem.

    question  text with word slots and number slots
    steps     sentences, each with one [x op y=z]: x and y are numbers or earlier results, z names
              the result; the last result is `ans`
    final     the sentence in front of `#### ans`
    answer    the same answer as one Python expression over the numbers (for the tests; the
              generator never evaluates it)
    numbers   slot -> "lo-hi", "lo-hi*k" (a multiple of k) or "=x*y" (from earlier slots)
    """

    name: str
    question: str
    steps: tuple[str, ...]
    final: str
    answer: str
    numbers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question, its worked steps, the answer sentence and the answer."""

    template: str
    question: str
    steps: tuple[str, ...]
    final: str
    answer: int
    values: tuple[tuple[str, int], ...]


def place_parts(n: int) -> list[int]:
    """347 -> [300, 40, 7]; zeros are left out."""
    digits = str(n)
    parts = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits)]
    return [p for p in parts if p] or [0]


def _sum_chain(first: int, parts: list[int], op: str) -> list[str]:
    """first op p0 op p1 ... worked from the left, one link a part."""
    links = [f" {op} ".join(str(x) for x in [first, *parts])]
    while parts:
        first = first + parts[0] if op == "+" else first - parts[0]
        parts = parts[1:]
        links.append(f" {op} ".join(str(x) for x in [first, *parts]))
    return links


def work(x: int, op: str, y: int) -> tuple[str, int]:
    """The worked chain "x op y = ... = z" and z. Raises ValueError when z is not a whole number,
    not positive or beyond MAX_VALUE."""
    head = f"{x} {'x' if op == '*' else op} {y}"
    if op in "+-":
        result = x + y if op == "+" else x - y
        parts = place_parts(y)
        links = _sum_chain(x, parts, op)[1:] if len(parts) == 1 else _sum_chain(x, parts, op)
    elif op == "*":
        result = x * y
        links = _product_links(x, y)
    else:
        if y == 0 or x % y:
            raise ValueError(f"{head} is not a whole number")
        result = x // y
        parts = place_parts(result)
        links = [str(result)]
        if len(parts) > 1 and result > 12:
            split = " + ".join(f"{p * y} / {y}" for p in parts)
            links = [split, *_sum_chain(parts[0], parts[1:], "+")]
    if not 0 < result <= MAX_VALUE:
        raise ValueError(f"{head} = {result} is out of range")
    return " = ".join([head, *links]), result


def _product_links(x: int, y: int) -> list[str]:
    """The links after "x x y": both factors taken apart unless a table or a zero will do."""
    if x <= 10 or y <= 10:
        small, large = (y, x) if y <= 10 else (x, y)
        parts = place_parts(large)
        if len(parts) == 1 or small == 10:
            return [str(x * y)]
        split = " + ".join(f"{p} x {small}" for p in parts)
        products = [p * small for p in parts]
        return [split, *_sum_chain(products[0], products[1:], "+")]
    products = [p * q for q in place_parts(y) for p in place_parts(x)]
    split = " + ".join(f"{x} x {q}" for q in place_parts(y))
    links = [] if len(place_parts(y)) == 1 else [split]
    return links + _sum_chain(products[0], products[1:], "+")


def draw_numbers(template: Template, rng: random.Random) -> dict[str, int]:
    """Values of the number slots, not yet checked against the steps."""
    return draw_slots(template.numbers, rng)


def draw_slots(specs: Iterable[tuple[str, str]], rng: random.Random) -> dict[str, int]:
    """A value for every (slot, specification of Template.numbers)."""
    values: dict[str, int] = {}
    for slot, spec in specs:
        if spec.startswith("="):
            values[slot] = _operate(spec[1:], values)
            continue
        bounds, _, step = spec.partition("*")
        low, high = (int(v) for v in bounds.split("-"))
        k = int(step or 1)
        values[slot] = rng.randint(-(-low // k), high // k) * k
    return values


def _operate(expression: str, values: dict[str, int]) -> int:
    """x*y, x+y or x-y of two slots or literals."""
    match = re.fullmatch(r"(\w+)([-+*])(\w+)", expression)
    if match is None:
        raise ValueError(f"cannot read the number spec ={expression}")
    x, y = (int(v) if v.isdigit() else values[v] for v in (match[1], match[3]))
    return {"+": x + y, "-": x - y, "*": x * y}[match[2]]


def step_line(x: int, op: str, y: int, rest: str) -> str:
    """One line of working: the chain, and what its result counts."""
    return f"{work(x, op, y)[0]} {rest}."


def _worked(template: Template, values: dict[str, int]) -> tuple[list[tuple[str, str]], int]:
    """The chains, each with the words that follow it in the template, and the answer."""
    known = dict(values)
    steps: list[tuple[str, str]] = []
    for step in template.steps:
        match = _STEP.search(step)
        if match is None:
            raise ValueError(f"template {template.name}: no [x op y=z] in {step!r}")
        x, y = (int(v) if v.isdigit() else known[v] for v in (match[1], match[3]))
        chain, known[match[4]] = work(x, match[2], y)
        steps.append((chain, step[match.end() :].strip(" .:")))
    return steps, known["ans"]


def generate(template: Template, rng: random.Random) -> Problem:
    """One problem; numbers are drawn again until every step is a whole positive number."""
    while True:
        values = draw_numbers(template, rng)
        try:
            steps, answer = _worked(template, values)
        except ValueError:
            continue
        break
    everything = " ".join([template.question, *template.steps, template.final])
    words = choose_words(everything, rng)
    words.update({slot: str(v) for slot, v in values.items()}, ans=str(answer))
    lines = tuple(f"{chain} {fill(rest, words)}".strip() + "." for chain, rest in steps)
    return Problem(
        template.name,
        fill(template.question, words),
        lines,
        fill(template.final, words),
        answer,
        tuple(values.items()),
    )


def is_for_eval(question: str) -> bool:
    """Whether a question belongs to the evaluation side of the split, by a hash of its text.

    The split is by content, so no problem of the held-out seeds can be in the training text.
    """
    return zlib.crc32(question.encode()) % EVAL_SHARE == 0
