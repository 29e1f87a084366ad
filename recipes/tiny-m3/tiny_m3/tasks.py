"""The mix of chats: which task, which thinking mode, one turn or several.

A chat is {"messages", "tools"?, "thinks_when_adaptive"}; `Sample` is a chat with its mode chosen,
ready for the template.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiny_m3 import arithmetic, chat_format, composed, templates
from tiny_m3.code_tasks import code_chat
from tiny_m3.raw import raw_chat
from tiny_m3.recall import lookup_chat, repeat_chat
from tiny_m3.small_talk import talk_chat
from tiny_m3.spelling import spelling_chat
from tiny_m3.stories import story_chat
from tiny_m3.structured import json_chat, tool_chat
from tiny_m3.world import needle_chat, needles_chat, world_chat, world_text_chat

Chat = dict[str, Any]
MODES = ("enabled", "adaptive", "disabled")
MODE_WEIGHTS = (45, 30, 25)

SYSTEM_TEXTS = (
    "You are a helpful assistant.", "Be brief.", "You are a friendly assistant.",
    "Answer the user.", "You are a patient teacher.", "Be polite and clear.",
    "You are an assistant in a chat window.",
)  # fmt: skip
ASK_BEFORE = ("Solve this problem: ", "Here is a problem. ", "Please help me: ", "Question: ")
ASK_AFTER = (" Think step by step.", " Show your steps.", " Give the number.",
             "\nEnd with #### and the number.")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """A chat as the template takes it. `key` is the phrase that a right answer contains.

    A text without a chat stands in `raw`; a prompt takes its first `start` characters.
    """

    task: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    mode: str
    key: str | None
    raw: str = ""
    start: int = 0

    def text(self) -> str:
        """The whole chat as training text."""
        if self.raw:
            return self.raw + chat_format.EOS
        return chat_format.render(self.messages, tools=self.tools, thinking_mode=self.mode)

    def prompts(self) -> list[str]:
        """One generation prompt for every assistant turn after the last user turn."""
        if self.raw:
            return [self.raw[: self.start]]
        last_user = max(i for i, m in enumerate(self.messages) if m["role"] == "user")
        return [
            chat_format.render(
                self.messages[:i],
                tools=self.tools,
                thinking_mode=self.mode,
                add_generation_prompt=True,
            )
            for i, m in enumerate(self.messages)
            if m["role"] == "assistant" and i > last_user
        ]


def problem_chat(problem: arithmetic.Problem, question: str) -> Chat:
    """A word problem: the steps as reasoning, or in the answer when there is no reasoning."""
    steps = "\n".join(problem.steps)
    return {
        "messages": [
            {"role": "user", "content": question},
            {
                "role": "assistant",
                "reasoning_content": steps,
                "content": f"{problem.final}\n#### {problem.answer}",
                "content_without_reasoning": f"{steps}\n#### {problem.answer}",
            },
        ],
        "thinks_when_adaptive": True,
    }


def word_chat(rng: random.Random) -> Chat:
    """A problem of a trained template that is not on the evaluation side of the split."""
    while True:
        problem = arithmetic.generate(rng.choice(templates.TRAINED), rng)
        if not arithmetic.is_for_eval(problem.question):
            break
    return _asked(problem, rng)


def composed_chat(rng: random.Random) -> Chat:
    """A problem composed from single events."""
    return _asked(composed.generate(rng), rng)


def _asked(problem: arithmetic.Problem, rng: random.Random) -> Chat:
    """The problem with now and then a wish before or after the question, or written carelessly."""
    question = problem.question
    if rng.random() < 0.05:
        question = question.lower()
    if rng.random() < 0.15:
        question = rng.choice(ASK_BEFORE) + question
    if rng.random() < 0.15:
        question += rng.choice(ASK_AFTER)
    return problem_chat(problem, question)


def sum_chat(rng: random.Random) -> Chat:
    """Bare arithmetic with the same worked steps, sometimes of several numbers."""
    if rng.random() < 0.15:
        return _long_sum(rng)
    op = rng.choice("+-*/")
    while True:
        x, y = rng.randint(2, 999), rng.randint(2, 999)
        if op == "*":
            x, y = rng.randint(2, 99), rng.randint(2, 30)
        if op == "/":
            y = rng.randint(2, 12)
            x = y * rng.randint(2, 150)
        try:
            chain, result = arithmetic.work(x, op, y)
        except ValueError:
            continue
        break
    sign = "x" if op == "*" else op
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[op]
    ask = rng.choice((f"What is {x} {sign} {y}?", f"What is {x} {word} {y}?", f"{x} {sign} {y}",
                      f"{x}{sign}{y}=?", f"Calculate {x} {sign} {y}."))  # fmt: skip
    return {
        "messages": [
            {"role": "user", "content": ask},
            {
                "role": "assistant",
                "reasoning_content": chain,
                "content": f"{x} {sign} {y} = {result}",
                "content_without_reasoning": chain,
            },
        ],
        "thinks_when_adaptive": True,
    }


def _long_sum(rng: random.Random) -> Chat:
    """Three or four numbers added and taken away, from the left."""
    value = first = rng.randint(2, 300)
    words, lines = [str(first)], []
    for _ in range(rng.randint(2, 3)):
        number = rng.randint(2, rng.choice((20, 99, 300)))
        op = "-" if number < value and rng.random() < 0.5 else "+"
        chain, value = arithmetic.work(value, op, number)
        lines.append(chain)
        words += [op, str(number)]
    sums = " ".join(words)
    told = sums
    if rng.random() < 0.5:
        told = sums.replace("+", "plus").replace("-", "minus")
    ask = rng.choice(("What is {}?", "{}", "Calculate {}.", "{} = ?", "How much is {}?"))
    steps = "\n".join(lines)
    return {
        "messages": [
            {"role": "user", "content": ask.format(told)},
            {
                "role": "assistant",
                "reasoning_content": steps,
                "content": f"{sums} = {value}",
                "content_without_reasoning": f"{steps}\n{sums} = {value}",
            },
        ],
        "thinks_when_adaptive": True,
    }


def short_needle_chat(rng: random.Random) -> Chat:
    """Notes of up to about 400 tokens."""
    maker = needles_chat if rng.random() < 0.6 else needle_chat
    return maker(rng, rng.randint(2, 20))


def long_needle_chat(rng: random.Random) -> Chat:
    """Notes of about 450 to 1,900 tokens."""
    if rng.random() < 0.6:
        return needles_chat(rng, rng.randint(22, 140))
    return needle_chat(rng, rng.randint(32, 155))


def conversation(rng: random.Random, num_turns: int) -> Chat:
    """Several short exchanges in one chat; only the last turn keeps its reasoning."""
    makers = (
        talk_chat,
        talk_chat,
        story_chat,
        word_chat,
        composed_chat,
        sum_chat,
        world_chat,
        code_chat,
        spelling_chat,
        repeat_chat,
    )
    chats = [rng.choice(makers)(rng) for _ in range(num_turns)]
    messages = [m for chat in chats for m in chat["messages"]]
    return {**chats[-1], "messages": messages}


def short_conversation(rng: random.Random) -> Chat:
    """Two or three exchanges."""
    return conversation(rng, rng.randint(2, 3))


def long_conversation(rng: random.Random) -> Chat:
    """Five to ten exchanges."""
    return conversation(rng, rng.randint(5, 10))


# task -> (maker, share of the chats of its pool)
SHORT: dict[str, tuple[Callable[[random.Random], Chat], float]] = {
    "word": (word_chat, 22),
    "composed": (composed_chat, 75),
    "sum": (sum_chat, 7),
    "story": (story_chat, 8),
    "world": (world_chat, 5),
    "world_text": (world_text_chat, 5),
    "needle": (short_needle_chat, 8),
    "json": (json_chat, 7),
    "tools": (tool_chat, 7),
    "code": (code_chat, 6),
    "talk": (talk_chat, 8),
    "spelling": (spelling_chat, 4),
    "repeat": (repeat_chat, 7),
    "lookup": (lookup_chat, 8),
    "conversation": (short_conversation, 7),
    "raw": (raw_chat, 12),
}
LONG: dict[str, tuple[Callable[[random.Random], Chat], float]] = {
    "needle": (long_needle_chat, 80),
    "conversation": (long_conversation, 20),
}


def choose_mode(chat: Chat, task: str, mode: str, rng: random.Random) -> Sample:
    """Fix the thinking mode of a chat and drop the reasoning that the mode does not show."""
    if "raw" in chat:
        return Sample(task, [], None, mode, None, chat["raw"], chat["start"])
    thinks = mode == "enabled" or (mode == "adaptive" and chat["thinks_when_adaptive"])
    last_user = max(i for i, m in enumerate(chat["messages"]) if m["role"] == "user")
    messages = []
    for i, message in enumerate(chat["messages"]):
        clean = {k: v for k, v in message.items() if k != "content_without_reasoning"}
        if message["role"] == "assistant" and i > last_user and not thinks:
            del clean["reasoning_content"]
            clean["content"] = message.get("content_without_reasoning", message["content"])
        messages.append(clean)
    if rng.random() < 0.2:
        messages.insert(0, {"role": "system", "content": rng.choice(SYSTEM_TEXTS)})
    return Sample(task, messages, chat.get("tools"), mode, chat.get("key"))


def draw(
    pool: dict[str, tuple[Callable[[random.Random], Chat], float]], rng: random.Random
) -> Sample:
    """One sample of a pool."""
    (task,) = rng.choices(list(pool), [share for _, share in pool.values()])
    chat = pool[task][0](rng)
    (mode,) = rng.choices(MODES, MODE_WEIGHTS)
    return choose_mode(chat, task, mode, rng)
