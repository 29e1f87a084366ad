"""Decode steps at long contexts that nobody prefilled.

The KV memory is filled with seeded random numbers and the prompts' full blocks are published to
the prefix cache, as if an earlier request had computed them. The requests then find all but their
last token there, and everything else is the engine's own work. The keys being random, so are the
blocks that a row selects: no two rows or groups agree more than by chance.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.bench.drive import Steps, decode_steps, stop, submit
from eaglerun.bench.latency import share
from eaglerun.bench.profile import WARM_STEPS, profile_decode
from eaglerun.bench.table import Columns, Table, number, percent, say
from eaglerun.bench.workbench import Workbench
from eaglerun.engine import Engine
from eaglerun.plan.blocks import hash_block, root_name
from eaglerun.ranks.local import runner_of

BATCHES = (1, 8, 32)
PROFILED_STEPS = 4
# Beside the KV memory: activations, logits, graphs.
RESERVED_BYTES = 6 << 30
_SLICE = 1 << 27  # elements drawn at once


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement; the times as in latency.Row.

    wanted      sequences asked for;  batch: as many of them as the KV memory holds
    dense_ms, scan_ms, sparse_ms, moe_ms, linear_ms, norms_ms, other_ms
                of a profiled step, by group;  idle: share of it in which nothing ran
    """

    context: int
    wanted: int
    batch: int
    num_draft_tokens: int
    step_ms: float
    target_ms: float
    draft_ms: float
    host_ms: float
    experts: float
    floor_ms: float | None
    kv_ms: float | None
    share_of_floor: float | None
    share_with_kv: float | None
    dense_ms: float
    scan_ms: float
    sparse_ms: float
    moe_ms: float
    linear_ms: float
    norms_ms: float
    other_ms: float
    idle: float


COLUMNS: Columns[Row] = {
    "context": lambda r, _: str(r.context),
    "batch": lambda r, _: str(r.batch) + (f" (of {r.wanted})" if r.batch < r.wanted else ""),
    "K": lambda r, _: str(r.num_draft_tokens),
    "step ms": lambda r, _: number(r.step_ms),
    "target": lambda r, _: number(r.target_ms),
    "draft": lambda r, _: number(r.draft_ms),
    "host": lambda r, _: number(r.host_ms),
    "experts": lambda r, _: number(r.experts, 1),
    "floor ms": lambda r, _: number(r.floor_ms),
    "KV ms": lambda r, _: number(r.kv_ms),
    "share": lambda r, _: percent(r.share_of_floor),
    "share with KV": lambda r, _: percent(r.share_with_kv),
    "index scan": lambda r, _: number(r.scan_ms, 3),
    "sparse att.": lambda r, _: number(r.sparse_ms, 3),
    "dense att.": lambda r, _: number(r.dense_ms, 3),
    "MoE": lambda r, _: number(r.moe_ms, 3),
    "linear": lambda r, _: number(r.linear_ms, 3),
    "norms": lambda r, _: number(r.norms_ms, 3),
    "other": lambda r, _: number(r.other_ms, 3),
    "idle": lambda r, _: percent(r.idle, 1),
}


def longest(contexts: Sequence[int], num_steps: int, num_draft_tokens: int) -> int:
    """Positions that the longest context and what is decoded after it need."""
    return max(contexts) + _output_len(num_steps, num_draft_tokens) + 1


def _output_len(num_steps: int, num_draft_tokens: int) -> int:
    return (WARM_STEPS + num_steps + PROFILED_STEPS + 4) * (num_draft_tokens + 1)


def fill_memory(engine: Engine, seed: int) -> None:
    """Random numbers everywhere in the engine's KV memory: cells no request wrote."""
    generator = torch.Generator(device=runner_of(engine).device).manual_seed(seed)
    for region in runner_of(engine).kv_regions():
        _randomize(region.tensor, generator)


def _randomize(tensor: Tensor, generator: torch.Generator) -> None:
    flat = tensor.view(-1)
    for part in flat.split(_SLICE):
        part.copy_(torch.randn(part.shape, generator=generator, device=part.device))


def publish(engine: Engine, prompt: Sequence[int]) -> None:
    """Let a request with this prompt find its full blocks in the prefix cache."""
    pool = engine.pool
    size = pool.block_size
    names, parent = [], root_name("")
    for start in range(0, (len(prompt) - 1) // size * size, size):
        parent = hash_block(parent, prompt[start : start + size])
        names.append(parent)
    held = pool.match(names)
    pool.share(held)
    new = pool.allocate(len(names) - len(held))
    for block, name in zip(new, names[len(held) :], strict=True):
        pool.publish(block, name)
    pool.release(held + new)


def run(bench: Workbench) -> None:
    """One row for each K, context and batch."""
    table = Table("contexts", COLUMNS, bench.options.out, bench.settings)
    for k in bench.num_drafts:
        if bench.in_time(f"contexts with K = {k}"):
            # The engine of the last K must be gone before the next one's memory is sized.
            bench.drop_engines()
            _run_k(bench, k, table)
    bench.drop_engines()
    print(table.to_text())


def _run_k(bench: Workbench, k: int, table: Table[Row]) -> None:
    options = bench.options
    batches = options.concurrency or BATCHES
    size = bench.kv_budget(k > 0).block_size
    # Of a sequence beside its context: what it decodes, and a block that drafting reserves.
    spare = -(-_output_len(options.num_steps, k) // size) + 2
    wanted = max(n * (c // size + spare) for c in options.contexts for n in batches)
    blocks = min(wanted, bench.free_blocks(k > 0, RESERVED_BYTES))
    limit = bench.models.target.spec.max_position_embeddings
    length = min(longest(options.contexts, options.num_steps, max(bench.num_drafts)), limit)
    engine = bench.engine(
        k > 0,
        max(batches),
        max_model_len=min(length, blocks * size),
        num_kv_blocks=blocks,
        prefix_caching=True,
    )
    fill_memory(engine, bench.config.model.seed)
    say(f"{blocks} KV blocks of {size} tokens hold random numbers")
    for context in options.contexts:
        for n in batches:
            fits = min(n, blocks // (context // size + spare))
            if not fits:
                bench.skip(f"context {context}", f"{blocks} KV blocks do not hold one")
            elif bench.in_time(f"context {context}, batch {n}, K = {k}"):
                table.add(_measure(bench, engine, context, n, fits, k))


def _prompts(bench: Workbench, context: int, count: int) -> list[tuple[int, ...]]:
    """Of whole blocks and one token more, which is all that is left to compute. Shorter ones are
    the beginnings of longer ones, and share their blocks."""
    vocab_size, size = bench.models.target.spec.vocab_size, bench.kv_budget(False).block_size
    found = []
    for i in range(count):
        generator = torch.Generator().manual_seed(bench.config.model.seed + i)
        most = (max(bench.options.contexts) + 1,)
        tokens = torch.randint(vocab_size, most, generator=generator)
        found.append(tuple(tokens[: context // size * size + 1].tolist()))
    return found


def _measure(
    bench: Workbench, engine: Engine, context: int, wanted: int, batch: int, k: int
) -> Row:
    prompts = _prompts(bench, context, batch)
    for prompt in prompts:
        publish(engine, prompt)
    num_steps = bench.options.num_steps
    steps = Steps(batch)
    engine.observer = steps
    requests = submit(engine, prompts, [_output_len(num_steps, k)] * batch, k)
    decode_steps(engine, steps, WARM_STEPS)
    steps.forget()
    decode_steps(engine, steps, num_steps)
    step_ms, target_ms, draft_ms = (steps.median(n) for n in ("step", "target", "draft"))
    experts, seen = bench.experts(steps.median("experts")), steps.median("context")
    found = profile_decode(bench, engine, PROFILED_STEPS)
    stop(engine, list(requests))
    engine.observer = None
    least = bench.step_bytes(k, experts, batch, seen)
    floor_ms, kv_ms = bench.ms_of(least.weights), bench.ms_of(least.kv)
    return Row(
        context=context,
        wanted=wanted,
        batch=batch,
        num_draft_tokens=k,
        step_ms=step_ms,
        target_ms=target_ms,
        draft_ms=draft_ms,
        host_ms=step_ms - target_ms - draft_ms,
        experts=experts,
        floor_ms=floor_ms,
        kv_ms=kv_ms,
        share_of_floor=share(step_ms, floor_ms),
        share_with_kv=share(step_ms, floor_ms, kv_ms),
        dense_ms=found.group_ms("dense attention"),
        scan_ms=found.group_ms("index scan"),
        sparse_ms=found.group_ms("sparse attention"),
        moe_ms=found.group_ms("MoE"),
        linear_ms=found.group_ms("linear"),
        norms_ms=found.group_ms("norms"),
        other_ms=found.group_ms("other"),
        idle=found.idle,
    )
