"""Prefill of one prompt, alone: time to first token against its operations, and by chunk.

The floor is floating-point operations (floor.prefill_flops) over the measured rate of a large
product. A profiled run of each prompt gives the time of each kind of attention by chunk, from which
one sees what grows with the context: the index scan and the dense layers, and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eaglerun.bench.drive import random_prompts, run_to_end, submit
from eaglerun.bench.floor import prefill_flops
from eaglerun.bench.latency import share
from eaglerun.bench.profile import record
from eaglerun.bench.table import Columns, Table, number, percent
from eaglerun.bench.trace import Activity, grouped
from eaglerun.bench.workbench import Workbench
from eaglerun.engine import Engine


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of ``length`` tokens, the draft's KV filled where there is a draft.

    ttft_ms     from the submission to the first token
    floor_ms    its operations over the machine's rate;  share_of_floor: of ttft_ms
    peak_gib    most memory allocated during it, weights and KV included; None on a CPU
    """

    length: int
    chunk: int
    draft_loaded: bool
    ttft_ms: float
    tok_s: float
    tflop: float
    tflop_per_s: float
    floor_ms: float | None
    share_of_floor: float | None
    peak_gib: float | None


COLUMNS: Columns[Row] = {
    "tokens": lambda r, _: str(r.length),
    "chunk": lambda r, _: str(r.chunk),
    "TTFT ms": lambda r, _: number(r.ttft_ms, 1),
    "tok/s": lambda r, _: number(r.tok_s, 0),
    "TFLOP": lambda r, _: number(r.tflop, 1),
    "TFLOP/s": lambda r, _: number(r.tflop_per_s, 1),
    "floor ms": lambda r, _: number(r.floor_ms, 1),
    "share": lambda r, _: percent(r.share_of_floor),
    "peak GiB": lambda r, _: number(r.peak_gib, 1),
}


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A chunk of a profiled prompt: microseconds a token, all layers of a kind together."""

    length: int
    start: int
    end: int
    total_us: float
    dense_us: float
    scan_us: float
    sparse_us: float
    moe_us: float
    linear_us: float
    other_us: float


CHUNK_COLUMNS: Columns[ChunkRow] = {
    "tokens": lambda r, _: str(r.length),
    "from": lambda r, _: str(r.start),
    "to": lambda r, _: str(r.end),
    "us a token": lambda r, _: number(r.total_us),
    "dense att.": lambda r, _: number(r.dense_us),
    "index scan": lambda r, _: number(r.scan_us, 3),
    "sparse att.": lambda r, _: number(r.sparse_us, 3),
    "MoE": lambda r, _: number(r.moe_us),
    "linear": lambda r, _: number(r.linear_us),
    "other": lambda r, _: number(r.other_us),
}


def run(bench: Workbench) -> None:
    """A row for each length, and one for each chunk of the profiled prompts."""
    options = bench.options
    table = Table("prefill", COLUMNS, options.out, bench.settings)
    chunks = Table("prefill_chunks", CHUNK_COLUMNS, options.out, bench.settings)
    bench.drop_engines()
    draft = bench.models.draft is not None
    kv = bench.kv_budget(draft)
    length = max(options.contexts) + 2
    engine = bench.engine(
        draft, 1, max_model_len=length, num_kv_blocks=-(-length // kv.block_size) + 1
    )
    # The short ones first: they warm what the long ones need.
    for n in sorted(options.contexts):
        if bench.in_time(f"prefill of {n}"):
            table.add(_measure(bench, engine, n))
        if bench.in_time(f"profile of the prefill of {n}"):
            rows = _profile(bench, engine, n)
            for row in rows:
                chunks.add(row)
            if not rows:
                bench.skip(f"chunks of {n}", "the trace does not tell the steps apart")
    bench.drop_engines()
    print(table.to_text(), chunks.to_text(), sep="\n\n")


def _prompt(bench: Workbench, length: int) -> tuple[int, ...]:
    seed = bench.config.model.seed + length
    return random_prompts(1, length, bench.models.target.spec.vocab_size, seed)[0]


def _measure(bench: Workbench, engine: Engine, length: int) -> Row:
    prompt = _prompt(bench, length)
    run_to_end(engine, submit(engine, [prompt], [1], 0))
    gpu = bench.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    times = submit(engine, [prompt], [1], 0)
    run_to_end(engine, times)
    ttft_ms = next(iter(times.values())).ttft_ms
    draft = None if bench.models.draft is None else bench.models.draft.spec
    total = prefill_flops(bench.models.target.spec, draft, length).total
    rate = bench.options.flops
    floor_ms = None if rate is None else total / rate * 1e3
    return Row(
        length=length,
        chunk=engine.scheduler.limits.max_chunk_tokens,
        draft_loaded=draft is not None,
        ttft_ms=ttft_ms,
        tok_s=length / ttft_ms * 1e3,
        tflop=total / 1e12,
        tflop_per_s=total / ttft_ms / 1e9,
        floor_ms=floor_ms,
        share_of_floor=share(ttft_ms, floor_ms),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    )


def _profile(bench: Workbench, engine: Engine, length: int) -> list[ChunkRow]:
    submit(engine, [_prompt(bench, length)], [1], 0)
    size = engine.scheduler.limits.max_chunk_tokens
    activities = record(bench, engine.step, -(-length // size))
    while engine.has_work:
        engine.step()
    return chunk_rows(activities, length, size)


def chunk_rows(activities: Sequence[Activity], length: int, size: int) -> list[ChunkRow]:
    """A row for each chunk of ``size`` of ``length`` tokens: chunk i was launched in step i."""
    spent: dict[int, dict[str, float]] = {}
    for group, a in grouped([a for a in activities if a.is_kernel]):
        if a.step is not None:
            by_group = spent.setdefault(a.step, {})
            by_group[group] = by_group.get(group, 0.0) + a.us
    rows = []
    for step, by_group in sorted(spent.items()):
        start = step * size
        end = min(length, start + size)
        each = {name: us / (end - start) for name, us in by_group.items()}
        rows.append(
            ChunkRow(
                length=length,
                start=start,
                end=end,
                total_us=sum(each.values()),
                dense_us=each.pop("dense attention", 0.0),
                scan_us=each.pop("index scan", 0.0),
                sparse_us=each.pop("sparse attention", 0.0),
                moe_us=each.pop("MoE", 0.0),
                linear_us=each.pop("linear", 0.0),
                other_us=sum(each.values()),
            )
        )
    return rows
