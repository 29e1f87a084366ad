"""Scores: exact match of answers, and how much of a draft's chain the target accepts."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from tiny_m3 import chat_format, evalsets, tasks
from tiny_m3.decoding import Sampling, generate
from tiny_m3.draft import Eagle3Draft
from tiny_m3.evalsets import Needle, WordProblem
from tiny_m3.model import TinyM3

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9][0-9,]*")


def content_of(text: str) -> str:
    """The answer after the reasoning; all of it when none was closed."""
    return text.split(chat_format.END_THINK)[-1].removesuffix(chat_format.EOS)


def strict_match(text: str, answer: int) -> bool:
    """GSM8K's strict-match: the number after the first `####` of the answer."""
    match = _STRICT.search(content_of(text))
    return match is not None and match[1].replace(",", "").rstrip(".") == str(answer)


def flexible_match(text: str, answer: int) -> bool:
    """GSM8K's flexible-extract: the last number anywhere."""
    numbers = _NUMBER.findall(text)
    return bool(numbers) and numbers[-1].replace(",", "") == str(answer)


class Speaker:
    """A target with its tokenizer: text in, text out."""

    def __init__(self, model: TinyM3, tokenizer: Tokenizer, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.eos = chat_format.id_of(tokenizer, chat_format.EOS)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def complete(
        self, prompts: Sequence[str], sampling: Sampling
    ) -> tuple[list[str], list[tuple[list[int], list[int]]]]:
        """Continuations as text, and (prompt ids, output ids) of each."""
        ids = [self.encode(p) for p in prompts]
        outputs = generate(self.model, ids, sampling, self.eos, self.batch)
        texts = self.tokenizer.decode_batch(outputs, skip_special_tokens=False)
        return texts, list(zip(ids, outputs, strict=True))

    def word_problems(
        self, problems: Sequence[WordProblem], mode: str, max_new: int
    ) -> tuple[dict[str, float], list[str], list[tuple[list[int], list[int]]]]:
        """Greedy scores, the texts, and the token sequences (for the draft)."""
        prompts = [
            chat_format.render(
                [{"role": "user", "content": p.question}],
                thinking_mode=mode,
                add_generation_prompt=True,
            )
            for p in problems
        ]
        texts, sequences = self.complete(prompts, Sampling(max_new))
        strict = [strict_match(t, p.answer) for t, p in zip(texts, problems, strict=True)]
        flexible = [flexible_match(t, p.answer) for t, p in zip(texts, problems, strict=True)]
        scores = {
            "n": len(problems),
            "strict_match": sum(strict) / len(strict),
            "flexible_extract": sum(flexible) / len(flexible),
        }
        return scores, texts, sequences

    def needles(
        self, items: Sequence[Needle], full_attention: bool, max_new: int
    ) -> tuple[float, float, list[tuple[list[int], list[int]]]]:
        """(share of right answers, mean prompt tokens, sequences) of all questions."""
        prompts, keys = [], []
        for item in items:
            for q in item.questions:
                messages = evalsets.needle_messages(item, q["question"])
                prompts.append(chat_format.render(messages, add_generation_prompt=True))
                keys.append(q["answer"])
        sampling = Sampling(max_new, full_attention=full_attention)
        texts, sequences = self.complete(prompts, sampling)
        right = sum(k in content_of(t) for t, k in zip(texts, keys, strict=True))
        mean_len = sum(len(p) for p, _ in sequences) / len(sequences)
        return right / len(keys), mean_len, sequences

    def same_text(self, samples: Sequence[tasks.Sample], max_new: int) -> float:
        """Share of samples whose first answer turn comes out word for word."""
        prompts = [s.prompts()[0] for s in samples]
        texts, _ = self.complete(prompts, Sampling(max_new))
        return sum(
            s.text().startswith(p + t) for s, p, t in zip(samples, prompts, texts, strict=True)
        ) / len(samples)


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Rounds of K drafts: per_position[i] is the share of rounds that accept i + 1 or more."""

    rounds: int
    drafted: int
    accepted: int
    per_position: tuple[float, ...]

    @property
    def rate(self) -> float:
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_forward(self) -> float:
        return 1 + self.accepted / max(self.rounds, 1)

    def report(self) -> dict[str, object]:
        """The numbers for a JSON file."""
        return {
            "rounds": self.rounds,
            "acceptance_rate": round(self.rate, 4),
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "per_position": [round(p, 4) for p in self.per_position],
        }


@torch.no_grad()
def acceptance(
    target: TinyM3,
    draft: Eagle3Draft,
    sequences: Sequence[tuple[list[int], list[int]]],
    num_draft_tokens: int,
    batch: int,
) -> Acceptance:
    """What a chain of greedy drafts would have accepted along greedy outputs of the target.

    While all drafts of a chain are accepted they are the target's own tokens, so the chain from
    every row can be computed at once with `Eagle3Draft.passes`; the rounds are then walked.
    """
    k = num_draft_tokens
    reached = [0] * k
    rounds = 0
    for start in range(0, len(sequences), batch):
        part = sequences[start : start + batch]
        good = _matches(target, draft, part, k)  # [K, rows, S] bool, on the CPU
        for r, (prompt, output) in enumerate(part):
            row, last = len(prompt) - 1, len(prompt) + len(output) - 1
            # A round on `row` drafts the tokens row + 2 ... row + 1 + K.
            while row + 2 <= last:
                n = 0
                while n < k and row + n + 2 <= last and good[n, r, row + n]:
                    reached[n] += 1
                    n += 1
                rounds += 1
                row += n + 1
    accepted = sum(reached)
    return Acceptance(rounds, rounds * k, accepted, tuple(x / max(rounds, 1) for x in reached))


def _matches(
    target: TinyM3, draft: Eagle3Draft, part: Sequence[tuple[list[int], list[int]]], k: int
) -> torch.Tensor:
    """[K, rows, S]: whether the draft of pass s on row r is the token r + 2."""
    device = target.embed.weight.device
    block = target.config.block_size
    length = -(-max(len(p) + len(o) for p, o in part) // block) * block
    ids = torch.zeros(len(part), length + 2, dtype=torch.long)
    positions = torch.zeros(len(part), length, dtype=torch.long)
    for i, (prompt, output) in enumerate(part):
        n = len(prompt) + len(output)
        ids[i, :n] = torch.tensor(prompt + output)
        positions[i, :n] = torch.arange(n)
    ids, positions = ids.to(device), positions.to(device)
    full = torch.zeros(len(part), dtype=torch.bool, device=device)
    _, taps, _, _ = target(ids[:, :length], positions, full, taps=draft.config.taps)
    states = draft.passes(ids[:, 1 : length + 1], taps, positions, k)
    guesses = torch.stack([draft.lm_head(s).argmax(-1) for s in states])
    return (guesses == ids[:, 2 : length + 2]).cpu()
