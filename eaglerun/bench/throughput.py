"""Throughput: more prompts than run at once, all there from the start, until the last has ended."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from eaglerun.bench.drive import run_to_end, submit
from eaglerun.bench.table import Columns, Table, number
from eaglerun.bench.workbench import Workbench

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Row:
    """One run. Times in milliseconds at the percentiles 50, 90 and 99 over the requests.

    max_num_seqs  how many run at once
    input_tokens, output_tokens  of all requests
    ttft  from the submission of all, the wait for a slot included, to a request's first token
    tpot  mean time of a token after the first;  itl: between two arrivals of a request's tokens
    """

    num_draft_tokens: int
    num_prompts: int
    max_num_seqs: int
    input_tokens: int
    output_tokens: int
    elapsed_s: float
    out_tok_s: float
    total_tok_s: float
    req_s: float
    ttft_ms: tuple[float, ...]
    tpot_ms: tuple[float, ...]
    itl_ms: tuple[float, ...]
    mean_acceptance_length: float
    preemptions: int


def percentiles(values: Sequence[float]) -> tuple[float, ...]:
    """At PERCENTILES, the nearest value at or above the rank. ValueError if there are none."""
    if not values:
        raise ValueError("no values, so no percentiles")
    ordered = sorted(values)
    return tuple(ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES)


def lengths(count: int, length: int, vary: float, seed: int) -> list[int]:
    """``count`` whole numbers between (1 - vary) x length and length, evenly drawn."""
    rng = random.Random(seed)
    low = max(1, round((1 - vary) * length))
    return [rng.randint(low, length) for _ in range(count)]


def _triple(values: tuple[float, ...]) -> str:
    return " / ".join(number(value, 1) for value in values)


COLUMNS: Columns[Row] = {
    "K": lambda r, _: str(r.num_draft_tokens),
    "requests": lambda r, _: str(r.num_prompts),
    "at once": lambda r, _: str(r.max_num_seqs),
    "s": lambda r, _: number(r.elapsed_s),
    "out tok/s": lambda r, _: number(r.out_tok_s, 0),
    "total tok/s": lambda r, _: number(r.total_tok_s, 0),
    "req/s": lambda r, _: number(r.req_s),
    "TTFT p50 / p90 / p99 ms": lambda r, _: _triple(r.ttft_ms),
    "TPOT ms": lambda r, _: _triple(r.tpot_ms),
    "ITL ms": lambda r, _: _triple(r.itl_ms),
    "AL": lambda r, _: number(r.mean_acceptance_length),
}


def run(bench: Workbench) -> None:
    """One row for each K."""
    options = bench.options
    table = Table("throughput", COLUMNS, options.out, bench.settings)
    seed = bench.config.model.seed
    for k in bench.num_drafts:
        if bench.in_time(f"throughput of K = {k}"):
            table.add(_measure(bench, k, seed))
    print(table.to_text())


def _measure(bench: Workbench, k: int, seed: int) -> Row:
    options = bench.options
    engine = bench.engine(k > 0, max(options.concurrency, default=0))
    prompts = bench.prompts(options.num_prompts)
    if options.prompts == "random":
        wanted = lengths(len(prompts), options.input_len, options.vary, seed)
        prompts = [p[:n] for p, n in zip(prompts, wanted, strict=True)]
    outputs = lengths(len(prompts), options.output_len, options.vary, seed + 1)
    # Random prompts have no end of their own. A word problem's is kept, for what a model writes
    # behind its answer is not what its draft was made for.
    ignore_eos = options.prompts == "random"
    # Warm: the graphs of the batch sizes that the run passes through, in a quarter of the time.
    run_to_end(engine, submit(engine, prompts, [-(-n // 4) for n in outputs], k, ignore_eos))
    before, preemptions = engine.stats.acceptance.stats(), engine.stats.preemptions
    times = submit(engine, prompts, outputs, k, ignore_eos)
    elapsed = run_to_end(engine, times)
    after = engine.stats.acceptance.stats()
    verified = after.steps - before.steps
    accepted = after.accepted - before.accepted
    num_in = sum(map(len, prompts))
    num_out = sum(count for t in times.values() for _, count in t.tokens)
    return Row(
        num_draft_tokens=k,
        num_prompts=len(prompts),
        max_num_seqs=engine.scheduler.limits.max_num_seqs,
        input_tokens=num_in,
        output_tokens=num_out,
        elapsed_s=elapsed,
        out_tok_s=num_out / elapsed,
        total_tok_s=(num_in + num_out) / elapsed,
        req_s=len(prompts) / elapsed,
        ttft_ms=percentiles([t.ttft_ms for t in times.values()]),
        tpot_ms=percentiles([t.tpot_ms for t in times.values()]),
        itl_ms=percentiles([gap for t in times.values() for gap in t.gaps_ms] or [0.0]),
        mean_acceptance_length=1 + accepted / verified if verified else 1.0,
        preemptions=engine.stats.preemptions - preemptions,
    )
