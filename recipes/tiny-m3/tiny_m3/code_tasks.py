"""Small Python functions: a request, the function, and a test of it that the test suite runs."""

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CodeTask:
    """asks: requests; body: the function with slots {f} (its name), {v} (its parameter) and {k} (a
    constant); thought: what the reasoning says; check: (arguments, expected result) with {k}."""

    name: str
    asks: tuple[str, ...]
    body: str
    thought: str
    check: tuple[str, str]
    constants: tuple[int, int] = (2, 9)


TASKS = (
    CodeTask("add_k", ("adds {k} to a number", "returns a number plus {k}"),
             "def {f}({v}):\n    return {v} + {k}", "I add {k} and return the result.",
             ("10", "10 + {k}"), (2, 99)),
    CodeTask("times_k", ("multiplies a number by {k}", "returns {k} times a number"),
             "def {f}({v}):\n    return {v} * {k}", "I multiply by {k} and return the result.",
             ("7", "7 * {k}"), (2, 99)),
    CodeTask("total", ("returns the sum of a list", "adds up all numbers of a list"),
             "def {f}({v}):\n    total = 0\n    for x in {v}:\n        total += x\n"
             "    return total",
             "I start with zero and add every number.", ("[1, 2, 3]", "6")),
    CodeTask("sum_squares", ("returns the sum of the squares of a list",),
             "def {f}({v}):\n    return sum(x * x for x in {v})",
             "I square every number and sum the squares.", ("[1, 2, 3]", "14")),
    CodeTask("largest", ("finds the largest number of a list", "returns the maximum of a list"),
             "def {f}({v}):\n    best = {v}[0]\n    for x in {v}:\n        if x > best:\n"
             "            best = x\n    return best",
             "I keep the best number seen so far.", ("[3, 9, 4]", "9")),
    CodeTask("smallest", ("finds the smallest number of a list", "returns the minimum of a list"),
             "def {f}({v}):\n    best = {v}[0]\n    for x in {v}:\n        if x < best:\n"
             "            best = x\n    return best",
             "I keep the smallest number seen so far.", ("[3, 9, 4]", "3")),
    CodeTask("is_even", ("checks if a number is even",),
             "def {f}({v}):\n    return {v} % 2 == 0", "A number is even if the remainder is zero.",
             ("8", "True")),
    CodeTask("divisible", ("checks if a number is divisible by {k}",),
             "def {f}({v}):\n    return {v} % {k} == 0",
             "I look at the remainder of the division by {k}.", ("{k} * 3", "True"), (3, 99)),
    CodeTask("reverse", ("reverses a string", "returns a string backwards"),
             "def {f}({v}):\n    return {v}[::-1]", "A slice with step -1 turns it around.",
             ("'abc'", "'cba'")),
    CodeTask("vowels", ("counts the vowels of a string",),
             "def {f}({v}):\n    return sum(1 for c in {v} if c in \"aeiou\")",
             "I count the letters that are in aeiou.", ("'banana'", "3")),
    CodeTask("palindrome", ("checks if a word is a palindrome",),
             "def {f}({v}):\n    return {v} == {v}[::-1]",
             "A palindrome is equal to itself backwards.", ("'level'", "True")),
    CodeTask("factorial", ("computes the factorial of a number",),
             "def {f}({v}):\n    result = 1\n    for i in range(2, {v} + 1):\n        result *= i\n"
             "    return result", "I multiply all numbers up to it.", ("5", "120")),
    CodeTask("fibonacci", ("returns the Fibonacci number at a position",),
             "def {f}({v}):\n    a, b = 0, 1\n    for _ in range({v}):\n        a, b = b, a + b\n"
             "    return a", "I keep the last two numbers and add them.", ("10", "55")),
    CodeTask("evens", ("keeps only the even numbers of a list",),
             "def {f}({v}):\n    return [x for x in {v} if x % 2 == 0]",
             "I filter the list by the remainder.", ("[1, 2, 3, 4]", "[2, 4]")),
    CodeTask("above", ("keeps the numbers of a list that are greater than {k}",),
             "def {f}({v}):\n    return [x for x in {v} if x > {k}]",
             "I keep each number greater than {k}.", ("[0, {k}, {k} + 1]", "[{k} + 1]"), (2, 99)),
    CodeTask("count_above", ("counts the numbers of a list that are greater than {k}",),
             "def {f}({v}):\n    count = 0\n    for x in {v}:\n        if x > {k}:\n"
             "            count += 1\n    return count",
             "I count each number greater than {k}.", ("[0, {k}, {k} + 1]", "1"), (2, 99)),
    CodeTask("average", ("returns the average of a list",),
             "def {f}({v}):\n    return sum({v}) / len({v})",
             "The average is the sum divided by the length.", ("[2, 4]", "3")),
    CodeTask("words", ("counts the words of a text",),
             "def {f}({v}):\n    return len({v}.split())", "I split the text and count the parts.",
             ("'a b c'", "3")),
    CodeTask("longest", ("finds the longest word of a text",),
             "def {f}({v}):\n    return max({v}.split(), key=len)",
             "I split the text and take the longest part.", ("'a bcd ef'", "'bcd'")),
    CodeTask("double_all", ("multiplies every number of a list by {k}",),
             "def {f}({v}):\n    return [x * {k} for x in {v}]",
             "I make a new list with each number times {k}.", ("[1, 2]", "[{k}, 2 * {k}]")),
    CodeTask("first_k", ("returns the first {k} items of a list",),
             "def {f}({v}):\n    return {v}[:{k}]", "A slice takes the first {k} items.",
             ("list(range(20))", "list(range({k}))")),
    CodeTask("last_k", ("returns the last {k} items of a list",),
             "def {f}({v}):\n    return {v}[-{k}:]", "A slice takes the last {k} items.",
             ("list(range(20))", "list(range(20))[-{k}:]")),
    CodeTask("unique", ("removes the duplicates from a list",),
             "def {f}({v}):\n    seen = []\n    for x in {v}:\n        if x not in seen:\n"
             "            seen.append(x)\n    return seen",
             "I keep an item only if I have not seen it.", ("[1, 2, 1]", "[1, 2]")),
    CodeTask("power", ("raises a number to the power of {k}",),
             "def {f}({v}):\n    return {v} ** {k}", "I use the power operator with {k}.",
             ("2", "2 ** {k}")),
    CodeTask("celsius", ("turns Celsius into Fahrenheit",),
             "def {f}({v}):\n    return {v} * 9 / 5 + 32", "The formula is c * 9 / 5 + 32.",
             ("100", "212")),
    CodeTask("digits", ("returns the sum of the digits of a number",),
             "def {f}({v}):\n    return sum(int(d) for d in str({v}))",
             "I turn the number into text and add its digits.", ("123", "6")),
    CodeTask("count_to", ("prints the numbers from 1 to {k}",),
             "def {f}():\n    for i in range(1, {k} + 1):\n        print(i)",
             "A loop over the range prints each number.", ("", "None"), (3, 99)),
    CodeTask("join", ("joins a list of words with spaces",),
             "def {f}({v}):\n    return \" \".join({v})", "The join method puts spaces between.",
             ("['a', 'b']", "'a b'")),
)  # fmt: skip

_FUNCTION_NAMES = ("solve", "compute", "run", "work", "f")
_PARAMETERS = {
    "list": ("numbers", "items", "values"),
    "text": ("text", "word", "s"),
    "number": ("n", "x", "number"),
}


def _parameter(task: CodeTask, rng: random.Random) -> str:
    ask = task.asks[0]
    kind = "list" if "list" in ask else "text"
    if "number" in ask and "list" not in ask or "Celsius" in ask:
        kind = "number"
    choices = [p for p in _PARAMETERS[kind] if f" {p} " not in task.body]
    return rng.choice(choices)


def write_function(task: CodeTask, rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """(request, function text, slots)."""
    slots = {
        "f": rng.choice((task.name, task.name, rng.choice(_FUNCTION_NAMES))),
        "v": _parameter(task, rng),
        "k": rng.randint(*task.constants),
    }
    what = rng.choice(task.asks).format(**slots)
    ask = rng.choice(
        (
            "Write a Python function that {what}.",
            "Please write a function that {what}.",
            "I need a Python function that {what}.",
            "Show me Python code that {what}.",
            "How do I write a Python function that {what}?",
        )
    ).format(what=what)
    if slots["f"] != task.name or rng.random() < 0.3:
        ask += f" Call it {slots['f']}."
    return ask, task.body.format(**slots), slots


def code_chat(rng: random.Random) -> dict[str, Any]:
    """A request for a function and the function in a fenced block."""
    task = rng.choice(TASKS)
    ask, body, slots = write_function(task, rng)
    content = f"```python\n{body}\n```"
    if rng.random() < 0.5:
        content = "Here is the function:\n\n" + content
    return {
        "messages": [
            {"role": "user", "content": ask},
            {
                "role": "assistant",
                "reasoning_content": task.thought.format(**slots),
                "content": content,
            },
        ],
        "thinks_when_adaptive": False,
    }
