"""The Triton programs that steps of MiniMax-M3's widths ask for: python step_programs.py [wide].

The whole Runner runs on "meta" tensors with the launch replaced by a recorder, over steps of many
sizes. Prints JSON: for each regime (kernel, constants, settings, dtypes), what Triton would tell
its programs apart by: of each argument, by name, whether it is 1, divisible by 16, or neither.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from unit.test_spec import HUB

import eaglerun.kernels
import eaglerun.run.buffers
import eaglerun.run.decode
import eaglerun.run.prefill
import eaglerun.sampling
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels import launch
from eaglerun.messages import SamplingParams
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan
from eaglerun.run.options import RunnerOptions
from eaglerun.run.runner import Runner

DRAFTS = 3
MODEL_LENS = (16384, 131072 + 128)
PREFILLS = (
    1, 2, 5, 16, 17, 33, 64, 65, 100, 128, 129, 500, 512, 513, 1000, 1024, 2047, 2048, 8191, 8192,
)  # fmt: skip
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, seed=1)

Programs = dict[str, dict[str, dict[str, str]]]


class Place:
    """A tensor as Triton tells it apart: by dtype and alignment. Allocations are aligned, so that
    where a tensor begins in its own says it, which no "meta" tensor's address does."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._offset = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self) -> int:
        return self._offset


class Recorder:
    """Stands for JITFunction.run. ``programs``: by regime, then by specialisation, what each
    argument that may vary is."""

    def __init__(self) -> None:
        self.programs: Programs = {}
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders: dict[Any, Any] = {}

    def record(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        if kernel not in self._binders:
            self._binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self._backend
            )
        placed = [Place(a) if isinstance(a, Tensor) else a for a in args]
        values, found, options = self._binders[kernel](*placed, **settings)
        regime, told = [kernel.fn.__name__, str(sorted(options.items()))], {}
        for parameter, value, (kind, key) in zip(
            kernel.params, values.values(), found, strict=True
        ):
            if parameter.is_constexpr:
                regime.append(f"{parameter.name}={value}")
            elif parameter.name == "first_key":
                # Fixed by the model: 0 of a target, 1 of a draft, which may share all the rest.
                regime.append(f"first_key={value}")
            elif isinstance(value, int):
                told[parameter.name] = f"{kind} {key}"
            else:
                regime.append(f"{parameter.name}: {kind}")
                told[parameter.name] = f"{key}"
        of_regime = self.programs.setdefault(" ".join(regime), {})
        of_regime.setdefault(json.dumps(told), told)


def target_spec() -> TargetSpec:
    """A layer of each kind: dense, one that selects blocks, one that shares its selection."""
    return replace(
        TargetSpec.from_config(HUB),
        num_hidden_layers=3,
        sparse_layers=(False, True, True),
        index_shared=(False, False, True),
        moe_layers=(False, True, True),
    )


def draft_spec(groups: int) -> DraftSpec:
    return DraftSpec(
        hidden_size=6144,
        target_hidden_size=6144,
        taps=(0, 1, 2),
        intermediate_size=18432,
        num_attention_heads=64,
        num_key_value_heads=groups,
        head_dim=128,
        vocab_size=200064,
        draft_vocab_size=200064,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        max_position_embeddings=1048576,
        attention_bias=False,
        use_aux_hidden_state=True,
        fc_norm=True,
        norm_before_fc=False,
        norm_output=False,
        norm_before_residual=False,
        logit_scale=1.0,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def options(max_model_len: int, **changes: Any) -> RunnerOptions:
    base: dict[str, Any] = {
        "num_slots": 64,
        "num_blocks": 2048,
        "block_size": 128,
        "kv_dtype": torch.bfloat16,
        "index_dtype": torch.bfloat16,
        "max_model_len": max_model_len,
        "max_rows": 8192,
        "num_draft_tokens": DRAFTS,
        "eos_token_ids": (200020,),
        "rejection": False,
        "probabilistic_drafts": False,
        "synthetic": (),
        "processed_logprobs": False,
        "decode_batch_sizes": (),
        "capture": False,
        "graph_bytes": None,
        "overlap_kernels": True,
        "batch_invariant": False,
        "scripted_drafts": False,
        "scripted_tokens": False,
        "keep_aux": False,
    }
    return RunnerOptions(**(base | changes))


def decode_plan(batch: int, num_drafts: int, num_propose: int, length: int) -> StepPlan:
    rows = tuple(DecodeRow(i, num_drafts, num_propose, length) for i in range(batch))
    return StepPlan(0, (), (), rows, (), num_drafts, num_propose, -1)


def prefill_plan(lens: list[int], start: int, num_propose: int) -> StepPlan:
    chunks = tuple(
        PrefillChunk(i, (5,) * n, start, -1, num_propose, -1) for i, n in enumerate(lens)
    )
    return StepPlan(0, (), (), (), chunks, 0, num_propose, -1)


def split(rows: int, parts: int) -> list[int]:
    """``rows`` in as many parts, uneven where there are enough."""
    odd = 1 if rows > 2 * parts else 0
    cuts = [0, *(rows * i // parts + odd for i in range(1, parts)), rows]
    return [end - start for start, end in itertools.pairwise(cuts)]


def steps(max_model_len: int, most_drafts: int, wide: bool) -> Iterator[StepPlan]:
    """Prefills in one to three chunks and decode steps of many sizes, contexts short and long in
    turn."""
    starts = itertools.cycle((0, 3000, max_model_len - 8192))
    for i, rows in enumerate(PREFILLS):
        for parts in (1, 2, 3) if wide else (1 + i % 3,):
            if parts <= rows:
                yield prefill_plan(split(rows, parts), next(starts), most_drafts)
    lengths = itertools.cycle((100, 1500, 2040, 2100, max_model_len - 50))
    for batch in range(1, 65) if wide else (1, 2, 3, 16, 17, 33, 64):
        for num_drafts in range(most_drafts + 1):
            yield decode_plan(batch, num_drafts, most_drafts, next(lengths))


def run(runner: Runner, plans: Iterator[StepPlan], params: SamplingParams) -> None:
    admissions = tuple(
        Admission(
            slot_id=i,
            sampling=params,
            seed=i,
            prompt_ids=(1, 2),
            output_ids=(3,),
            num_output_tokens=0,
            carry_block=-1,
        )
        for i in range(64)
    )
    runner.launch(StepPlan(0, admissions, (), (), (), 0, 0, -1))
    for plan in plans:
        runner.launch(plan)


def on_meta(recorder: Recorder) -> None:
    """Every op takes its kernel, whose launch is recorded, and no copy waits for a device."""
    JITFunction.run = lambda kernel, *a, **k: recorder.record(kernel, *a, **k)
    eaglerun.kernels.Op.__call__ = lambda op, *a, **k: op.kernel(*a, **k)
    modules: tuple[Any, ...] = (
        eaglerun.run.buffers, eaglerun.run.decode, eaglerun.run.prefill, eaglerun.sampling,
    )  # fmt: skip
    for module in modules:
        module.to_host = lambda tensor: tensor.clone()


def main(wide: bool) -> None:
    recorder = Recorder()
    on_meta(recorder)
    device, dtype, fp8 = torch.device("meta"), torch.bfloat16, torch.float8_e4m3fn
    taps = (0, 1, 2)
    # KV heads of the draft (none: no draft), options, sampling.
    configs: list[tuple[int, dict[str, Any], SamplingParams]] = [
        (64, {}, GREEDY),
        (4, {"kv_dtype": fp8, "index_dtype": fp8}, SAMPLED),
    ]
    if wide:
        configs += [
            (4, {}, SAMPLED),
            (0, {}, GREEDY),
            (4, {"batch_invariant": True}, GREEDY),
            (8, {"rejection": True}, SAMPLED),
            (8, {"rejection": True, "probabilistic_drafts": True}, SAMPLED),
            (64, {"synthetic": (0.9,) * DRAFTS}, SAMPLED),
            (64, {"scripted_drafts": True, "scripted_tokens": True}, GREEDY),
        ]
    lengths = itertools.cycle(MODEL_LENS)
    with launch.for_arch("sm_90"):
        for groups, changes, params in configs:
            target = MiniMaxM3(target_spec(), taps if groups else (), device=device, dtype=dtype)
            draft = None
            if groups:
                draft = Eagle3Llama(draft_spec(groups), device=device, dtype=dtype)
            length = next(lengths)
            runner = Runner(target, draft, options(length, **changes))
            run(runner, steps(length, DRAFTS if groups else 0, wide), params)
    json.dump({k: list(v.values()) for k, v in recorder.programs.items()}, sys.stdout)


if __name__ == "__main__":
    main("wide" in sys.argv[1:])
