"""All kernel programs that the steps of a configuration can launch, found without a device.

A Runner of the same widths runs on "meta" tensors, which have shapes and no memory: steps of every
size that may come, while kernels/ahead.py lists what they would launch. Of layers that are alike
one is enough. How many rows a prefill has is not bounded by a few sizes; but kernels are chosen by
thresholds (kernels/launch.py), so rows at and around powers of two meet them all
(tests/engine/test_programs.py).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels import launch
from eaglerun.kernels.ahead import Program, recording
from eaglerun.messages import MAX_LOGPROBS, SamplingParams
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan
from eaglerun.run.options import RunnerOptions
from eaglerun.run.runner import Runner

GREEDY = SamplingParams(temperature=0.0)
# What requests of one kind or another ask for; each takes other kernels.
_ASKED = (
    SamplingParams(temperature=1.0, seed=0),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, seed=0),
    SamplingParams(
        temperature=0.0,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        logit_bias={1: 1.0},
        min_tokens=1,
        logprobs=1,
    ),
)
# Without graphs no batch is padded: sizes on both sides of what kernels tell apart.
_ANY_SIZE = (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256)


@dataclass(frozen=True, slots=True)
class Launched:
    """Of a rank, what decides which kernels its steps launch.

    taps   layers whose entering hidden states are captured
    dtype  of weights and activations
    arch   a row of the launch table
    """

    target: TargetSpec
    draft: DraftSpec | None
    taps: tuple[int, ...]
    options: RunnerOptions
    dtype: torch.dtype
    arch: str


def find_programs(launched: Launched, found: Callable[[Program], None]) -> None:
    """Tell of each program once. For a process of its own: it can launch no kernel afterwards."""
    runner = runner_without_device(launched)
    plans = _plans(runner, launched.options.capture)
    programs_of(runner, plans, launched.arch, found)


def programs_of(
    runner: Runner, plans: Iterable[StepPlan], arch: str, found: Callable[[Program], None]
) -> None:
    """Tell of each program that the plans launch and none before has; see find_programs."""
    with launch.for_arch(arch), recording(arch, found):
        for plan in plans:
            runner.launch(plan)


def runner_without_device(launched: Launched) -> Runner:
    """A runner on "meta", of one layer of each kind."""
    spec, taps = _one_of_a_kind(launched.target, launched.taps)
    meta = torch.device("meta")
    # Tables of rotations are as long as a sequence.
    limit = launched.options.max_model_len
    target = MiniMaxM3(spec, taps, device=meta, dtype=launched.dtype, max_positions=limit)
    draft = None
    if launched.draft is not None:
        draft = Eagle3Llama(launched.draft, device=meta, dtype=launched.dtype, max_positions=limit)
    return Runner(target, draft, replace(launched.options, num_blocks=1, capture=False))


def _one_of_a_kind(spec: TargetSpec, taps: Sequence[int]) -> tuple[TargetSpec, tuple[int, ...]]:
    """The target with the first layer of each kind, those that are tapped, and the last; and where
    the taps are then."""
    kinds = list(zip(spec.sparse_layers, spec.index_shared, spec.moe_layers, strict=True))
    wanted = {kinds.index(kind) for kind in kinds} | {*taps, len(kinds) - 1}
    kept = sorted(i for i in wanted if i < len(kinds))
    # A tap behind the last layer stays there.
    places = {layer: place for place, layer in enumerate([*kept, len(kinds)])}
    cut = replace(
        spec,
        num_hidden_layers=len(kept),
        sparse_layers=tuple(spec.sparse_layers[i] for i in kept),
        index_shared=tuple(spec.index_shared[i] for i in kept),
        moe_layers=tuple(spec.moe_layers[i] for i in kept),
    )
    return cut, tuple(places[tap] for tap in taps)


def _plans(runner: Runner, captures: bool) -> Iterator[StepPlan]:
    """Steps that between them launch whatever a step may; ``captures``: decode steps are graphs,
    which are made for two bounds of the keys that a row sees."""
    options, spec, drafts = runner.options, runner.target.spec, runner.drafter is not None
    selected = spec.sparse_topk_blocks * spec.sparse_block_size
    longest = options.max_model_len - options.num_draft_tokens - 2
    bounds = {min(selected, longest), longest}
    if not captures:
        bounds |= set(_around_powers(longest))
    yield from _decodes(options, bounds, drafts)
    yield from _prefills(options, selected, longest, drafts)


def _around_powers(most: int) -> list[int]:
    """1 to ``most``: the powers of two, and numbers behind each."""
    powers = [1 << n for n in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p + 1, p + p // 2) if n <= most} | {most})


def _decodes(options: RunnerOptions, bounds: set[int], drafts: bool) -> Iterator[StepPlan]:
    sizes = options.decode_batch_sizes or _ANY_SIZE
    most = options.num_draft_tokens
    for size in sorted({min(size, options.num_slots) for size in sizes}):
        for num_drafts, bound in itertools.product(range(most + 1), sorted(bounds)):
            count = most if drafts else 0
            reach = max(bound - num_drafts, 1)
            rows = tuple(DecodeRow(i, num_drafts, count, reach) for i in range(size))
            yield _admitting(range(size), GREEDY, decode=rows, count=count)
        for asked in _ASKED:
            count = most if drafts else 0
            rows = tuple(DecodeRow(i, most, count, min(bounds)) for i in range(size))
            yield _admitting(range(size), asked, decode=rows, count=count)


def _prefills(
    options: RunnerOptions, selected: int, longest: int, drafts: bool
) -> Iterator[StepPlan]:
    count = options.num_draft_tokens if drafts else 0
    most = options.max_rows
    powers = [1 << n for n in range(most.bit_length())]
    starts = sorted({0, *(s for p in powers for s in (p * selected,) if s < longest)})
    for size in _around_powers(most):
        for start in {*starts, max(longest - size, 0)}:
            # As few chunks as hold the rows, and many.
            least = -(-size // (longest - start))
            for parts in {least, options.num_slots}:
                if least <= parts <= min(size, options.num_slots):
                    yield _chunks(_even(size, parts), start, count, GREEDY, samples=True)
        if size <= longest:
            yield _chunks((size,), 0, 0, GREEDY, samples=False)
    # Prompts that end together are sampled, and drafted after, by kernels of their number.
    for parts in {n for n in (*powers, options.num_slots) if n <= options.num_slots}:
        for asked in (GREEDY, *_ASKED):
            yield _chunks((1,) * parts, 0, count, asked, samples=True)


def _even(rows: int, parts: int) -> tuple[int, ...]:
    return tuple(rows // parts + (i < rows % parts) for i in range(parts))


def _chunks(
    lengths: Sequence[int], start: int, count: int, asked: SamplingParams, samples: bool
) -> StepPlan:
    told = 1 if asked.logprobs is not None else -1
    chunks = tuple(
        PrefillChunk(slot, (1,) * rows, start, -1 if samples else 1, count, told)
        for slot, rows in enumerate(lengths)
    )
    return _admitting(range(len(chunks)), asked, prefill=chunks, count=count)


def _admitting(
    slots: Sequence[int],
    asked: SamplingParams,
    decode: tuple[DecodeRow, ...] = (),
    prefill: tuple[PrefillChunk, ...] = (),
    count: int = 0,
) -> StepPlan:
    admissions = tuple(Admission(slot, asked, slot, (1,), (1,), 0, -1) for slot in slots)
    return StepPlan(
        step_id=0,
        admissions=admissions,
        blocks=(),
        decode=decode,
        prefill=prefill,
        num_drafts=max((row.num_drafts for row in decode), default=0),
        num_propose=count,
        num_logprobs=min(MAX_LOGPROBS, 1) if asked.logprobs is not None else -1,
    )
