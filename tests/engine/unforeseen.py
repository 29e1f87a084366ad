"""Random steps of a configuration, and the kernel programs that they launch beside those that were
foreseen: python unforeseen.py CONFIGURATION SEED COUNT. Prints a line of JSON: how many programs
were foreseen, and of each other one the kernel and what it was specialised for."""

import json
import random
import sys
from dataclasses import replace

import torch
from unit import test_spec

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.config import resolve
from eaglerun.kernels.ahead import Program
from eaglerun.messages import SamplingParams
from eaglerun.plan.step import Admission, DecodeRow, PrefillChunk, StepPlan
from eaglerun.ranks.local import launched_by
from eaglerun.run.options import RunnerOptions
from eaglerun.run.programs import Launched, find_programs, programs_of, runner_without_device

SETTINGS: dict[str, dict[str, object]] = {
    "m3": {"max_model_len": 131_072},
    "short": {"max_model_len": 1_500, "max_num_seqs": 64},
    "plain": {"draft": None},
    "eager": {"enforce_eager": True},
    "one_size": {"decode_batch_sizes": (2,)},
    "fp8": {"kv_cache_dtype": "fp8", "index_cache_dtype": "fp8", "overlap_kernels": False},
    "invariant": {"batch_invariant": True},
    "drawn": {"verification": "rejection", "draft_sampling": "probabilistic"},
    "synthetic": {"synthetic_acceptance_length": 2.5, "scripted": "tokens"},
}
DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 6144,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 200064,
    "draft_vocab_size": 32000,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 30, 57]},
}


def launched(name: str) -> Launched:
    base = {"draft": "some", "max_num_seqs": 33, "max_num_batched_tokens": 8192}
    config = resolve(base | {"max_model_len": 20_000} | SETTINGS[name], environ={})
    target = TargetSpec.from_config(test_spec.HUB)
    draft = None if config.model.draft is None else DraftSpec.from_config(DRAFT, target)
    return launched_by(config, target, draft, torch.bfloat16, "sm_90")


class Steps:
    def __init__(self, options: RunnerOptions, drafts: bool, seed: int) -> None:
        self._options = options
        self._most = options.num_draft_tokens if drafts else 0
        self._random = random.Random(seed)

    def plan(self) -> StepPlan:
        r, options = self._random, self._options
        count = r.randint(1, options.num_slots)
        limit = options.max_model_len - self._most - 2
        decode: list[DecodeRow] = []
        prefill: list[PrefillChunk] = []
        left = options.max_rows
        for slot in range(count):
            if left < self._most + 1:
                break
            if r.random() < 0.5:
                reach = r.choice([r.randint(2, limit), r.randint(2, min(limit, 3000))])
                if options.capture:
                    # All steps of graphs, captured or not, have one of two bounds.
                    reach = min(2048, limit) if reach <= 2048 else limit
                drafts = r.randint(0, self._most)
                row = DecodeRow(slot, drafts, r.randint(0, self._most), max(reach - drafts, 1))
                decode.append(row)
                left -= self._most + 1
            else:
                rows = min(left, limit, int(2 ** r.uniform(0, 13.5)))
                start = r.choice([0, r.randint(0, limit - rows)])
                after = -1 if r.random() < 0.7 else 1
                prefill.append(PrefillChunk(slot, (1,) * rows, start, after, self._most))
                left -= rows
        asked = tuple(
            Admission(slot, self._params(), slot, (1, 2), (1,), 0, -1) for slot in range(count)
        )
        return StepPlan(
            step_id=0,
            admissions=asked,
            blocks=(),
            decode=tuple(decode),
            prefill=tuple(prefill),
            num_drafts=max((row.num_drafts for row in decode), default=0),
            num_propose=max((row.num_propose for row in decode), default=self._most),
            num_logprobs=r.choice([-1, -1, 3]),
        )

    def _params(self) -> SamplingParams:
        r = self._random
        return SamplingParams(
            temperature=r.choice([0.0, 0.0, 1.0]),
            top_p=r.choice([1.0, 0.9]),
            min_p=r.choice([0.0, 0.1]),
            repetition_penalty=r.choice([1.0, 1.2]),
            logit_bias=r.choice([{}, {3: 1.0}]),
            min_tokens=r.choice([0, 1]),
            seed=1,
        )


def main(name: str, seed: str, count: str) -> None:
    made = launched(name)
    foreseen: list[Program] = []
    find_programs(made, foreseen.append)
    others: list[Program] = []
    # The KV memory may allow less than the longest sequence.
    for length in (made.options.max_model_len, made.options.max_model_len * 2 // 3):
        options = replace(made.options, max_model_len=length)
        runner = runner_without_device(replace(made, options=options))
        steps = Steps(options, made.draft is not None, int(seed))
        plans = (steps.plan() for _ in range(int(count) // 2))
        programs_of(runner, plans, made.arch, others.append)
    told = []
    for program in others:
        data = json.loads(program.data)
        constants = dict(zip(map(str, data["constant_keys"]), data["constant_vals"], strict=True))
        told.append([program.kernel, constants, data["signature"], data["attrs_vals"]])
    print(json.dumps([len(foreseen), told]))


if __name__ == "__main__":
    main(*sys.argv[1:])
