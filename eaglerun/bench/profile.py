"""Decode steps under torch's profiler: how long the device was idle, and what took its time."""

import contextlib
import gzip
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from eaglerun.bench.drive import Steps, decode_steps, stop, submit
from eaglerun.bench.table import Columns, Table, number, percent
from eaglerun.bench.trace import STEP, Activity, Summary, parse, summarize
from eaglerun.bench.workbench import Workbench
from eaglerun.engine import Engine
from eaglerun.errors import RankFailed

CONCURRENCY = (1, 64)
WARM_STEPS = 6
NUM_TOP = 12


def record(
    bench: Workbench, step: Callable[[], object], num_steps: int, keep: Path | None = None
) -> list[Activity]:
    """What the device did while ``step`` was called ``num_steps`` times, one after the other.

    keep  a file.json.gz for the whole trace

    Raises  RankFailed of a step, without waiting for the device.
    """
    # Captured graphs do not survive that the tracing library is unloaded and loaded again.
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    bench.synchronize()
    with contextlib.ExitStack() as stack:
        recorded = stack.enter_context(profile(activities=activities, acc_events=True))
        try:
            for i in range(num_steps):
                with record_function(f"{STEP}{i}"):
                    step()
        except RankFailed:
            # The profiler stays on, for its end would wait for the device that hangs.
            stack.pop_all()
            raise
        bench.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        text = file.read_bytes()
    if keep is not None:
        keep.write_bytes(gzip.compress(text, 3))
    return parse(json.loads(text)["traceEvents"])


def profile_decode(
    bench: Workbench, engine: Engine, num_steps: int, keep: Path | None = None
) -> Summary:
    """Of ``num_steps`` steps of an engine whose sequences are all decoding."""
    return summarize(record(bench, engine.step, num_steps, keep), num_steps)


@dataclass(frozen=True, slots=True)
class Row:
    """Idle time at a concurrency and K; shares are of the profiled time.

    step_ms      without the profiler;  profiled_ms: with it
    idle, no_kernel, between_steps  as in trace.Summary
    """

    concurrency: int
    num_draft_tokens: int
    num_steps: int
    step_ms: float
    profiled_ms: float
    idle: float
    no_kernel: float
    between_steps: float | None


COLUMNS: Columns[Row] = {
    "conc": lambda r, _: str(r.concurrency),
    "K": lambda r, _: str(r.num_draft_tokens),
    "steps": lambda r, _: str(r.num_steps),
    "step ms": lambda r, _: number(r.step_ms),
    "profiled ms": lambda r, _: number(r.profiled_ms),
    "idle": lambda r, _: percent(r.idle, 2),
    "no kernel": lambda r, _: percent(r.no_kernel, 2),
    "between steps": lambda r, _: percent(r.between_steps, 2),
}


@dataclass(frozen=True, slots=True)
class KernelRow:
    """A group of kernels, or one kernel by its name, of a profiled step.

    ms, launches  a step;  mb: what the group must read at least, a step, where that is known
    """

    concurrency: int
    num_draft_tokens: int
    name: str
    is_group: bool
    ms: float
    share: float
    launches: float
    mb: float | None
    gb_per_s: float | None


KERNEL_COLUMNS: Columns[KernelRow] = {
    "conc": lambda r, _: str(r.concurrency),
    "K": lambda r, _: str(r.num_draft_tokens),
    "group or kernel": lambda r, _: f"**{r.name}**" if r.is_group else f"`{r.name[:60]}`",
    "ms a step": lambda r, _: number(r.ms, 3),
    "share": lambda r, _: percent(r.share, 1),
    "launches": lambda r, _: number(r.launches, 1),
    "MB": lambda r, _: number(r.mb, 1),
    "GB/s": lambda r, _: number(r.gb_per_s, 0),
}


def kernel_rows(
    concurrency: int, k: int, summary: Summary, group_bytes: dict[str, float]
) -> list[KernelRow]:
    """The groups, then the kernels that took longest."""
    rows = []
    for shares, is_group in ((summary.groups, True), (summary.top[:NUM_TOP], False)):
        for s in shares:
            known = group_bytes.get(s.name) if is_group else None
            rows.append(
                KernelRow(
                    concurrency=concurrency,
                    num_draft_tokens=k,
                    name=s.name,
                    is_group=is_group,
                    ms=s.ms,
                    share=s.ms / summary.step_ms,
                    launches=s.count,
                    mb=None if not known else known / 1e6,
                    gb_per_s=None if not known else known / s.ms / 1e6,
                )
            )
    return rows


def run(bench: Workbench) -> None:
    """Decode steps of each K at each concurrency: idle time, groups and top kernels."""
    options = bench.options
    table = Table("profile", COLUMNS, options.out, bench.settings)
    kernels = Table("profile_kernels", KERNEL_COLUMNS, options.out, bench.settings)
    concurrencies = bench.concurrencies(CONCURRENCY)
    for k in bench.num_drafts:
        engine = bench.engine(k > 0, max(concurrencies))
        for n in concurrencies:
            if bench.in_time(f"profile of K = {k} at {n}"):
                _run_one(bench, engine, n, k, table, kernels)
    print(table.to_text(), kernels.to_text(), sep="\n\n")


def _run_one(
    bench: Workbench,
    engine: Engine,
    n: int,
    k: int,
    table: Table[Row],
    kernels: Table[KernelRow],
) -> None:
    num_steps, out = bench.options.num_steps, bench.options.out
    prompts = bench.prompts(n)
    # The first sequence decodes while the last is still prefilled.
    room = max(1, bench.config.scheduling.max_num_batched_tokens - n * (k + 1))
    prefills = -(-sum(map(len, prompts)) // room) + n
    output_len = (WARM_STEPS + 2 * num_steps + 4 + prefills) * (k + 1)
    steps = Steps(n)
    engine.observer = steps
    requests = submit(engine, prompts, [output_len] * n, k)
    decode_steps(engine, steps, WARM_STEPS)
    steps.forget()
    decode_steps(engine, steps, num_steps)
    step_ms, experts = steps.median("step"), bench.experts(steps.median("experts"))
    keep = None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        keep = out / f"trace-{n}-{k}.json.gz"
    found = profile_decode(bench, engine, num_steps, keep)
    stop(engine, list(requests))
    engine.observer = None
    table.add(
        Row(
            concurrency=n,
            num_draft_tokens=k,
            num_steps=found.num_steps,
            step_ms=step_ms,
            profiled_ms=found.step_ms,
            idle=found.idle,
            no_kernel=found.no_kernel,
            between_steps=found.between_steps,
        )
    )
    least = bench.step_bytes(k, experts, n, steps.median("context")).by_group()
    for row in kernel_rows(n, k, found, least):
        kernels.add(row)
