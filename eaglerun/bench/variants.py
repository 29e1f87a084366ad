"""python -m eaglerun.bench.variants: launch settings side by side, for choosing those of the table.

Each variant is checked like the case it is of (bench/kernels.py) and timed the same way. A layer
of a decode step, kernel after kernel as the model runs them, shows what overlapping is worth: its
output must be the same, bit for bit, in every variant of it.

Flags  --only TEXT  groups whose name holds TEXT
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.bench.kernels import (
    BF16,
    DEVICE,
    DIM,
    EXPERTS,
    GROUPS,
    HEADS,
    HIDDEN,
    PAGE,
    WIDTH,
    Case,
    decode_attention_cases,
    linear_cases,
    measure,
    moe_cases,
    new_layer,
    paged,
    peaks,
    prefill_cases,
    randn,
    timed_us,
)
from eaglerun.kernels.attention_dense import attention_dense
from eaglerun.kernels.kv_store import kv_store
from eaglerun.kernels.language import LAUNCH_ERRORS
from eaglerun.kernels.launch import changed, overlapping
from eaglerun.kernels.linear import linear
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rmsnorm import add_gemma_rmsnorm
from eaglerun.kernels.rows import Experts, HeadNorms

Changes = dict[str, dict[str, int]]
WRONG: tuple[type[Exception], ...] = (AssertionError, RuntimeError, *LAUNCH_ERRORS)


@dataclass(frozen=True, slots=True)
class Group:
    """Cases of a family whose name begins with ``cases``, each under every variant."""

    cases: tuple[str, ...]
    family: Callable[[], Iterator[Case]]
    variants: dict[str, Changes]


def _both(**values: int) -> Changes:
    return {"moe_up_many": values, "moe_down_many": {k: v for k, v in values.items() if k in _DOWN}}


_DOWN = ("BLOCK_K", "DESCRIBED", "GROUP", "num_stages", "num_warps")

# The table's own settings come first everywhere.
GROUPS_OF_CASES = (
    Group(
        ("moe_gemm n=128 uneven", "moe_gemm n=256 experts", "moe_gemm n=256 uneven"),
        moe_cases,
        {
            "table": {},
            "16 rows a tile": {
                "moe_up_several": {"BLOCK_T": 16, "EXTRA": 0, "BLOCK_K": 128, "num_stages": 3},
                "moe_down_several": {"BLOCK_K": 128, "num_stages": 3},
            },
            "16 + 16": {"moe_up_several": {"BLOCK_T": 16, "EXTRA": 16}},
            "64 + 32": {"moe_up_several": {"BLOCK_T": 64, "EXTRA": 32, "num_stages": 3}},
            "group 1": {"moe_up_several": {"GROUP": 1}, "moe_down_several": {"GROUP": 1}},
            "3 stages": {
                "moe_up_several": {"num_stages": 3}, "moe_down_several": {"num_stages": 3},
            },
        },
    ),
    Group(
        ("moe_gemm n=1 ", "moe_gemm n=4 ", "moe_gemm n=16 "),
        moe_cases,
        {
            "table": {},
            "shared as a layer": {"moe_up_few": {"SHARED_TILE": 0}},
            "k 64, 5 stages": {
                "moe_up_few": {"BLOCK_K": 64, "num_stages": 5},
                "moe_down_few": {"BLOCK_K": 64, "num_stages": 5},
            },
            "down 64 wide": {"moe_down_few": {"BLOCK_N": 64, "num_stages": 4}},
        },
    ),
    Group(
        tuple(f"linear {name} n=" for name in ("o_proj", "shared gate_up", "draft fc")),
        linear_cases,
        {"table": {}} | {f"{n} stages": {"linear_narrow": {"num_stages": n}} for n in (4, 5, 7)},
    ),
    Group(
        tuple(
            f"linear {name} n={rows}"
            for name in ("qkv+index", "dense gate_up", "head")
            for rows in (1, 32)
        ),
        linear_cases,
        {
            "table": {},
            "5 stages": {"linear_few": {"num_stages": 5}},
            "k 64, 7 stages": {"linear_few": {"BLOCK_K": 64, "num_stages": 7}},
            "128 wide, k 64": {"linear_few": {"BLOCK_N": 128, "BLOCK_K": 64}},
        },
    ),
    Group(
        tuple(f"linear {name} n=64" for name in ("qkv+index", "dense gate_up", "head")),
        linear_cases,
        {"table": {}}
        | {
            label: {"linear_several": values, "linear_broad": values}
            for label, values in {
                "k 128, 4 stages": {"BLOCK_N": 64, "BLOCK_K": 128, "num_stages": 4},
                "k 64, 6 stages": {"BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 6},
                "k 64, 7 stages": {"BLOCK_N": 64, "BLOCK_K": 64, "num_stages": 7},
                "128 wide, 4 stages": {"BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 4},
                "128 wide, 5 stages": {"BLOCK_N": 128, "BLOCK_K": 64, "num_stages": 5},
            }.items()
        },
    ),
    Group(
        ("draft_kv_fill n=1", "draft_kv_fill n=64"),
        linear_cases,
        {
            "table": {},
            "64 programs": {"linear_parts": {"PROGRAMS": 64}},
            "256 programs": {"linear_parts": {"PROGRAMS": 256}},
        },
    ),
    Group(
        ("moe_route n=",),
        moe_cases,
        {
            "table": {},
            "as of more rows": {
                "route_logits_some": {
                    "SPLITS": 8, "BLOCK_T": 128, "BLOCK_E": 64, "BLOCK_K": 64,
                    "num_warps": 8, "num_stages": 3,
                },
            },
            "32 rows a tile": {"route_logits_many": {"BLOCK_T": 32, "num_warps": 4}},
        },
    ),
    Group(
        (
            "attention_dense b=1 q=1",
            "attention_dense b=1 q=4",
            "attention_dense b=64 q=1",
            "attention_dense b=64 q=4",
            "attention_dense b=64 q=8",
            "attention_dense b=8 q=",
            "attention_sparse b=",
        ),
        decode_attention_cases,
        {"table": {}}
        | {
            f"tiles of {keys} keys, {stages} stages": {
                name: {"BLOCK_N": keys, "num_stages": stages}
                for name in (
                    "attention_decode", "attention_verify", "attention_verify_wide",
                    "attention_sparse_decode",
                )
            }
            for keys, stages in ((32, 3), (32, 4), (64, 1), (64, 2), (64, 3), (128, 1), (128, 2))
        },
    ),
    Group(
        ("moe_gemm n=8192",),
        moe_cases,
        {
            "table": {},
            "group 2": _both(GROUP=2),
            "group 8": _both(GROUP=8),
            "3 stages": _both(num_stages=3),
            "weights by address": _both(DESCRIBED=0),
            "no extra": {"moe_up_many": {"EXTRA": 0}},
            "down 128 wide": {"moe_down_many": {"BLOCK_N": 128, "num_stages": 4}},
            "down 4 stages": {"moe_down_many": {"num_stages": 4}},
        },
    ),
    Group(
        ("attention_dense_ragged",),
        prefill_cases,
        {"table": {}, "keys by address": {"attention_prefill": {"DESCRIBED": 0}}}
        | {
            f"{rows} x {keys}, {warps} warps, {stages} stages, {registers} registers": {
                "attention_prefill": {
                    "BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages,
                    "maxnreg": registers,
                },
            }
            for rows, keys, warps, stages, registers in (
                (64, 64, 4, 3, 255), (128, 64, 4, 3, 255), (128, 64, 8, 2, 255),
                (128, 64, 8, 3, 128), (128, 128, 8, 2, 255),
            )
        },
    ),
    Group(
        ("index_topk_ragged",),
        prefill_cases,
        {"table": {}}
        | {
            f"{pages} blocks, {warps} warps": {
                "index_scores_prefill": {"PAGES": pages, "num_warps": warps, "maxnreg": registers},
            }
            for pages, warps, registers in ((4, 4, 255), (16, 4, 255), (4, 8, 128), (8, 8, 128))
        },
    ),
    Group(
        ("attention_sparse_ragged",),
        prefill_cases,
        {
            "table": {},
            "keys by address": {"attention_sparse_prefill": {"DESCRIBED": 0}},
            "64 keys": {"attention_sparse_prefill": {"BLOCK_N": 64}},
            "3 stages": {"attention_sparse_prefill": {"num_stages": 3}},
            "shared, 64 x 64": {"attention_sparse_prefill": {"SHARE": 1}},
            "shared, 64 x 128": {
                "attention_sparse_prefill": {"SHARE": 1},
                "attention_sparse_union": {"BLOCK_N": 128, "num_stages": 2},
            },
            "shared, 128 x 64": {
                "attention_sparse_prefill": {"SHARE": 1},
                "attention_sparse_union": {"BLOCK_M": 128, "num_warps": 8},
            },
            "shared, 128 x 128": {
                "attention_sparse_prefill": {"SHARE": 1},
                "attention_sparse_union": {
                    "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2,
                },
            },
        },
    ),
)  # fmt: skip


def layer_of(rows: int, count: int) -> Callable[[int], Tensor]:
    """``rows`` sequences of 1280 tokens through ``count`` sparse layers, one after another: every
    kernel of a plain decode step's layer, dense attention as below 2048 tokens."""
    (where,), order = paged(rows, 1, 1280, GROUPS, 1)
    kv = new_layer(len(order), GROUPS)
    slots = where.block_tables.long()[:, -1] * PAGE + PAGE - 1
    where = where._replace(kv_slots=slots, max_seq_len=2048)
    rope = randn(2048, 64, dtype=torch.float32)
    norm, own = randn(HIDDEN, scale=0.1), randn(DIM, scale=0.1)
    norms = HeadNorms(own, own, 1e-6, own, own)
    columns = (HEADS + 2 * GROUPS) * DIM + (GROUPS + 1) * DIM
    qkv = [randn(columns, HIDDEN, scale=0.02) for _ in range(count)]
    o_proj = [randn(HIDDEN, HEADS * DIM, scale=0.02) for _ in range(count)]
    gates = [randn(EXPERTS, HIDDEN, scale=0.02, dtype=torch.float32) for _ in range(count)]
    w13 = torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, dtype=BF16, device=DEVICE)
    w2 = torch.empty(EXPERTS, HIDDEN, WIDTH, dtype=BF16, device=DEVICE)
    for e in range(EXPERTS):
        w13[e] = randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5)
        w2[e] = randn(HIDDEN, WIDTH, scale=WIDTH**-0.5)
    shared = [
        (randn(2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5), randn(HIDDEN, WIDTH, scale=WIDTH**-0.5))
        for _ in range(count)
    ]
    x, stream = randn(rows, HIDDEN), randn(rows, HIDDEN)

    def run(i: int) -> Tensor:
        i %= count
        y, residual = add_gemma_rmsnorm.kernel(x, stream, norm, 1e-6)
        y = linear.kernel(y, qkv[i])
        q, _ = kv_store.kernel(y, where, norms, rope, kv)
        seen = attention_dense.kernel(q, kv, where, DIM**-0.5)
        y = linear.kernel(seen.flatten(1), o_proj[i])
        y, residual = add_gemma_rmsnorm.kernel(y, residual, norm, 1e-6)
        routing = moe_route.kernel(y, gates[i], None, where.positions, 4, 2.0)
        return moe_gemm.kernel(y, routing, Experts(w13, w2, *shared[i]), 1.702, 7.0, 1.0)

    return run


def chains(only: str) -> int:
    """The layer with and without overlapping; how many variants gave other bits."""
    variants: dict[str, tuple[bool, Changes]] = {
        "one after another": (False, {}),
        "overlapping": (True, {}),
        "shared as a layer": (True, {"moe_up_few": {"SHARED_TILE": 0}}),
    }
    wrong = 0
    for rows in (1, 4):
        name = f"layer n={rows}"
        if only not in name:
            continue
        run = layer_of(rows, 6)
        expected = [run(i) for i in range(6)]
        for label, (overlap, changes) in variants.items():
            with overlapping(overlap), _changed(changes):
                same = all(torch.equal(run(i), expected[i]) for i in range(6))
                us = timed_us(run, 12)
            print(
                f"{name:40} {label:32} {us:9.1f} us {'' if same else 'RED other bits'}", flush=True
            )
            wrong += not same
        del run, expected
        torch.cuda.empty_cache()
    return wrong


@contextlib.contextmanager
def _changed(changes: Changes) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, values in changes.items():
            stack.enter_context(changed(name, **values))
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    torch.manual_seed(0)
    bandwidth, rate = peaks()
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s", flush=True)
    wrong = chains(only)
    for family in (moe_cases, linear_cases, decode_attention_cases, prefill_cases):
        wanted = [g for g in GROUPS_OF_CASES if g.family is family]
        if not any(only in name for g in wanted for name in g.cases):
            continue
        for case in family():
            for group in wanted:
                if any(case.name.startswith(name) and only in name for name in group.cases):
                    wrong += _compare(case, group, bandwidth, rate)
            del case
        torch.cuda.empty_cache()
    return wrong


def _compare(case: Case, group: Group, bandwidth: float, rate: float) -> int:
    wrong = 0
    for label, changes in group.variants.items():
        with _changed(changes):
            try:
                row = measure(case, bandwidth, rate)
            except WRONG as error:
                # A tile that does not fit this device is an answer too.
                print(f"{case.name:40} {label:32} RED {str(error)[:120]}", flush=True)
                wrong += 1
                continue
        print(
            f"{case.name:40} {label:32} {row.us:9.1f} us {row.gb_per_s:6.0f} GB/s "
            f"{row.tflop_per_s:6.1f} TFLOP/s",
            flush=True,
        )
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
