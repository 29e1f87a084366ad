"""Prints ten chats with a target as Markdown, unedited: the model card's transcripts.

    python recipes/tiny-m3/transcripts.py configs/demo/target

The recipe's own decoder, fp32, greedy unless the title says temperature 1 (seed 1).
"""

import argparse
from pathlib import Path
from typing import Any

from tiny_m3 import chat_format, checkpoints
from tiny_m3.decoding import Sampling
from tiny_m3.scoring import Speaker
from tiny_m3.structured import CALCULATOR, WEATHER
from tokenizers import Tokenizer

PREFILL = {
    "enabled": chat_format.THINK, "disabled": chat_format.END_THINK, "adaptive": "",
}  # fmt: skip

# (title, thinking mode, temperature, tools, user turns; a turn "tool: ..." is a tool's result)
CHATS: tuple[tuple[str, str, float, list[dict[str, Any]], tuple[str, ...]], ...] = (
    ("A greeting and a question", "adaptive", 0.0, [], ("Hello! Who are you?", "What can you do?")),
    ("A word problem of a trained kind", "adaptive", 0.0, [],
     ("Wilma bakes 7 trays of 24 cookies. She gives 35 cookies to her friends. How many cookies "
      "does Wilma have left?",)),
    ("A word problem in a visitor's words", "adaptive", 0.0, [],
     ("Tom has 23 apples and buys 14 more. He gives 9 to Mia. How many apples does he have left?",
      "A car costs 900 dollars. The price is reduced by 150 dollars. How much does it cost now?")),
    ("Arithmetic without thinking", "disabled", 0.0, [], ("What is 487 + 265?", "38 x 24")),
    ("A story, temperature 1", "disabled", 1.0, [],
     ("Tell me a story about a shy dragon named Olga.", "Thank you!")),
    ("The made-up world, and the real one", "adaptive", 0.0, [],
     ("Which river runs through Dunwick?", "Who wrote Hamlet?")),
    ("JSON", "adaptive", 0.0, [],
     ('Fill this schema from the text. Answer with JSON only.\n{"name": "string", "age": "integer",'
      ' "city": "string"}\n\nText: She lives in Oslo. This is Petra. She is 41 years old.',)),
    ("Tools", "adaptive", 0.0, [CALCULATOR, WEATHER],
     ("What is 48213 times 377?", "tool: 18176301", "Do I need an umbrella in Lisbon?",
      'tool: {"city": "Lisbon", "sky": "rainy", "degrees": 14}')),
    ("Code", "enabled", 0.0, [],
     ("Write a Python function that counts the numbers of a list that are greater than 12.",
      "Write a Python function that sorts a list.")),
    ("Something it never learnt", "adaptive", 0.0, [],
     ("Why is the sky blue?", "Write a poem about the sea.")),
)  # fmt: skip


def chat_lines(speaker: Speaker, chat: tuple[str, str, float, list[Any], tuple[str, ...]]) -> str:
    """One chat as Markdown."""
    title, mode, temperature, tools, turns = chat
    out = [f"### {title}", "", f"Thinking mode `{mode}`.", ""]
    text = ""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if turn.startswith("tool: "):
            # The model's own call stays as it was written; the result follows it.
            result = turn.removeprefix("tool: ")
            text += f"\n]~b]tool\n<response>{result}</response>[e~[\n]~b]ai\n{PREFILL[mode]}"
            out += ["**tool**", "", "```text", result, "```", ""]
        else:
            messages.append({"role": "user", "content": turn})
            text = chat_format.render(
                messages, tools=tools, thinking_mode=mode, add_generation_prompt=True
            )
            out += ["**user**", "", "```text", turn, "```", ""]
        (answer,), _ = speaker.complete([text], Sampling(400, temperature=temperature, seed=1))
        text += answer
        out += ["**tiny-m3**", "", "```text", answer.removesuffix(chat_format.EOS), "```", ""]
        reply = answer.removesuffix(chat_format.EOS).split(chat_format.END_THINK)[-1]
        messages.append({"role": "assistant", "content": reply})
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    speaker = Speaker(checkpoints.load_target(args.target).eval(), tokenizer, 1)
    for chat in CHATS:
        print(chat_lines(speaker, chat))


if __name__ == "__main__":
    main()
