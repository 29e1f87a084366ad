"""eaglerun bench kernels: every kernel at M3's shapes, checked, then timed.

A kernel is first compared with its reference on the same inputs; a red check prints no number.
It is timed under graph replay, over input sets that together exceed the cache, against the
machine's own peak: the bandwidth of a large copy (bytes read and written) and the rate of a large
bf16 product. A kernel that moves little is held against a copy of as many bytes under the same
replay. Bytes are what must move: weights and keys that are used, inputs and outputs once.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eaglerun.bench.table import Columns, Table, number, percent, say
from eaglerun.errors import ConfigError, EngineError
from eaglerun.kernels import Op
from eaglerun.kernels.accept import accept
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.attention_sparse import attention_sparse
from eaglerun.kernels.draft_fuse import embed_dual_rmsnorm, group_rmsnorm
from eaglerun.kernels.draft_inputs import (
    accepted_inputs,
    draft_inputs,
    newest_inputs,
    verify_inputs,
)
from eaglerun.kernels.index_topk import block_scores, index_topk, topk_blocks
from eaglerun.kernels.kv_store import draft_kv_fill, kv_store
from eaglerun.kernels.linear import MAX_ROWS, linear
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.noise import gumbel_argmax
from eaglerun.kernels.rmsnorm import add_gemma_rmsnorm
from eaglerun.kernels.rows import Best, BySlot, Experts, HeadNorms, LayerKV, Newest, Routing, Rows
from eaglerun.kernels.swiglu_oai import swiglu
from eaglerun.kernels.vocab_argmax import vocab_argmax

HIDDEN, HEADS, GROUPS, DIM, PAGE, TOPK = 6144, 64, 4, 128, 128, 16
EXPERTS, WIDTH, VOCAB, DRAFT_WIDTH = 128, 3072, 200064, 18432
BF16 = torch.bfloat16
WARM_S = 0.02  # clocks rise, translations are found
CACHE_BYTES = 256 << 20  # what a set of inputs must exceed to come from memory each time
DEVICE = torch.device("cuda")


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape. ``inputs`` are alike; a run takes them in turn.

    The names are those of the recorded tables (recipes/kernels-h200.md): an op that has several
    forms is named with its form.

    moved_bytes, flops  of one call;  tolerance  of |out - ref| / |ref|, 0: equal
    """

    name: str
    op: Callable[..., Any]
    inputs: list[tuple[Any, ...]]
    moved_bytes: float
    flops: float = 0.0
    tolerance: float = 5e-3


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    us: float
    copy_us: float
    gb_per_s: float
    bandwidth_share: float
    tflop_per_s: float
    flop_share: float
    error: float


def timed_us(run: Callable[[int], object], calls: int, replays: int = 10) -> float:
    """Median time of one call, of ``calls`` in a graph; run(i) launches the i-th."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(min(calls, 3)):
            run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(calls):
            run(i)
    begun = time.perf_counter()
    while time.perf_counter() - begun < WARM_S:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e3 / calls)
    return float(statistics.median(times))


def peaks() -> tuple[float, float]:
    """Bytes per second of a large copy, FLOP per second of a large bf16 product."""
    a, b = torch.randint(-(2**31), 2**31, (2, 1 << 29), dtype=torch.int32, device=DEVICE)
    bandwidth = 8 * a.numel() / timed_us(lambda _: copy(a, b), 2) * 1e6
    n = 8192
    x, y = (torch.randn(n, n, device=DEVICE, dtype=BF16) for _ in range(2))
    rate = 2 * n**3 / timed_us(lambda _: x @ y, 4) * 1e6
    return bandwidth, rate


def copy(source: Tensor, target: Tensor) -> None:
    """By a kernel that reads and writes: a graph's own copies take the slower copy engine."""
    torch.bitwise_not(source, out=target)


def error_of(case: Case, args: tuple[Any, ...]) -> float:
    """Largest relative distance of an output from the reference's; infinite when they differ
    in kind, or in an integer. What an op writes in place is restored and compared too."""
    if not isinstance(case.op, Op):
        return 0.0
    tensors = [t for t in _tensors(args) if t.numel() < 1 << 26]
    before = [t.clone() for t in tensors]
    actual = [*_tensors(case.op.kernel(*args))] + [t.clone() for t in tensors]
    for t, old in zip(tensors, before, strict=True):
        t.copy_(old)
    expected = [*_tensors(case.op.reference(*args))] + [t.clone() for t in tensors]
    for t, old in zip(tensors, before, strict=True):
        t.copy_(old)
    return max((_distance(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _tensors(value: object) -> Iterator[Tensor]:
    """Those that ``value`` is or holds, in order."""
    if isinstance(value, Best):
        yield from (value.values, value.ids)
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _distance(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    if not actual.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else float("inf")
    if not actual.numel() or torch.equal(actual, expected):
        return 0.0
    # Chunks, for a cache in float64 would not fit.
    flat = zip(actual.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True)
    squares = [((a.double() - e.double()).norm() ** 2, e.double().norm() ** 2) for a, e in flat]
    wrong, size = (float(sum(column)) for column in zip(*squares, strict=True))
    distance = (wrong / max(size, 1e-30)) ** 0.5
    return distance if distance == distance else float("inf")


def measure(case: Case, bandwidth: float, rate: float) -> Row:
    """Raises  AssertionError when the kernel is not its reference's equal."""
    error = error_of(case, case.inputs[0])
    assert error <= case.tolerance, f"{case.name}: error {error:.2g} > {case.tolerance:.2g}"
    run = case.op.kernel if isinstance(case.op, Op) else case.op
    count = len(case.inputs)
    calls = max(count, 20) if case.moved_bytes < 64e6 and case.flops < 1e11 else max(count, 2)
    us = timed_us(lambda i: run(*case.inputs[i % count]), calls)
    copy_us = 0.0
    if case.moved_bytes < 64e6:
        half = max(int(case.moved_bytes) // 8, 4)
        count = min(max(CACHE_BYTES // (8 * half), 1), 256)
        pool = torch.ones(count, 2, half, dtype=torch.int32, device=DEVICE)
        copy_us = timed_us(lambda i: copy(pool[i % count, 0], pool[i % count, 1]), 20)
    per_s = 1e6 / us
    return Row(
        case.name,
        us,
        copy_us,
        case.moved_bytes * per_s / 1e9,
        case.moved_bytes * per_s / bandwidth,
        case.flops * per_s / 1e12,
        case.flops * per_s / rate,
        error,
    )


def unchecked(op: Any) -> Callable[..., Any]:
    """The kernel alone, where its reference is not a check of it."""
    kernel: Callable[..., Any] = op.kernel
    return kernel


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype) * scale


def set_count(moved_bytes: float) -> int:
    return max(1, min(32, int(CACHE_BYTES / moved_bytes)))


def rowwise_cases() -> Iterator[Case]:
    for n in (1, 4, 64, 256, 8192):
        size = n * HIDDEN * 2
        w = randn(HIDDEN, scale=0.1)
        yield Case(
            f"add_gemma_rmsnorm n={n}",
            add_gemma_rmsnorm,
            [(randn(n, HIDDEN), randn(n, HIDDEN), w, 1e-6) for _ in range(set_count(4 * size))],
            4 * size + HIDDEN * 2,
        )
    for n in (1, 64, 256):
        size = n * HIDDEN * 2
        w3, w = randn(3, HIDDEN), randn(HIDDEN)
        aux = [(randn(3, n, HIDDEN).transpose(0, 1), w3, 1e-6) for _ in range(8)]
        yield Case(f"group_rmsnorm n={n}", group_rmsnorm, aux, 6 * size)
        table, ids = randn(4096, HIDDEN), torch.randint(4096, (8, n), device=DEVICE)
        both = [(i, table, randn(n, HIDDEN), w, w, 1e-6) for i in ids]
        yield Case(f"embed_dual_rmsnorm n={n}", embed_dual_rmsnorm, both, 4 * size)
        wide = [(randn(n, 2 * DRAFT_WIDTH),) for _ in range(8)]
        yield Case(f"swiglu n={n}", swiglu, wide, n * DRAFT_WIDTH * 6)
        count = set_count(n * VOCAB * 4)
        logits = [(randn(n, VOCAB, dtype=torch.float32),) for _ in range(count)]
        yield Case(f"vocab_argmax n={n}", vocab_argmax, logits, n * VOCAB * 4, tolerance=0)
        seed, at = (torch.arange(n, device=DEVICE) for _ in range(2))
        drawn = [(x, seed, at, 0) for (x,) in logits]
        # Ids are equal; the noise in the value is off by the device's logarithm.
        yield Case(f"gumbel_argmax n={n}", gumbel_argmax, drawn, n * VOCAB * 4, tolerance=1e-14)
    for n in (1, 4, 64, 256, 8192):
        yield _store_case(n)
    table = torch.randint(0, 64, (64, 64), dtype=torch.int32, device=DEVICE)
    length = torch.randint(1, 8000, (64,), device=DEVICE)
    drafts, k = torch.randint(0, 9, (64, 3), device=DEVICE), torch.full((64,), 3, device=DEVICE)
    slots = torch.randperm(64, device=DEVICE)
    by_slot = BySlot(length, length, drafts, table)
    inputs = [(slots, k, by_slot, table.clone(), PAGE, 4)]
    yield Case("verify_inputs b=64", verify_inputs, inputs, 64 * 200, tolerance=0)
    yield Case("draft_inputs b=64", draft_inputs, [(length, 1, k, table, PAGE)], 64 * 60, 0, 0)
    emitted = torch.randint(0, 9, (64, 4), device=DEVICE)
    filled = [(emitted, length, table, PAGE)]
    yield Case("accepted_inputs b=64", accepted_inputs, filled, 64 * 140, tolerance=0)
    start = Newest(length.clone(), length.clone(), randn(64, HIDDEN))
    newest = [(slots, k, k, by_slot, randn(4 * 64, HIDDEN), start) for _ in range(8)]
    yield Case("newest_inputs b=64", newest_inputs, newest, 64 * 4 * HIDDEN, tolerance=0)
    matches = torch.rand(64, 3, device=DEVICE) < 0.7
    targets = torch.randint(0, 9, (64, 4), device=DEVICE)
    judged = [(targets, targets.double(), matches, k)]
    yield Case("accept b=64", accept, judged, 64 * 112, tolerance=0)


def _store_case(n: int) -> Case:
    columns = (HEADS + 2 * GROUPS) * DIM + (GROUPS + 1) * DIM
    blocks = max(64, -(-n // PAGE))
    k, v = torch.zeros(2, blocks, PAGE, GROUPS, DIM, dtype=BF16, device=DEVICE)
    index_k = torch.zeros(blocks, PAGE, DIM, dtype=BF16, device=DEVICE)
    table = randn(8192, 64, dtype=torch.float32)
    q, k_norm, index_q, index_k_norm = (randn(DIM, scale=0.1) for _ in range(4))
    norms = HeadNorms(q, k_norm, 1e-6, index_q, index_k_norm)
    inputs = [
        (
            randn(n, columns),
            Rows(
                positions=torch.randint(0, 8192, (n,), device=DEVICE),
                kv_slots=torch.randperm(blocks * PAGE, device=DEVICE)[:n],
                # A store looks at no other key.
                block_tables=torch.zeros(n, 1, dtype=torch.int32, device=DEVICE),
                seq_lens=torch.zeros(n, dtype=torch.int32, device=DEVICE),
                max_seq_len=0,
            ),
            norms,
            table,
            LayerKV(k, v, index_k),
        )
        for _ in range(2 if n > 1000 else 8)
    ]
    return Case(f"kv_index_store n={n}", kv_store, inputs, n * columns * 4)


def paged(batch: int, rows: int, length: int, groups: int, sets: int) -> tuple[list[Rows], Tensor]:
    """The last ``rows`` places of sequences of ``length``, in ``sets`` batches that share no block,
    and how many blocks that takes. They write nothing."""
    per_seq = -(-length // PAGE)
    order = torch.randperm(sets * batch * per_seq, device=DEVICE, dtype=torch.int32)
    tables = order.view(sets, batch, per_seq)
    last = torch.arange(length - rows, length, device=DEVICE).repeat(batch)
    nowhere = torch.full_like(last, -1)
    lens = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    return [Rows(last, nowhere, table, lens, length) for table in tables], order


def new_layer(num_blocks: int, groups: int) -> LayerKV:
    """Random keys and values, and index keys."""
    k, v = (randn(num_blocks, PAGE, groups, DIM) for _ in range(2))
    return LayerKV(k, v, randn(num_blocks, PAGE, DIM))


def decode_attention_cases() -> Iterator[Case]:
    for batch, rows, length, groups in (
        (1, 1, 1280, GROUPS),
        (1, 4, 1280, GROUPS),
        (64, 1, 1280, GROUPS),
        (64, 4, 1280, GROUPS),
        (64, 8, 1280, GROUPS),
        (1, 1, 131072, GROUPS),
        (8, 4, 32768, GROUPS),
        (1, 1, 1280, HEADS),
        (64, 1, 1280, HEADS),
    ):
        kv_bytes = batch * length * groups * DIM * 4
        sets = max(1, min(16, CACHE_BYTES // kv_bytes))
        wheres, order = paged(batch, rows, length, groups, sets)
        kv = LayerKV(*(randn(len(order), PAGE, groups, DIM) for _ in range(2)))
        n = batch * rows
        inputs = [(randn(n, HEADS, DIM), kv, where, DIM**-0.5) for where in wheres]
        yield Case(
            f"attention_dense b={batch} q={rows} len={length} groups={groups}",
            attention_dense,
            inputs,
            kv_bytes + n * HEADS * DIM * 4,
            4.0 * n * HEADS * DIM * length,
        )
    for batch, rows, length in (
        (1, 1, 8192),
        (1, 4, 8192),
        (32, 4, 8192),
        (64, 1, 4096),
        (1, 1, 131072),
        (8, 4, 131072),
    ):
        yield from _sparse_cases(batch, rows, length)


def _sparse_cases(batch: int, rows: int, length: int) -> Iterator[Case]:
    n, index_bytes = batch * rows, batch * length * DIM * 2
    sets = max(1, min(16, CACHE_BYTES // index_bytes))
    wheres, order = paged(batch, rows, length, GROUPS, sets)
    kv = new_layer(len(order), GROUPS)
    index_q = [randn(n, GROUPS, DIM) for _ in wheres]
    scored: list[tuple[Any, ...]] = [(q, kv, w) for q, w in zip(index_q, wheres, strict=True)]
    name = f"b={batch} q={rows} len={length}"
    flops = 2.0 * n * GROUPS * DIM * length
    yield Case(f"block_scores {name}", block_scores, scored, index_bytes, flops, 1e-5)
    # Scores closer than their error fall either way: the order is checked on given scores, and
    # the two kernels together are only timed.
    given = [(block_scores.kernel(*s), s[2].positions, PAGE, TOPK, 0, 1) for s in scored]
    yield Case(f"topk_blocks {name}", topk_blocks, given, n * GROUPS * length / PAGE * 4, 0, 0)
    del given
    wished = [(*s, TOPK, 0, 1) for s in scored]
    yield Case(f"index_topk {name}", unchecked(index_topk), wished, index_bytes, flops)
    ids = [index_topk.kernel(*w) for w in wished]
    distinct = sum(
        len(set(ids[0].view(batch, rows, GROUPS, TOPK)[b, :, g].flatten().tolist()))
        for b in range(batch)
        for g in range(GROUPS)
    )
    inputs = [
        (randn(n, HEADS, DIM), kv, chosen, w, DIM**-0.5)
        for chosen, w in zip(ids, wheres, strict=True)
    ]
    yield Case(
        f"attention_sparse {name}",
        attention_sparse,
        inputs,
        distinct * PAGE * DIM * 4 + n * HEADS * DIM * 4,
        4.0 * n * HEADS * DIM * TOPK * PAGE,
    )


def prefill_cases() -> Iterator[Case]:
    for batch, length in ((1, 8192), (8, 1024)):
        wheres, order = paged(batch, length, length, GROUPS, 1)
        n = batch * length
        sums = torch.arange(0, n + 1, length, dtype=torch.int32, device=DEVICE)
        rows = wheres[0]._replace(cu_seqlens=sums, q_lens=(length,) * batch)
        kv = new_layer(len(order), GROUPS)
        q = randn(n, HEADS, DIM)
        name = f"b={batch} len={length}"
        pairs = n * (length + 1) / 2
        moved = n * DIM * (HEADS * 4 + GROUPS * 4)
        yield Case(
            f"attention_dense_ragged {name}",
            attention_dense,
            [(q, kv, rows, DIM**-0.5)],
            moved,
            4.0 * pairs * HEADS * DIM,
        )
        if length <= TOPK * PAGE:
            continue
        index_q = randn(n, GROUPS, DIM)
        args = (index_q, kv, rows, TOPK, 0, 1)
        yield Case(
            f"index_topk_ragged {name}",
            unchecked(index_topk),
            [args],
            n * GROUPS * (DIM * 2 + length / PAGE * 8),
            2.0 * pairs * GROUPS * DIM,
        )
        # Rows that share no choice, and rows that choose much as their neighbours do.
        alike = index_q[::16].repeat_interleave(16, dim=0) + 0.2 * randn(n, GROUPS, DIM)
        for kind, wish in (("", index_q), (" alike", alike)):
            ids = index_topk.kernel(wish, *args[1:])
            seen = float((ids >= 0).sum()) * PAGE / GROUPS
            yield Case(
                f"attention_sparse_ragged {name}{kind}",
                attention_sparse,
                [(q, kv, ids, rows, DIM**-0.5)],
                moved,
                4.0 * seen * HEADS * DIM,
            )


def moe_cases() -> Iterator[Case]:
    gate, bias = randn(EXPERTS, HIDDEN, scale=0.02, dtype=torch.float32), torch.randn(EXPERTS)
    bias = bias.to(DEVICE) * 0.01
    w13 = torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, dtype=BF16, device=DEVICE)
    w2 = torch.empty(EXPERTS, HIDDEN, WIDTH, dtype=BF16, device=DEVICE)
    for e in range(EXPERTS):
        w13[e] = randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
        w2[e] = randn(HIDDEN, WIDTH, scale=WIDTH**-0.5)
    shared_up = randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
    shared_down = randn(HIDDEN, WIDTH, scale=WIDTH**-0.5)
    expert_bytes = 3 * WIDTH * HIDDEN * 2
    # As uneven as a router of random weights makes it: 64 rows visit 76 experts, 256 visit 106.
    favour = 0.6 * torch.randn(EXPERTS, device=DEVICE)
    for n in (1, 4, 16, 64, 128, 256, 512, 2048, 8192):
        positions = torch.arange(n, device=DEVICE)
        routed = [(randn(n, HIDDEN), gate, bias, positions, 4, 2.0) for _ in range(4)]
        routing = EXPERTS * HIDDEN * 4 + n * HIDDEN * 2
        # Among many rows two scores are closer than their error, and fall either way.
        route = moe_route if n <= 2048 else unchecked(moe_route)
        yield Case(f"moe_route n={n}", route, routed, routing, tolerance=1e-5)
        weights = torch.rand(n, 4, device=DEVICE)
        for name, lean in (("", torch.zeros_like(favour)), ("uneven ", favour)):
            order = (torch.randn(n, EXPERTS, device=DEVICE) + lean).argsort(dim=1, descending=True)
            ids = order[:, :4].int().contiguous()
            distinct = len(ids.unique())
            layer = (randn(n, HIDDEN), Routing(ids, weights), Experts(w13, w2), 1.702, 7.0, 1.0)
            flops = 2.0 * n * 4 * 3 * WIDTH * HIDDEN
            moved = distinct * expert_bytes + n * HIDDEN * 2 * 3
            if not name or 64 <= n <= 512:
                name = f"moe_gemm n={n} {name}experts={distinct}"
                yield Case(name, moe_gemm, [layer], moved, flops)
        if n <= 512:
            # With the shared expert: what a layer of the model runs.
            yield Case(
                f"moe_gemm n={n} experts={distinct} and shared",
                moe_gemm,
                [(*layer[:2], Experts(w13, w2, shared_up, shared_down), *layer[3:])],
                moved + expert_bytes,
                flops * 1.25,
            )


def linear_cases() -> Iterator[Case]:
    """The products of a decode step, by the kernel and by torch."""
    for name, out, width in (
        ("qkv+index", 9856, HIDDEN),
        ("o_proj", HIDDEN, HEADS * DIM),
        ("shared gate_up", 2 * WIDTH, HIDDEN),
        ("shared down", HIDDEN, WIDTH),
        ("dense gate_up", 24576, HIDDEN),
        ("draft fc", HIDDEN, 3 * HIDDEN),
        ("MHA draft kv", 2 * HEADS * DIM, 2 * HIDDEN),
        ("head", VOCAB, HIDDEN),
    ):
        count = max(2, min(8, CACHE_BYTES // (out * width * 2)))
        weights = [randn(out, width, scale=0.02) for _ in range(count)]
        for n in (1, 4, 16, 32, 64, 256):
            x = randn(n, width)
            inputs = [(x, w) for w in weights]
            moved = out * width * 2 + n * (out + width) * 2
            flops = 2.0 * n * out * width
            if n <= MAX_ROWS:
                yield Case(f"linear {name} n={n}", linear, inputs, moved, flops)
            yield Case(f"torch linear {name} n={n}", F.linear, inputs, moved, flops)
    for n in (1, 4, 16, 64):
        yield _fill_case(n)


def _fill_case(n: int) -> Case:
    """K and V of n rows of the draft with GQA. Caches of zeros: the rows alone can differ."""
    columns, width = 2 * GROUPS * DIM, 2 * HIDDEN
    k, v = torch.zeros(2, 64, PAGE, GROUPS, DIM, dtype=BF16, device=DEVICE)
    table = randn(8192, DIM, dtype=torch.float32)
    inputs = [
        (
            randn(n, width),
            randn(columns, width, scale=0.01),
            None,
            torch.randint(0, 8192, (n,), device=DEVICE),
            torch.randperm(64 * PAGE, device=DEVICE)[:n],
            table,
            LayerKV(k, v),
        )
        for _ in range(set_count(columns * width * 2))
    ]
    moved = columns * width * 2 + n * (columns + width) * 2
    return Case(f"draft_kv_fill n={n}", draft_kv_fill, inputs, moved, 2.0 * n * columns * width)


FAMILIES = (rowwise_cases, decode_attention_cases, prefill_cases, moe_cases, linear_cases)


COLUMNS: Columns[Row] = {
    "kernel": lambda r, _: r.name,
    "us": lambda r, _: number(r.us, 1),
    "copy of as many bytes, us": lambda r, _: number(r.copy_us, 1) if r.copy_us else "-",
    "of 1.5 copies + 2 us": lambda r, _: percent(
        r.us / (1.5 * r.copy_us + 2) if r.copy_us else None
    ),
    "GB/s": lambda r, _: number(r.gb_per_s, 0),
    "of the copy's peak": lambda r, _: percent(r.bandwidth_share),
    "TFLOP/s": lambda r, _: number(r.tflop_per_s, 1),
    "of the product's": lambda r, _: percent(r.flop_share),
    "error": lambda r, _: f"{r.error:.1e}",
}


def run(only: str, out: Path | None) -> None:
    """Every case whose name holds ``only``.

    Raises  ConfigError without a GPU, EngineError when a kernel is not its reference's equal; the
            others are measured before that.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench kernels: torch finds no GPU here, and kernels run on one alone")
    torch.manual_seed(0)
    bandwidth, rate = peaks()
    say(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    peak = f"# copy {bandwidth:.4g} byte/s, bf16 product {rate:.4g} FLOP/s"
    table = Table("kernels", COLUMNS, out, peak)
    wrong = []
    for family in FAMILIES:
        for case in family():
            if only not in case.name:
                continue
            try:
                table.add(measure(case, bandwidth, rate))
            except AssertionError as error:
                say(f"RED {error}")
                wrong.append(str(error))
            del case
        torch.cuda.empty_cache()
    print(table.to_text())
    if wrong:
        raise EngineError(f"{len(wrong)} kernels differ from their references: {'; '.join(wrong)}")
