"""Greedy answers with the draft against those of the plain engine, each difference explained.

Plain and EAGLE3 steps sum the same numbers in another order, so in bf16 their answers part at near
ties. Each answer is compared up to the first token that differs, which divergence.Replay explains,
from what both runs selected; what it cannot explain fails the check.

With --acceptance the drafts come from a script, the plain answers with wrong tokens at seeded
places, so that a pair of random weights is judged at a realistic acceptance.
"""

import argparse
import dataclasses
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eaglerun.bench.divergence import KINDS, Explanation, Replay, Selections
from eaglerun.bench.table import Columns, Table, number, percent, say
from eaglerun.config import Config
from eaglerun.errors import ConfigError
from eaglerun.llm import LLM
from eaglerun.loader import Models, cache_dtypes, load_models
from eaglerun.messages import MAX_DRAFT_TOKENS, SamplingParams
from eaglerun.plan.draft_length import FixedDraftLength
from eaglerun.plan.step import StepPlan, StepResult
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine

# A sequence may end so many tokens before max_model_len that its last drafts need no cutting.
_ROOM = MAX_DRAFT_TOKENS + 1


@dataclass(frozen=True, slots=True)
class Options:
    """What the flags say; see add_flags."""

    num_drafts: tuple[int, ...]
    num_prompts: int
    prompts: str
    input_lens: tuple[int, int]
    output_len: int
    acceptance: float | None
    seed: int
    out: Path | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first token of an answer that differs.

    at        its number in the answer
    context   tokens before it, the prompt's included
    plain, draft  the token of the run without the draft, and of the one with it; -1: it had ended
    """

    sequence: int
    at: int
    context: int
    plain: int
    draft: int
    explanation: Explanation


@dataclass(frozen=True, slots=True)
class Row:
    """One K against the plain run.

    identical    sequences without a divergence
    tokens       compared: of each answer up to its divergence, that token included
    acceptance   accepted / drafted in those; None where nothing was drafted
    tokens_per_step  emitted by a decode step of a sequence, in those
    by_kind      divergences by Explanation.kind
    undone       those that are explained with some selections undone (Explanation.undone)
    seconds      generating;  explaining_s: replaying
    """

    num_draft_tokens: int
    sequences: int
    identical: int
    tokens: int
    acceptance: float | None
    tokens_per_step: float | None
    by_kind: dict[str, int]
    undone: int
    per_1000: float
    seconds: float
    explaining_s: float
    divergences: tuple[Divergence, ...]


COLUMNS: Columns[Row] = {
    "K": lambda r, _: str(r.num_draft_tokens),
    "sequences": lambda r, _: str(r.sequences),
    "identical": lambda r, _: str(r.identical),
    "tokens compared": lambda r, _: str(r.tokens),
    "accepted": lambda r, _: percent(r.acceptance, 1),
    "tokens per step": lambda r, _: number(r.tokens_per_step),
    "near tie": lambda r, _: str(r.by_kind["tokens"]),
    "expert's": lambda r, _: str(r.by_kind["experts"]),
    "block's": lambda r, _: str(r.by_kind["blocks"]),
    "some undone": lambda r, _: str(r.undone),
    "unexplained": lambda r, _: str(r.by_kind["unexplained"]),
    "per 1,000 tokens": lambda r, _: number(r.per_1000, 3),
    "s": lambda r, _: number(r.seconds, 1),
}


class Judged:
    """An engine's observer: how many drafts were judged and accepted at which place of which
    answer. Sequences are told apart by their seeds, 0, 1 .."""

    def __init__(self, sequences: int) -> None:
        # (tokens of the answer before the step, drafted, accepted)
        self._steps: list[list[tuple[int, int, int]]] = [[] for _ in range(sequences)]
        self._emitted = [0] * sequences
        self._owner: dict[int, int] = {}

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        for admission in plan.admissions:
            self._owner[admission.slot_id] = admission.seed
            self._emitted[admission.seed] = admission.num_output_tokens
        for row, emitted, accepted in zip(
            plan.decode, result.decode, result.num_accepted, strict=True
        ):
            owner = self._owner[row.slot_id]
            self._steps[owner].append((self._emitted[owner], row.num_drafts, accepted))
            self._emitted[owner] += len(emitted)
        for chunk, token in zip(plan.prefill, result.prefill, strict=True):
            self._emitted[self._owner[chunk.slot_id]] += token >= 0

    def totals(self, ends: Sequence[int]) -> tuple[int, int, int]:
        """Steps, drafts and accepted drafts, as far as all tokens of a step come before the
        answer's end."""
        within = [
            step
            for steps, end in zip(self._steps, ends, strict=True)
            for step in steps
            if step[0] + step[1] < end
        ]
        return len(within), sum(s[1] for s in within), sum(s[2] for s in within)


def first_difference(plain: Sequence[int], draft: Sequence[int]) -> int | None:
    """The first place where two answers differ; one that ends early differs where it ends."""
    for at, (a, b) in enumerate(zip(plain, draft, strict=False)):
        if a != b:
            return at
    return None if len(plain) == len(draft) else min(len(plain), len(draft))


def right_rate(acceptance: float, num_drafts: int) -> float:
    """How often each draft must be right for ``acceptance`` = accepted / drafted, where those
    behind a wrong one are lost: sum of p^i, i = 1 .. K, = acceptance x K."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        accepted = sum(middle**i for i in range(1, num_drafts + 1))
        low, high = (middle, high) if accepted < acceptance * num_drafts else (low, middle)
    return low


def script_of(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    rate: float,
    vocab_size: int,
    seed: int,
) -> Callable[[int, int], Tensor]:
    """Script.write: the answer of sequence i at its places, each token right with
    probability ``rate``, for the sequence whose seed is i."""

    def write(sequence: int, length: int) -> Tensor:
        rng = random.Random(f"{seed}/{sequence}")
        tokens = [
            token if rng.random() < rate else (token + rng.randrange(1, vocab_size)) % vocab_size
            for token in answers[sequence]
        ]
        script = torch.zeros(length, dtype=torch.int64)
        start = len(prompts[sequence])
        script[start : start + len(tokens)] = torch.tensor(tokens)
        return script

    return write


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to all prompts by one engine, and what it did for them."""

    tokens: list[tuple[int, ...]]
    judged: Judged
    selections: Selections


class Check:
    """The models of a Config, the prompts, and the plain engine's answers to them."""

    def __init__(self, config: Config, options: Options) -> None:
        """Raises  ConfigError where there is no draft, or prompts and answers are too long."""
        if config.model.draft is None:
            raise ConfigError("draft = none: there is nothing to compare with the plain engine")
        self._options = options
        self._config = self._settings(config, max(1, *options.num_drafts))
        say("loading the models")
        self.models = load_models(self._config, progress=sys.stderr.isatty())
        spec = self.models.target.spec
        limit = min(
            self._config.model.max_model_len or spec.max_position_embeddings,
            spec.max_position_embeddings,
        )
        if options.prompts == "random":
            self.prompts = random_prompts(options, spec.vocab_size)
        elif options.prompts == "demo":
            self.prompts = demo_prompts(self.models, options.num_prompts)
        else:
            self.prompts = read_prompts(Path(options.prompts), options.num_prompts)
        longest = max(map(len, self.prompts)) + options.output_len
        if longest > limit:
            raise ConfigError(
                f"--output-len {options.output_len}: the longest prompt and answer are {longest} "
                f"tokens, max_model_len is {limit}"
            )
        self._blocks = sorted(
            (
                -(-(len(prompt) + options.output_len + _ROOM) // spec.sparse_block_size)
                for prompt in self.prompts
            ),
            reverse=True,
        )
        dtype = self.models.target.embed_tokens.weight.dtype
        tokens = sum(map(len, self.prompts))
        say(f"{self.models.name} in {dtype}; {len(self.prompts)} prompts, {tokens} tokens")
        self.table: Table[Row] = Table("lossless", COLUMNS, options.out, self._config.to_toml())
        self._longest = longest + _ROOM
        self._replay = Replay(self.models.target, longest, cache_dtypes(config, dtype))

    def run(self) -> bool:
        """One row for each K; whether every difference was explained."""
        begun = time.perf_counter()
        plain = self.answers(None, None)
        tokens = sum(map(len, plain.tokens))
        say(f"plain: {tokens} tokens, {time.perf_counter() - begun:.1f} s")
        for k in self._options.num_drafts:
            begun = time.perf_counter()
            draft = self.answers(k, plain)
            self.table.add(self._compare(k, plain, draft, time.perf_counter() - begun))
        return not any(row.by_kind["unexplained"] for row in self.table.rows)

    def answers(self, num_drafts: int | None, plain: Run | None) -> Run:
        """Every prompt's answer, of an engine of its own: plain for None, else with K drafts a
        step."""
        options, vocab_size = self._options, self.models.target.spec.vocab_size
        config = self._settings(self._config, 0 if num_drafts is None else max(num_drafts, 1))
        seqs = min(config.scheduling.max_num_seqs, len(self.prompts))
        config = dataclasses.replace(
            config,
            cache=dataclasses.replace(config.cache, num_kv_blocks=sum(self._blocks[:seqs])),
            scheduling=dataclasses.replace(config.scheduling, max_num_seqs=seqs),
        )
        policy = None if num_drafts is None else FixedDraftLength(num_drafts)
        engine = start_engine(config, self.models, policy)
        if options.acceptance is not None and num_drafts and plain is not None:
            rate = right_rate(options.acceptance, num_drafts)
            script = runner_of(engine).script
            assert script is not None
            script.write = script_of(self.prompts, plain.tokens, rate, vocab_size, options.seed)
        judged = Judged(len(self.prompts))
        engine.observer = judged
        selections = Selections(runner_of(engine), len(self.prompts), self._longest)
        # Random prompts have no end of their own.
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=options.output_len,
                ignore_eos=options.prompts == "random",
                seed=i,
            )
            for i in range(len(self.prompts))
        ]
        outputs = LLM.from_engine(engine).generate(self.prompts, params, progress=False)
        selections.stop()
        del engine
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Run([output.token_ids for output in outputs], judged, selections)

    def _settings(self, config: Config, num_draft_tokens: int) -> Config:
        """As configured, but for what would make the answers mean something else."""
        options = self._options
        scripted = options.acceptance is not None and num_draft_tokens > 0
        model = config.model
        if options.prompts == "random":
            longest = options.input_lens[1] + options.output_len + _ROOM
            model = dataclasses.replace(model, max_model_len=longest)
        return dataclasses.replace(
            config,
            model=model,
            speculation=dataclasses.replace(
                config.speculation,
                num_draft_tokens=num_draft_tokens,
                synthetic_acceptance_length=None,
                synthetic_acceptance_rate=None,
                scripted="drafts" if scripted else "none",
            ),
            output=dataclasses.replace(config.output, log_stats_every=0),
        )

    def _compare(self, num_drafts: int, plain: Run, draft: Run, seconds: float) -> Row:
        begun = time.perf_counter()
        found: list[Divergence] = []
        ends: list[int] = []
        for i, (a, b) in enumerate(zip(plain.tokens, draft.tokens, strict=True)):
            at = first_difference(a, b)
            ends.append(len(a) if at is None else at)
            if at is not None:
                found.append(self._explained(i, at, plain, draft))
        by_kind = {kind: sum(d.explanation.kind == kind for d in found) for kind in KINDS}
        tokens = sum(ends) + len(found)
        steps, drafted, accepted = draft.judged.totals(ends)
        return Row(
            num_draft_tokens=num_drafts,
            sequences=len(ends),
            identical=len(ends) - len(found),
            tokens=tokens,
            acceptance=accepted / drafted if drafted else None,
            tokens_per_step=1 + accepted / steps if steps else None,
            by_kind=by_kind,
            undone=sum(
                any(d.explanation.undone) and d.explanation.kind != "unexplained" for d in found
            ),
            per_1000=1000 * len(found) / max(tokens, 1),
            seconds=seconds,
            explaining_s=time.perf_counter() - begun,
            divergences=tuple(found),
        )

    def _explained(self, sequence: int, at: int, plain: Run, draft: Run) -> Divergence:
        runs = (plain, draft)
        first, second = (run.tokens[sequence] for run in runs)
        prefix = [*self.prompts[sequence], *first[:at]]
        if at < min(len(first), len(second)):
            tokens = (first[at], second[at])
            paths = (
                plain.selections.of(sequence, len(prefix)),
                draft.selections.of(sequence, len(prefix)),
            )
            explanation = self._replay.explain(prefix, tokens, paths)
        else:
            # Equal as far as both go, and yet one ended: no rounding does that.
            tokens = (_token(first, at), _token(second, at))
            explanation = Explanation("unexplained")
        found = Divergence(sequence, at, len(prefix), *tokens, explanation)
        if explanation.kind == "unexplained":
            say(f"unexplained: {found}")
        return found


def _token(answer: Sequence[int], at: int) -> int:
    return answer[at] if at < len(answer) else -1


def random_prompts(options: Options, vocab_size: int) -> list[tuple[int, ...]]:
    """Random ids; lengths evenly spread over input_lens, in seeded order."""
    rng = random.Random(options.seed)
    low, high = options.input_lens
    parts = max(options.num_prompts - 1, 1)
    lengths = [low + (high - low) * i // parts for i in range(options.num_prompts)]
    rng.shuffle(lengths)
    return [tuple(rng.choices(range(vocab_size), k=length)) for length in lengths]


def demo_prompts(models: Models, count: int) -> list[tuple[int, ...]]:
    """The demo's held-out problems of all tasks as chats, in one thinking mode after the other.

    Raises  ConfigError where that is fewer than ``count``.
    """
    # Chat templates need packages of a web server, which may be missing where one only measures.
    from eaglerun.bench.evaluate import TASKS, load_problems, render

    problems = [problem for task in TASKS for problem in load_problems(task, None)]
    prompts: list[tuple[int, ...]] = []
    for mode in ("adaptive", "disabled", "enabled"):
        prompts += render(models, problems[: count - len(prompts)], mode)
    if len(prompts) < count:
        raise ConfigError(f"--num-prompts {count}: the demo has {len(prompts)} problems")
    return prompts


def read_prompts(file: Path, count: int) -> list[tuple[int, ...]]:
    """The first ``count`` of a file's prompts: JSON, a list of lists of token ids.

    Raises  ConfigError where it is something else, or holds fewer.
    """
    try:
        lists = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts {file}: {error}") from None
    if not isinstance(lists, list) or not all(
        isinstance(ids, list) and ids and all(type(token) is int for token in ids) for ids in lists
    ):
        raise ConfigError(f"--prompts {file}: expected a list of lists of token ids")
    if len(lists) < count:
        raise ConfigError(f"--num-prompts {count}: {file} has {len(lists)}")
    return [tuple(ids) for ids in lists[:count]]


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--num-drafts", default="0,1,3,7", metavar="K,K", help="each against the plain engine"
    )
    group.add_argument(
        "--prompts",
        default="demo",
        metavar="demo|random|FILE",
        help="the demo's held-out problems, random ids, or a JSON list of lists of token ids",
    )
    group.add_argument(
        "--save-prompts",
        type=Path,
        metavar="FILE",
        help="write the demo's prompts there for --prompts FILE, and run nothing",
    )
    group.add_argument("--num-prompts", type=int, default=1000)
    group.add_argument(
        "--input-lens", default="512,6144", metavar="LOW,HIGH", help="of random prompts, tokens"
    )
    group.add_argument("--output-len", type=int, default=128, help="at most; tokens")
    group.add_argument(
        "--acceptance",
        type=float,
        help="drafts are the plain answers with so many wrong that this share is accepted, as "
        "0.7; without it the draft model's own",
    )
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="lossless.json and lossless.md go here, K by K"
    )


def run(config: Config, flags: argparse.Namespace) -> int:
    """1 where a difference is unexplained."""
    if flags.save_prompts is not None:
        prompts = demo_prompts(load_models(config), flags.num_prompts)
        flags.save_prompts.write_text(json.dumps(prompts) + "\n")
        return 0
    check = Check(config, options_of(config, flags))
    good = check.run()
    print(check.table.to_text())
    return 0 if good else 1


def options_of(config: Config, flags: argparse.Namespace) -> Options:
    """The flags, checked. ConfigError names the flag."""
    num_drafts = _numbers("--num-drafts", flags.num_drafts, 0, MAX_DRAFT_TOKENS)
    lens = _numbers("--input-lens", flags.input_lens, 1, sys.maxsize)
    if len(lens) != 2 or lens[0] > lens[1]:
        raise ConfigError(f"--input-lens {flags.input_lens}: expected LOW,HIGH")
    for name in ("num_prompts", "output_len"):
        value = getattr(flags, name)
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: allowed 1 or more")
    if flags.acceptance is not None and not 0 <= flags.acceptance <= 1:
        raise ConfigError(f"--acceptance {flags.acceptance:g}: allowed 0 to 1")
    return Options(
        num_drafts=num_drafts,
        num_prompts=flags.num_prompts,
        prompts=flags.prompts,
        input_lens=(lens[0], lens[1]),
        output_len=flags.output_len,
        acceptance=flags.acceptance,
        seed=config.model.seed,
        out=flags.out,
    )


def _numbers(name: str, text: str, low: int, high: int) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text}: expected whole numbers, separated by commas") from None
    for value in values:
        if not low <= value <= high:
            raise ConfigError(f"{name} {text}: allowed {low} to {high}")
    return values
