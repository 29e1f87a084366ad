"""Step time and throughput at fixed concurrencies, with and without the draft, against the floor.

The floor is bytes: what a decode step must read at least (weights once, the experts that were
really hit, the draft's passes) over the memory's measured bandwidth. KV reads are a time of their
own beside it.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from eaglerun.bench.drive import Steps, run_to_end, submit
from eaglerun.bench.table import Columns, Table, number, percent
from eaglerun.bench.workbench import Workbench
from eaglerun.engine import Engine
from eaglerun.errors import EngineError

CONCURRENCY = (1, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. Times are medians over full decode steps, milliseconds.

    step_ms        from one commit to the next, host work included
    target_ms, draft_ms  of the step, on the device;  host_ms: the rest of step_ms
    out_tok_s      output tokens over the whole run, prefill included
    experts        distinct experts hit by a decode step, mean over the MoE layers
    context        keys that a sequence sees, mean over sequences and steps
    floor_ms       weight bytes of the step over the bandwidth;  kv_ms: its KV bytes over it
    arithmetic_ms  what products of many rows take beyond their bytes, at the peak of arithmetic
    share_of_floor, share_with_kv, share_with_all  floor_ms, floor_ms + kv_ms, and with
                   arithmetic_ms too, over step_ms
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
    context: float
    floor_ms: float | None
    kv_ms: float | None
    arithmetic_ms: float | None
    share_of_floor: float | None
    share_with_kv: float | None
    share_with_all: float | None


def measure(
    bench: Workbench,
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    num_draft_tokens: int,
    output_len: int,
) -> Row:
    """All ``prompts`` at once, ``output_len`` tokens each, greedy, EOS ignored.

    Raises  EngineError when they never all decode in the same step.
    """
    lens = [output_len] * len(prompts)
    # Warm: modules, caches, and the graphs of every shape of the run, those of its end too.
    run_to_end(engine, submit(engine, prompts, lens, num_draft_tokens))
    steps = Steps(len(prompts))
    engine.observer = steps
    before = engine.stats.acceptance.stats()
    times = submit(engine, prompts, lens, num_draft_tokens)
    elapsed = run_to_end(engine, times)
    engine.observer = None
    if not steps.count:
        raise EngineError(
            f"{len(prompts)} sequences of {output_len} tokens: no two steps in a row in which all "
            "of them decoded; more --output-len or KV memory is needed"
        )
    after = engine.stats.acceptance.stats()
    verified = after.steps - before.steps
    step_ms = steps.median("step")
    target_ms, draft_ms = steps.median("target"), steps.median("draft")
    experts, context = bench.experts(steps.median("experts")), steps.median("context")
    least = bench.step_bytes(num_draft_tokens, experts, len(prompts), context)
    floor_ms, kv_ms = bench.ms_of(least.weights), bench.ms_of(least.kv)
    arithmetic_ms = bench.arithmetic_ms(num_draft_tokens, len(prompts))
    return Row(
        concurrency=len(prompts),
        num_draft_tokens=num_draft_tokens,
        step_ms=step_ms,
        target_ms=target_ms,
        draft_ms=draft_ms,
        host_ms=step_ms - target_ms - draft_ms,
        ttft_ms=statistics.mean(t.ttft_ms for t in times.values()),
        tpot_ms=statistics.mean(t.tpot_ms for t in times.values()),
        out_tok_s=sum(lens) / elapsed,
        mean_acceptance_length=1 + (after.accepted - before.accepted) / verified
        if verified
        else 1.0,
        experts=experts,
        context=context,
        floor_ms=floor_ms,
        kv_ms=kv_ms,
        arithmetic_ms=arithmetic_ms,
        share_of_floor=share(step_ms, floor_ms),
        share_with_kv=share(step_ms, floor_ms, kv_ms),
        share_with_all=share(step_ms, floor_ms, kv_ms, arithmetic_ms),
    )


def share(whole: float, *parts: float | None) -> float | None:
    """The parts' sum over ``whole``; None where a part is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) / whole if whole and len(known) == len(parts) else None


def _gain(row: Row, rows: Sequence[Row]) -> str:
    """out tok/s over that of the plain row of the same concurrency."""
    plain = [
        r.out_tok_s for r in rows if r.concurrency == row.concurrency and not r.num_draft_tokens
    ]
    return f"{row.out_tok_s / plain[0]:.2f}x" if plain else "-"


COLUMNS: Columns[Row] = {
    "conc": lambda r, _: str(r.concurrency),
    "K": lambda r, _: str(r.num_draft_tokens),
    "step ms": lambda r, _: number(r.step_ms),
    "target": lambda r, _: number(r.target_ms),
    "draft": lambda r, _: number(r.draft_ms),
    "host": lambda r, _: number(r.host_ms),
    "TTFT ms": lambda r, _: number(r.ttft_ms, 1),
    "TPOT ms": lambda r, _: number(r.tpot_ms),
    "out tok/s": lambda r, _: number(r.out_tok_s, 0),
    "gain": _gain,
    "AL": lambda r, _: number(r.mean_acceptance_length),
    "experts": lambda r, _: number(r.experts, 1),
    "floor ms": lambda r, _: number(r.floor_ms),
    "share": lambda r, _: percent(r.share_of_floor),
    "KV ms": lambda r, _: number(r.kv_ms),
    "share with KV": lambda r, _: percent(r.share_with_kv),
    "FLOP ms": lambda r, _: number(r.arithmetic_ms),
    "share with both": lambda r, _: percent(r.share_with_all),
}


@dataclass(frozen=True, slots=True)
class FillRow:
    """What keeping the draft's KV filled costs a step that drafts nothing: ``cost`` is the share
    of the plain step that the step with the draft loaded takes more."""

    concurrency: int
    plain_ms: float
    filling_ms: float
    cost: float


FILL_COLUMNS: Columns[FillRow] = {
    "conc": lambda r, _: str(r.concurrency),
    "plain step ms": lambda r, _: number(r.plain_ms, 3),
    "with the draft's KV ms": lambda r, _: number(r.filling_ms, 3),
    "cost": lambda r, _: percent(r.cost, 1),
}


def run(bench: Workbench) -> None:
    """One row for each concurrency and K; the plain rows first, for the gain."""
    options = bench.options
    table = Table("latency", COLUMNS, options.out, bench.settings)
    concurrencies = bench.concurrencies(CONCURRENCY)
    for k in bench.num_drafts:
        for n in concurrencies:
            if bench.in_time(f"latency of K = {k} at {n}"):
                engine = bench.engine(k > 0, max(concurrencies))
                table.add(measure(bench, engine, bench.prompts(n), k, options.output_len))
    print(table.to_text())


def run_fill(bench: Workbench) -> None:
    """The plain engine against the one that holds the draft and drafts nothing, one right after
    the other, for the GPU's clock drifts. A quarter of the output is steps enough."""
    options = bench.options
    if bench.models.draft is None:
        bench.skip("fill", "there is no draft")
        return
    table = Table("fill", FILL_COLUMNS, options.out, bench.settings)
    concurrencies = bench.concurrencies(CONCURRENCY)
    output_len = max(options.output_len // 4, min(options.output_len, 32))
    for n in concurrencies:
        if bench.in_time(f"draft fill at {n}"):
            plain, filling = (
                measure(
                    bench, bench.engine(draft, max(concurrencies)), bench.prompts(n), 0, output_len
                )
                for draft in (False, True)
            )
            cost = filling.step_ms / plain.step_ms - 1
            table.add(FillRow(n, plain.step_ms, filling.step_ms, cost))
    print(table.to_text())
