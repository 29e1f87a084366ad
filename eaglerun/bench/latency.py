"""Step time and throughput at fixed concurrencies, with and without the draft, against the floor.

The floor is bytes: what a decode step must read at least (weights once, the experts that were
really hit, the draft's passes) over the memory's measured bandwidth. KV reads are left out; at the
contexts measured here they are small, and they would only raise the floor.
"""

import dataclasses
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eaglerun.budget import draft_components, target_components
from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.loader import Models
from eaglerun.messages import Finished, Request, SamplingParams, Tokens
from eaglerun.spec import DraftSpec, TargetSpec
from eaglerun.step import StepPlan, StepResult


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Times are medians over full decode steps, milliseconds.

    step_ms        from one commit to the next, host work included
    target_ms, draft_ms  of the step, on the device;  host_ms: the rest of step_ms
    out_tok_s      output tokens over the whole run, prefill included
    experts        distinct experts hit by a decode step, mean over the MoE layers
    floor_ms       bytes of the step over the bandwidth; share = floor_ms / step_ms
    """

    concurrency: int
    num_draft_tokens: int
    step_ms: float
    target_ms: float
    draft_ms: float
    host_ms: float
    ttft_ms: float
    tpot_ms: float
    out_tok_s: float
    mean_acceptance_length: float
    experts: float
    floor_ms: float | None
    share_of_floor: float | None


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(vocab_size) for _ in range(length)) for _ in range(count)]


def step_bytes(
    target: TargetSpec, draft: DraftSpec | None, experts: float, num_draft_tokens: int, dtype: str
) -> float:
    """Bytes a decode step reads at least, ``experts`` distinct ones in each MoE layer.

    The draft's embedding is a few rows, and so is the target's; fc is read once a step, the rest
    of the draft once a pass; its k and v projection once more for the fill.
    """
    parts = {c.name: c.num_bytes for c in target_components(target, dtype)}
    routed = parts.pop("routed experts", 0)
    parts.pop("embedding", None)
    read = sum(parts.values()) + routed * experts / target.num_experts
    if draft is not None and num_draft_tokens:
        own = {c.name: c.num_bytes for c in draft_components(draft, dtype)}
        own.pop("embedding", None)
        read += own.pop("fc", 0) + num_draft_tokens * sum(own.values())
    return float(read)


def measure(
    config: Config,
    models: Models,
    prompts: Sequence[tuple[int, ...]],
    num_draft_tokens: int,
    output_len: int,
    bandwidth_gb_s: float | None,
) -> Row:
    """All ``prompts`` at once, ``output_len`` tokens each, greedy, EOS ignored."""
    scheduling = dataclasses.replace(config.scheduling, max_num_seqs=max(len(prompts), 1))
    speculation = dataclasses.replace(config.speculation, num_draft_tokens=num_draft_tokens)
    if num_draft_tokens == 0:
        speculation = dataclasses.replace(
            speculation, synthetic_acceptance_length=None, synthetic_acceptance_rate=None
        )
    config = dataclasses.replace(config, scheduling=scheduling, speculation=speculation)
    engine = Engine(config, models)
    # Warm: modules, caches, and the graphs of every shape of the run, those of its end too.
    run(engine, prompts, output_len)
    steps = _Steps(len(prompts))
    engine.observer = steps
    before = engine.stats.acceptance.stats()
    elapsed, ttft, tpot, tokens = run(engine, prompts, output_len)
    after = engine.stats.acceptance.stats()
    verified = after.steps - before.steps
    spec = models.target.spec
    layers = sum(spec.moe_layers)
    experts = steps.median("experts") / layers if layers else 0.0
    floor = None
    if bandwidth_gb_s is not None:
        dtype = str(models.target.embed_tokens.weight.dtype).removeprefix("torch.")
        draft = None if models.draft is None else models.draft.spec
        floor = step_bytes(spec, draft, experts, num_draft_tokens, dtype) / bandwidth_gb_s / 1e6
    step_ms = steps.median("step")
    target_ms, draft_ms = steps.median("target"), steps.median("draft")
    return Row(
        concurrency=len(prompts),
        num_draft_tokens=num_draft_tokens,
        step_ms=step_ms,
        target_ms=target_ms,
        draft_ms=draft_ms,
        host_ms=step_ms - target_ms - draft_ms,
        ttft_ms=ttft,
        tpot_ms=tpot,
        out_tok_s=tokens / elapsed,
        mean_acceptance_length=1 + (after.accepted - before.accepted) / verified
        if verified
        else 1.0,
        experts=experts,
        floor_ms=floor,
        share_of_floor=None if floor is None else floor / step_ms,
    )


def run(
    engine: Engine, prompts: Sequence[tuple[int, ...]], output_len: int
) -> tuple[float, float, float, int]:
    """Elapsed seconds, mean TTFT and TPOT in ms, output tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, seed=0)
    begin = time.perf_counter()
    for i, prompt in enumerate(prompts):
        sampling = dataclasses.replace(params, seed=i)
        engine.submit(Request(f"bench-{begin}-{i}", prompt, sampling))
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    tokens = 0
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for event in events:
            if isinstance(event, Tokens):
                first.setdefault(event.request_id, now)
                tokens += len(event.token_ids)
            elif isinstance(event, Finished):
                last[event.request_id] = now
    ttft = statistics.mean(first.values()) - begin
    tpot = statistics.mean((last[r] - first[r]) / max(output_len - 1, 1) for r in first)
    return time.perf_counter() - begin, ttft * 1e3, tpot * 1e3, tokens


class _Steps:
    """Collects the steps in which every sequence decoded and none prefilled."""

    def __init__(self, num_sequences: int) -> None:
        self._num_sequences = num_sequences
        self._last: float | None = None
        self._values: dict[str, list[float]] = {k: [] for k in ("step", "target", "draft")}
        self._values["experts"] = []

    def __call__(self, plan: StepPlan, result: StepResult) -> None:
        now = time.perf_counter()
        full = len(plan.decode) == self._num_sequences and not plan.prefill
        if full and self._last is not None:
            self._values["step"].append((now - self._last) * 1e3)
            self._values["target"].append(result.times.target_ms)
            self._values["draft"].append(result.times.draft_ms)
            self._values["experts"].append(float(result.num_experts))
        self._last = now if full else None

    def median(self, name: str) -> float:
        return statistics.median(self._values[name]) if self._values[name] else 0.0


def to_text(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table; gain is out tok/s over the plain row of the concurrency."""
    plain = {r.concurrency: r.out_tok_s for r in rows if r.num_draft_tokens == 0}
    lines = [
        "| conc | K | step ms | target | draft | host | TTFT ms | TPOT ms | out tok/s | gain | AL "
        "| experts | floor ms | share |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        gain = f"{r.out_tok_s / plain[r.concurrency]:.2f}x" if r.concurrency in plain else "-"
        floor = "-" if r.floor_ms is None else f"{r.floor_ms:.2f}"
        share = "-" if r.share_of_floor is None else f"{100 * r.share_of_floor:.0f}%"
        lines.append(
            f"| {r.concurrency} | {r.num_draft_tokens} | {r.step_ms:.2f} | {r.target_ms:.2f} | "
            f"{r.draft_ms:.2f} | {r.host_ms:.2f} | {r.ttft_ms:.1f} | {r.tpot_ms:.2f} | "
            f"{r.out_tok_s:.0f} | {gain} | {r.mean_acceptance_length:.2f} | {r.experts:.1f} | "
            f"{floor} | {share} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "gpu": gpu,
        "cpu_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(config: Config, rows: Sequence[Row], file: Path) -> None:
    """Rows with the effective settings and the machine."""
    body = {
        "machine": machine(),
        "settings": config.to_toml(),
        "rows": [asdict(r) for r in rows],
    }
    file.write_text(json.dumps(body, indent=1) + "\n")
