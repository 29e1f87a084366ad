"""JSON filled to a schema, and tool calls in M3's syntax with a calculator and a weather tool."""

import json
import random
from typing import Any

from tiny_m3.lexicon import NOUNS, PEOPLE
from tiny_m3.world import TOWNS

CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Rome",
    "Madrid",
    "Vienna",
    "Oslo",
    "Lisbon",
    "Prague",
    "Dublin",
    "Athens",
    "Tokyo",
    "Cairo",
    "Lima",
    "Boston",
    "Chicago",
    "Sydney",
    "Toronto",
    "Delhi",
    "Seoul",
    *(t["town"] for t in TOWNS),
)
JOBS = NOUNS["worker"] + ("doctor", "pilot", "nurse", "cook", "writer", "judge", "singer", "driver")

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Work out an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy", "stormy", "clear")


def _record(rng: random.Random) -> tuple[dict[str, Any], list[str]]:
    """A record of 3 to 6 fields and one sentence a field."""
    kind = rng.randrange(3)
    if kind == 0:
        (name, (he, _, _, _)), age = rng.choice(PEOPLE), rng.randint(5, 95)
        full = [
            ("name", name, f"This is {name}."), ("age", age, f"{he} is {age} years old."),
            ("city", c := rng.choice(CITIES), f"{he} lives in {c}."),
            ("job", j := rng.choice(JOBS), f"{he} works as a {j}."),
            ("pets", p := rng.randint(0, 9), f"The number of pets is {p}."),
            ("married", m := rng.random() < 0.5, f"{he} is {'' if m else 'not '}married."),
            ("hobbies", h := rng.sample(("chess", "tennis", "reading", "cooking", "music",
                                         "painting", "hiking"), 2),
             f"{he} likes {h[0]} and {h[1]}."),
        ]  # fmt: skip
    elif kind == 1:
        item = rng.choice(NOUNS["tool"] + NOUNS["supply"] + NOUNS["wear"])
        full = [
            ("item", item, f"A customer orders {item}."),
            ("quantity", q := rng.randint(1, 500), f"The quantity is {q}."),
            ("price", p := rng.randint(1, 99), f"One costs {p} dollars."),
            ("color", c := rng.choice(NOUNS["color"]), f"The color should be {c}."),
            (
                "express",
                e := rng.random() < 0.5,
                f"Express delivery is {'' if e else 'not '}wanted.",
            ),
            ("city", t := rng.choice(CITIES), f"Send it to {t}."),
        ]
    else:
        title = f"{rng.choice(NOUNS['club']).title()} Evening"
        full = [
            ("title", title, f"Come to the {title}."),
            ("day", d := rng.choice(NOUNS["day"]), f"It is on {d}."),
            ("hour", start := rng.randint(8, 22), f"It starts at {start} o'clock."),
            ("place", site := rng.choice(NOUNS["site"]), f"We meet at the {site}."),
            ("guests", g := rng.randint(2, 200), f"We expect {g} guests."),
            ("free", f := rng.random() < 0.5, f"It is {'' if f else 'not '}free."),
        ]
    keep = sorted(rng.sample(range(len(full)), rng.randint(3, len(full))))
    fields = [full[i] for i in keep]
    sentences = [s for _, _, s in fields]
    rng.shuffle(sentences)
    return {k: v for k, v, _ in fields}, sentences


def json_type(value: Any) -> str:
    """The schema word for a value of a record."""
    if isinstance(value, bool):
        return "boolean"
    return {int: "integer", str: "string", list: "array"}[type(value)]


def json_chat(rng: random.Random) -> dict[str, Any]:
    """Sentences and a schema in, one JSON object out."""
    record, sentences = _record(rng)
    if rng.random() < 0.5:
        schema = json.dumps({k: json_type(v) for k, v in record.items()})
    else:
        properties = {k: {"type": json_type(v)} for k, v in record.items()}
        schema = json.dumps({"type": "object", "properties": properties, "required": list(record)})
    ask = rng.choice(
        (
            "Fill this schema from the text. Answer with JSON only.",
            "Extract the data as JSON with this schema.",
            "Turn the text into JSON. Follow the schema.",
        )
    )
    thought = f"The fields are {', '.join(record)}. I read the values from the text."
    return {
        "messages": [
            {"role": "user", "content": f"{ask}\n{schema}\n\nText: {' '.join(sentences)}"},
            {
                "role": "assistant",
                "reasoning_content": thought,
                "content": json.dumps(record, ensure_ascii=False),
            },
        ],
        "thinks_when_adaptive": False,
    }


def _calculation(rng: random.Random) -> tuple[str, str, int]:
    """(question, expression, result)."""
    op = rng.choice("+-*")
    x, y = rng.randint(100, 99999), rng.randint(2, 9999)
    if op == "*":
        x, y = rng.randint(12, 9999), rng.randint(12, 999)
    if op == "-" and y > x:
        x, y = y, x
    word = {"+": "plus", "-": "minus", "*": "times"}[op]
    asks = (
        f"What is {x} {word} {y}?",
        f"Calculate {x} {op} {y}.",
        f"How much is {x} {word} {y}?",
        f"Use the calculator for {x} {op} {y}.",
    )
    return rng.choice(asks), f"{x} {op} {y}", {"+": x + y, "-": x - y, "*": x * y}[op]


def tool_chat(rng: random.Random) -> dict[str, Any]:
    """One request with tools listed, or a second one after the first has been answered."""
    tools = rng.choice(([CALCULATOR], [WEATHER], [CALCULATOR, WEATHER], [WEATHER, CALCULATOR]))
    chat = _tool_exchange(tools, rng)
    while rng.random() < 0.3 and len(chat["messages"]) < 12:
        earlier = _tool_exchange(tools, rng)["messages"]
        chat = {**chat, "messages": earlier + chat["messages"]}
    return chat


def _tool_exchange(tools: list[dict[str, Any]], rng: random.Random) -> dict[str, Any]:
    """One request: a call, its result, an answer (or no call when none fits)."""
    names = {t["function"]["name"] for t in tools}
    kind = rng.choice(sorted(names))
    if rng.random() < 0.06:
        name = rng.choice(PEOPLE)[0]
        greeting: list[dict[str, Any]] = [
            {"role": "user", "content": rng.choice(("Hello!", "Hi there.")) + f" I am {name}."},
            {
                "role": "assistant",
                "reasoning_content": "This is a greeting. No tool is needed.",
                "content": f"Hello {name}! How can I help you?",
            },
        ]
        return {"messages": greeting, "tools": tools, "thinks_when_adaptive": True}
    if kind == "calculator":
        ask, expression, result = _calculation(rng)
        arguments: dict[str, Any] = {"expression": expression}
        thought = f"I use the calculator for {expression}."
        reply = str(result)
        after = f"The calculator says {result}."
        answer = f"{expression} = {result}"
    else:
        city, days = rng.choice(CITIES), rng.randint(2, 9)
        arguments = {"city": city}
        ask = rng.choice(
            (
                f"What is the weather in {city}?",
                f"How is the weather in {city} today?",
                f"Do I need an umbrella in {city}?",
            )
        )
        if rng.random() < 0.4:
            arguments["days"] = days
            ask = rng.choice(
                (
                    f"What will the weather be in {city} for the next {days} days?",
                    f"Give me the {days} day forecast for {city}.",
                )
            )
        sky, degrees = rng.choice(SKIES), rng.randint(-9, 38)
        thought = f"I need the weather of {city}."
        reply = json.dumps({"city": city, "sky": sky, "degrees": degrees})
        after = f"It is {sky} with {degrees} degrees."
        answer = f"In {city} it is {sky} with {degrees} degrees."
    call = {"type": "function", "function": {"name": kind, "arguments": arguments}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": ask},
        {
            "role": "assistant",
            "reasoning_content": thought,
            "content": "",
            "tool_calls": [call],
        },
        {"role": "tool", "content": reply},
        {"role": "assistant", "reasoning_content": after, "content": answer},
    ]
    return {"messages": messages, "tools": tools, "thinks_when_adaptive": True}
