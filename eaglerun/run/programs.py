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
from eaglerun.messages import SamplingParams
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan
from eaglerun.run.options import RunnerOptions
from eaglerun.run.runner import Runner

GREEDY = SamplingParams(temperature=0.0)
# Kinds of requests that take other kernels.
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


@dataclass(frozen=True, slots=True)
class Launched:
    """A rank, as far as it decides which kernels its steps launch.

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
    """Tell of each program once, also of a rank whose sequences will be shorter than its
    max_model_len. For a process of its own: it can launch no kernel afterwards."""
    runner = runner_without_device(launched)
    programs_of(runner, _plans(runner), launched.arch, found)


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


def _plans(runner: Runner) -> Iterator[StepPlan]:
    """Steps that between them launch whatever a step may."""
    options, spec = runner.options, runner.target.spec
    selected = spec.sparse_topk_blocks * spec.sparse_block_size
    longest = options.max_model_len - options.num_draft_tokens - 2
    most = options.num_draft_tokens if runner.drafter is not None else 0
    yield _admission(options, GREEDY)
    yield from _decodes(options, min(selected, longest), longest, most)
    yield from _prefills(options, selected, longest, most)
    for asked in _ASKED:
        yield _admission(options, asked)
        yield from _sampling(options, min(selected, longest), most, asked.logprobs or -1)


def _around_powers(most: int) -> list[int]:
    """1 to ``most``: the powers of two, and numbers behind each."""
    powers = [1 << n for n in range(most.bit_length())]
    return sorted({n for p in powers for n in (p, p + 1, p + p // 2) if n <= most} | {most})


def _batch_sizes(options: RunnerOptions) -> list[int]:
    """Those that batches are padded to, and among the larger ones, which are not, enough."""
    padded = {min(size, options.num_slots) for size in options.decode_batch_sizes}
    return sorted({*padded, *(n for n in _around_powers(options.num_slots) if n > max(padded))})


def _decodes(options: RunnerOptions, selected: int, longest: int, most: int) -> Iterator[StepPlan]:
    """``selected``: the keys that are all read, one bound of a step's; the other is known late.
    ``most``: drafts."""
    # How many keys there are and how many sequences choose kernels each by itself.
    cases = [(size, bound) for size in _batch_sizes(options) for bound in {selected, longest}]
    cases += [(min(2, options.num_slots), bound) for bound in _around_powers(longest)]
    for (size, bound), num_drafts in itertools.product(cases, range(most + 1)):
        yield _decode(size, num_drafts, most, bound)


def _prefills(options: RunnerOptions, selected: int, longest: int, most: int) -> Iterator[StepPlan]:
    powers = [1 << n for n in range(options.max_rows.bit_length())]
    starts = {0, *(p * selected for p in powers if p * selected < longest)}
    for size in _around_powers(options.max_rows):
        for start in {*starts, max(longest - size, 0)}:
            # The fewest chunks that hold the rows, and many.
            least = -(-size // (longest - start))
            for parts in {least, options.num_slots}:
                if least <= parts <= min(size, options.num_slots):
                    yield _prefill(size, parts, start, most)
        if size <= longest:
            yield _prefill(size, 1, 0, most, samples=False)


def _sampling(
    options: RunnerOptions, bound: int, most: int, num_logprobs: int
) -> Iterator[StepPlan]:
    """Steps of each number of sequences that choose tokens together."""
    for size in _batch_sizes(options):
        yield _decode(size, most, most, bound, num_logprobs)
        yield _prefill(size, size, 0, most, num_logprobs=num_logprobs)


def _admission(options: RunnerOptions, asked: SamplingParams) -> StepPlan:
    """All sequences ask for the same from now on."""
    slots = range(options.num_slots)
    admissions = tuple(Admission(slot, asked, slot, (1,), (1,), 0, -1) for slot in slots)
    return StepPlan(0, admissions, (), (), (), 0, 0, -1)


def _decode(size: int, num_drafts: int, count: int, bound: int, num_logprobs: int = -1) -> StepPlan:
    reach = max(bound - num_drafts, 1)
    rows = tuple(DecodeRow(slot, num_drafts, count, reach) for slot in range(size))
    return StepPlan(0, (), (), rows, (), num_drafts, count, num_logprobs)


def _prefill(
    rows: int, parts: int, start: int, count: int, samples: bool = True, num_logprobs: int = -1
) -> StepPlan:
    """So many rows in chunks of about the same length."""
    chunks = tuple(
        PrefillChunk(
            slot_id=slot,
            token_ids=(1,) * (rows // parts + (slot < rows % parts)),
            start=start,
            next_token=-1 if samples else 1,
            num_propose=count,
            prompt_logprobs=num_logprobs,
        )
        for slot in range(parts)
    )
    return StepPlan(0, (), (), (), chunks, 0, count, num_logprobs)
