"""Random lives of a few requests in one engine, and the driver that plays them."""

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from pairs import tiny_pair, without_draft
from tokenizers import Tokenizer, decoders, models

from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.loader import Models
from eaglerun.messages import (
    Failed,
    Finished,
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    Tokens,
)
from eaglerun.plan.pace import Pace
from eaglerun.plan.step import StepPlan, StepTimes
from eaglerun.start import start_engine

VOCAB = 40
EOS = 0
MAX_PROMPT = 40


@dataclass(frozen=True)
class Wish:
    """A request and what happens to it, by step number."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    submit_at: int
    priority: int
    abort_at: int | None
    preempt_at: tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """One engine's life. ``ks``: K of each step, repeated; ``cache_dtype``: of both caches;
    ``paced``: with an inter-token bound, and made-up times."""

    model_seed: int
    block_size: int
    ks: tuple[int, ...]
    lag: int
    max_chunk_tokens: int
    spare_blocks: int
    max_model_len: int
    max_num_seqs: int
    prefix_caching: bool
    padded: bool
    draft_sampling: str
    narrow: bool
    tight: bool
    wishes: tuple[Wish, ...]
    paced: bool
    cache_dtype: str = "auto"


@dataclass
class Answer:
    """What came back of one request."""

    tokens: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    finished: Finished | None = None


@dataclass(frozen=True)
class ScriptedDraftLength:
    ks: tuple[int, ...]

    def num_draft_tokens(self, step_id: int, num_running: int) -> int:
        return self.ks[step_id % len(self.ks)]


class ScriptedPace(Pace):
    """Few rows beside decode rows, by times that depend on the step's number alone."""

    def __init__(self) -> None:
        super().__init__(max_itl_ms=20.0, least_rows=2)

    def learn(self, plan: StepPlan, times: StepTimes) -> None:
        assert times.total_ms > 0
        rows = sum(len(chunk.token_ids) for chunk in plan.prefill)
        total_ms = 1 + len(plan.decode) + rows * (1 + plan.step_id * 7 % 5) / 3
        super().learn(plan, StepTimes(total_ms=total_ms))


def letters() -> Tokenizer:
    """A tokenizer of one letter per token, so that stop strings can span tokens."""
    alphabet = string.ascii_letters[:VOCAB]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


@functools.cache
def pair(seed: int, block_size: int, dtype: torch.dtype, narrow: bool = False) -> Models:
    """``narrow``: the draft knows 16 of the 40 tokens (d2t)."""
    draft_vocab = 16 if narrow else VOCAB
    made = tiny_pair(
        seed, dtype, vocab_size=VOCAB, block_size=block_size, draft_vocab_size=draft_vocab
    )
    return Models(made.name, made.target, made.draft, (EOS,), letters())


def make_engine(schedule: Schedule, dtype: torch.dtype, plain: bool) -> Engine:
    """The schedule's engine; ``plain``: no draft, no lag, no shared prefixes, room for all."""
    both = pair(schedule.model_seed, schedule.block_size, dtype, schedule.narrow)
    least = -(-schedule.max_model_len // schedule.block_size)
    settings: dict[str, object] = {
        "max_model_len": schedule.max_model_len,
        "num_kv_blocks": 8 * least,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 400,
        "enable_prefix_caching": False,
        "kv_cache_dtype": schedule.cache_dtype,
        "index_cache_dtype": schedule.cache_dtype,
        "log_stats_every": 0,
    }
    if plain:
        return start_engine(resolve(settings, environ={}), without_draft(both))
    settings |= {
        "draft": "tiny",
        "num_draft_tokens": 8,
        "num_kv_blocks": least + schedule.spare_blocks,
        "max_num_seqs": schedule.max_num_seqs,
        "max_chunk_tokens": schedule.max_chunk_tokens,
        "max_num_batched_tokens": 9 * schedule.max_num_seqs + 1 if schedule.tight else 400,
        "lag": schedule.lag,
        "enable_prefix_caching": schedule.prefix_caching,
        "decode_batch_sizes": (1, 3, 5) if schedule.padded else (),
        "draft_sampling": schedule.draft_sampling,
    }
    engine = start_engine(resolve(settings, environ={}), both, ScriptedDraftLength(schedule.ks))
    if schedule.paced:
        engine.scheduler.pace = ScriptedPace()
    return engine


def play(
    engine: Engine, wishes: tuple[Wish, ...], watch: Callable[[Engine], None] | None = None
) -> list[Answer]:
    """Run the wishes to their ends; each answer must end exactly once, and nothing may leak.

    Returns the answers of the first wish (n of them), then those of the second, and so on.
    """
    answers = {
        (i, j): Answer([], "", []) for i, w in enumerate(wishes) for j in range(w.sampling.n)
    }
    step = 0
    last = max(w.submit_at for w in wishes)
    while step <= last or engine.has_work:
        for i, wish in enumerate(wishes):
            if wish.submit_at == step:
                engine.submit(Request(str(i), wish.prompt, wish.sampling, wish.priority))
            if wish.abort_at == step and wish.submit_at <= step:
                engine.abort(str(i))
            if step in wish.preempt_at:
                engine.scheduler.preempt(str(i))
        for event in engine.step():
            assert not isinstance(event, Failed)
            answer = answers[int(event.request_id), event.index]
            assert answer.finished is None, "an event after the end"
            if isinstance(event, Tokens):
                answer.tokens += event.token_ids
                answer.text += event.text
                answer.logprobs += event.logprobs
            else:
                assert isinstance(event, Finished)
                answer.finished = event
        engine.scheduler.check_integrity()
        if watch is not None:
            watch(engine)
        step += 1
        assert step < 3000, "the schedule never ends"
    assert engine.pool.num_held == 0
    for answer in answers.values():
        assert answer.finished is not None
        assert answer.finished.num_output_tokens == len(answer.tokens)
    return list(answers.values())


def check_lossless(schedule: Schedule, dtype: torch.dtype) -> int:
    """Every answer equals the plain engine's; an aborted one is a beginning of it.

    Returns how many answers were compared.
    """
    calm = tuple(Wish(w.prompt, w.sampling, 0, 0, None, ()) for w in schedule.wishes)
    expected = play(make_engine(schedule, dtype, plain=True), calm)
    owner = [i for i, w in enumerate(schedule.wishes) for _ in range(w.sampling.n)]
    engine = make_engine(schedule, dtype, plain=False)
    got = play(engine, schedule.wishes)
    for i, (want, have) in enumerate(zip(expected, got, strict=True)):
        assert want.finished is not None and have.finished is not None
        if have.finished.reason is FinishReason.ABORT:
            assert have.tokens == want.tokens[: len(have.tokens)]
            assert want.text.startswith(have.text)
            if not schedule.wishes[owner[i]].sampling.stop:
                assert have.text == letters().decode(have.tokens)
            continue
        assert have.tokens == want.tokens, f"request {i}: {have.tokens}, plain {want.tokens}"
        assert have.text == want.text
        assert have.finished.reason == want.finished.reason
        assert have.finished.stop_reason == want.finished.stop_reason
        assert have.finished.seed == want.finished.seed
        _same_logprobs(want.logprobs, have.logprobs, 1e-9 if dtype is torch.float64 else 1e-3)
        if want.finished.prompt_logprobs is not None:
            assert have.finished.prompt_logprobs is not None
            assert want.finished.prompt_logprobs[0] is have.finished.prompt_logprobs[0] is None
            tolerance = 1e-9 if dtype is torch.float64 else 1e-3
            known = [lp for lp in want.finished.prompt_logprobs if lp is not None]
            found = [lp for lp in have.finished.prompt_logprobs if lp is not None]
            assert len(known) == have.finished.num_prompt_tokens - 1
            _same_logprobs(known, found, tolerance)
    return len(got)


def _same_logprobs(want: list[TokenLogprobs], have: list[TokenLogprobs], tolerance: float) -> None:
    assert len(want) == len(have)
    for a, b in zip(want, have, strict=True):
        assert (a.token_id, len(a.top)) == (b.token_id, len(b.top))
        assert abs(a.logprob - b.logprob) < tolerance
        for (_, p), (_, q) in zip(a.top, b.top, strict=True):
            assert abs(p - q) < tolerance


# Strategies.

token = st.integers(1, VOCAB - 1)
stems = {i: tuple(1 + (7 * i + 3 * j * j + j) % (VOCAB - 1) for j in range(40)) for i in range(3)}


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, ...]:
    """Often a shared stem, cut anywhere (block ends included), then a tail of its own."""
    stem = stems[draw(st.integers(0, 2))][: draw(st.integers(0, 32))]
    tail = tuple(draw(st.lists(token, min_size=0 if stem else 1, max_size=8)))
    return stem + tail


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    sampled = draw(st.booleans())
    max_tokens = draw(st.integers(1, 24))
    penalized = draw(st.integers(0, 2)) == 0
    stop = draw(st.integers(0, 3)) == 0
    return SamplingParams(
        temperature=draw(st.sampled_from([0.5, 1.0, 1.7])) if sampled else 0.0,
        top_p=draw(st.sampled_from([1.0, 0.9, 0.5])) if sampled else 1.0,
        top_k=draw(st.sampled_from([0, 1, 5, 20])) if sampled else 0,
        min_p=draw(st.sampled_from([0.0, 0.05])) if sampled else 0.0,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])) if penalized else 1.0,
        presence_penalty=draw(st.sampled_from([0.0, 0.7, -0.5])) if penalized else 0.0,
        frequency_penalty=draw(st.sampled_from([0.0, 0.4])) if penalized else 0.0,
        logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, -1.0, 3.0]), max_size=3)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, min(max_tokens, 8))),
        ignore_eos=draw(st.booleans()),
        stop=tuple(draw(st.lists(st.sampled_from(["b", "cd", "ef", "h"]), max_size=2)))
        if stop
        else (),
        stop_token_ids=tuple(draw(st.lists(token, max_size=3))) if stop else (),
        logprobs=draw(st.sampled_from([None, None, 0, 3])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 2])),
        num_draft_tokens=draw(st.sampled_from([None, None, None, 0, 1, 2, 5])),
        n=draw(st.sampled_from([1, 1, 1, 1, 1, 3])),
    )


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    submit_at = draw(st.integers(0, 12))
    return Wish(
        prompt=draw(prompts()),
        sampling=draw(samplings()),
        submit_at=submit_at,
        priority=draw(st.integers(0, 1)),
        abort_at=submit_at + draw(st.integers(0, 10)) if draw(st.integers(0, 7)) == 0 else None,
        preempt_at=tuple(draw(st.lists(st.integers(submit_at, submit_at + 20), max_size=2))),
    )


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    return Schedule(
        model_seed=draw(st.integers(0, 2)),
        block_size=draw(st.sampled_from([2, 4, 8])),
        ks=tuple(draw(st.lists(st.integers(0, 8), min_size=1, max_size=6))),
        lag=draw(st.integers(0, 1)),
        max_chunk_tokens=draw(st.sampled_from([1, 3, 4, 7, 16, 64])),
        spare_blocks=draw(st.sampled_from([0, 2, 9, 60])),
        max_model_len=draw(st.sampled_from([MAX_PROMPT + 4, MAX_PROMPT + 26])),
        max_num_seqs=draw(st.sampled_from([2, 4, 8])),
        prefix_caching=draw(st.sampled_from([True, True, True, False])),
        padded=draw(st.booleans()),
        draft_sampling=draw(st.sampled_from(["greedy", "probabilistic"])),
        narrow=draw(st.integers(0, 3)) == 0,
        tight=draw(st.integers(0, 3)) == 0,
        wishes=tuple(draw(st.lists(wishes(), min_size=6, max_size=8))),
        paced=draw(st.booleans()),
    )
