"""Accuracy with and without the draft: the demo's held-out problems, greedy, answer by answer.

Word problems are scored as GSM8K is: *strict_match* wants the number after ``####`` in the answer,
*flexible_extract* the last number anywhere. Needle questions want a phrase. Both modes answer the
same prompts, and because verification is lossless their answers must be the same.
"""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eaglerun.config import Config
from eaglerun.errors import ConfigError, EngineError
from eaglerun.llm import LLM
from eaglerun.loader import DEMO, Models
from eaglerun.messages import SamplingParams, SpeculationStats
from eaglerun.server.chat import load_chat
from eaglerun.server.protocol import UserMessage
from eaglerun.server.settings import Limits
from eaglerun.start import start_engine

# Word problems of trained templates with new numbers, of templates never trained on, and
# questions about a note far back in a long prompt.
FILES = {
    "seeds": DEMO / "eval" / "word_problems_seeds.jsonl",
    "templates": DEMO / "eval" / "word_problems_templates.jsonl",
    "needles": DEMO / "eval" / "needles.jsonl",
}
TASKS = tuple(FILES)
END_OF_REASONING = "</mm:think>"

_STRICT = re.compile(r"#### *(-?[0-9.,]*[0-9])")
_NUMBER = re.compile(r"-?[0-9][0-9,]*")


@dataclass(frozen=True, slots=True)
class Problem:
    """One question. ``exact``: the answer is a number; else a phrase that must occur."""

    id: str
    task: str
    content: str
    answer: str
    exact: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of one mode: its text, its token ids (of a server: none) and its drafts."""

    text: str
    token_ids: tuple[int, ...]
    speculation: SpeculationStats


@dataclass(frozen=True, slots=True)
class Score:
    """One row of the table: a mode on a task. Rates are shares; per_position by draft position."""

    mode: str
    task: str
    n: int
    flexible_extract: float
    strict_match: float
    acceptance_rate: float
    tokens_per_forward: float
    per_position: tuple[float, ...]


# What answers the problems of one mode: problems -> answers, in order.
Answerer = Callable[[Sequence[Problem]], list[Answer]]


def load_problems(task: str, num: int | None) -> list[Problem]:
    """The first ``num`` problems of a task (None: all). ConfigError for an unknown task."""
    if task not in FILES:
        raise ConfigError(f"task = {task!r}: allowed {', '.join(TASKS)}")
    rows = [json.loads(line) for line in FILES[task].read_text().splitlines()]
    problems = list(_problems(task, rows))
    return problems if num is None else problems[:num]


def _problems(task: str, rows: Iterable[dict[str, Any]]) -> Iterable[Problem]:
    for row in rows:
        if task == "needles":
            for i, asked in enumerate(row["questions"]):
                content = f"{row['context']}\n\n{asked['question']}"
                yield Problem(f"{row['id']}/{i}", task, content, asked["answer"], False)
        else:
            yield Problem(row["id"], task, row["question"], str(row["answer"]), True)


def strict_match(text: str, problem: Problem) -> bool:
    """The number after the first ``####`` behind the reasoning; a phrase behind the reasoning."""
    said = text.rsplit(END_OF_REASONING, 1)[-1]
    if not problem.exact:
        return problem.answer in said
    found = _STRICT.search(said)
    return found is not None and found[1].replace(",", "") == problem.answer


def flexible_extract(text: str, problem: Problem) -> bool:
    """The last number anywhere; a phrase anywhere."""
    if not problem.exact:
        return problem.answer in text
    numbers = _NUMBER.findall(text)
    return bool(numbers) and numbers[-1].replace(",", "") == problem.answer


def score(mode: str, problems: Sequence[Problem], answers: Sequence[Answer]) -> Score:
    steps = sum(a.speculation.steps for a in answers)
    drafted = sum(a.speculation.drafted for a in answers)
    accepted = sum(a.speculation.accepted for a in answers)
    width = max((len(a.speculation.accepted_at) for a in answers), default=0)
    at = [
        sum(a.speculation.accepted_at[i] for a in answers if len(a.speculation.accepted_at) > i)
        for i in range(width)
    ]
    pairs = list(zip(problems, answers, strict=True))
    return Score(
        mode=mode,
        task=problems[0].task,
        n=len(pairs),
        flexible_extract=sum(flexible_extract(a.text, p) for p, a in pairs) / len(pairs),
        strict_match=sum(strict_match(a.text, p) for p, a in pairs) / len(pairs),
        acceptance_rate=accepted / drafted if drafted else 0.0,
        tokens_per_forward=1 + accepted / steps if steps else 1.0,
        per_position=tuple(n / steps for n in at),
    )


def render(models: Models, problems: Sequence[Problem], mode: str) -> list[tuple[int, ...]]:
    """The problems as chats, in the checkpoint's own template and thinking mode."""
    if models.path is None:
        raise ConfigError("chats need a checkpoint with a tokenizer and a chat template")
    chat = load_chat(models.path, Limits())

    async def prompts() -> list[tuple[int, ...]]:
        found = []
        for problem in problems:
            messages = [UserMessage(role="user", content=problem.content)]
            values = {"thinking_mode": mode}
            prompt = await chat.prompt(messages, None, template_kwargs=values)
            found.append(prompt.token_ids)
        return found

    try:
        return asyncio.run(prompts())
    finally:
        chat.close()


def in_process(
    config: Config, models: Models, num_draft_tokens: int, mode: str, max_tokens: int
) -> Answerer:
    """Answers from an engine of this process. ConfigError where acceptance is synthetic."""
    if config.meaningless_text:
        raise ConfigError(
            "synthetic acceptance and scripted tokens make text meaningless: not usable with eval"
        )
    llm = LLM.from_engine(start_engine(config, models))
    params = SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        skip_special_tokens=False,
        num_draft_tokens=num_draft_tokens,
    )

    def answer(problems: Sequence[Problem]) -> list[Answer]:
        outputs = llm.generate(render(models, problems, mode), params)
        return [Answer(o.text, o.token_ids, o.speculation) for o in outputs]

    return answer


def over_http(
    url: str,
    api_key: str | None,
    num_draft_tokens: int | None,
    mode: str,
    max_tokens: int,
    concurrency: int,
) -> Answerer:
    """Answers from a running eaglerun server; ``num_draft_tokens`` None: as the server does."""

    def ask(problem: Problem) -> Answer:
        speculation: dict[str, object] = {"report": True}
        if num_draft_tokens is not None:
            speculation["num_draft_tokens"] = num_draft_tokens
        body = {
            "messages": [{"role": "user", "content": problem.content}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "chat_template_kwargs": {"thinking_mode": mode},
            "speculation": speculation,
        }
        request = urllib.request.Request(
            f"{url.rstrip('/')}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {api_key or 'none'}"},
        )
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as error:
            raise EngineError(f"{url} answered {error.code}: {error.read().decode()}") from error
        message = reply["choices"][0]["message"]
        reasoning = message.get("reasoning_content") or ""
        text = f"{reasoning}{END_OF_REASONING}{message['content'] or ''}"
        report = (reply.get("metrics") or {}).get("speculative_decoding") or {}
        return Answer(text, (), _stats(report))

    def answer(problems: Sequence[Problem]) -> list[Answer]:
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(ask, problems))

    return answer


def _stats(report: dict[str, Any]) -> SpeculationStats:
    """A server's speculative_decoding object as counts."""
    histogram = tuple(report.get("acceptance_histogram") or ())
    return SpeculationStats(
        steps=report.get("num_spec_steps", 0),
        drafted=report.get("num_draft_tokens", 0),
        accepted=report.get("num_accepted_draft_tokens", 0),
        acceptance_histogram=histogram,
        accepted_at=tuple(sum(histogram[i + 1 :]) for i in range(len(histogram) - 1)),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """Scores of all modes and tasks, and how many answers the modes give alike."""

    scores: tuple[Score, ...]
    identical: dict[str, tuple[int, int]]

    def to_json(self) -> dict[str, Any]:
        return {
            "scores": [asdict(s) for s in self.scores],
            "identical_answers": {t: {"same": a, "of": n} for t, (a, n) in self.identical.items()},
        }

    def to_text(self) -> str:
        head = (
            "| mode | task | n | flexible_extract | strict_match | acceptance rate | "
            "tokens per forward | per position |"
        )
        lines = [head, "|---|---|--:|--:|--:|--:|--:|---|"]
        for s in self.scores:
            positions = " / ".join(f"{100 * p:.1f}%" for p in s.per_position) or "-"
            rate = f"{100 * s.acceptance_rate:.2f}%" if s.per_position else "-"
            lines.append(
                f"| {s.mode} | {s.task} | {s.n} | {s.flexible_extract:.4f} | {s.strict_match:.4f} "
                f"| {rate} | {s.tokens_per_forward:.2f} | {positions} |"
            )
        for task, (same, of) in self.identical.items():
            lines.append(f"{task}: {same} of {of} answers are the same in both modes")
        return "\n".join(lines)


def evaluate(modes: dict[str, Answerer], tasks: Sequence[str], num: int | None) -> Report:
    """Run every mode on every task, ``num`` problems of each (None: all)."""
    scores = []
    identical = {}
    for task in tasks:
        problems = load_problems(task, num)
        answers = {name: answerer(problems) for name, answerer in modes.items()}
        scores += [score(name, problems, got) for name, got in answers.items()]
        if len(answers) == 2:
            first, second = answers.values()
            same = sum(
                (a.text, a.token_ids) == (b.text, b.token_ids)
                for a, b in zip(first, second, strict=True)
            )
            identical[task] = (same, len(problems))
    return Report(tuple(scores), identical)


def write_json(report: Report, file: Path) -> None:
    file.write_text(json.dumps(report.to_json(), indent=1) + "\n")
