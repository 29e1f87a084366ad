"""What a profile says, on made-up traces of which one knows."""

from pathlib import Path

import pytest

from eaglerun import kernels
from eaglerun.bench.prefill import chunk_rows
from eaglerun.bench.profile import kernel_rows
from eaglerun.bench.trace import GROUPS, Activity, group_of, parse, summarize

LIBRARY = "nvjet_tst_128x64_64x8_1x2_h_bz_coopA_TNT"


def step(number: int, ts: float, dur: float) -> dict:
    return {
        "ph": "X",
        "cat": "user_annotation",
        "name": f"bench step {number}",
        "ts": ts,
        "dur": dur,
        "tid": 1,
    }


def launch(correlation: int, ts: float, name: str = "cuLaunchKernelEx") -> dict:
    cat = "cuda_driver" if name.startswith("cuL") else "cuda_runtime"
    args = {"correlation": correlation}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 1.0, "tid": 1, "args": args}


def ran(name: str, correlation: int, ts: float, dur: float, cat: str = "kernel") -> dict:
    args = {"correlation": correlation, "stream": 7}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 7, "args": args}


# Two steps; the device runs behind the host, so that all of step 1 runs after its annotation ends.
# The graph of step 1 launches two kernels by one call. 100 to 200 us, of which 30 are idle.
EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    step(0, 10, 20),
    step(1, 40, 20),
    launch(1, 12),
    launch(2, 15),
    launch(3, 16, "cudaMemcpyAsync"),
    launch(4, 45, "cudaGraphLaunch"),
    launch(9, 80),
    ran("_attention_sparse_kernel", 1, 100, 20),
    ran("merge_kernel", 2, 120, 10),
    ran("Memcpy DtoH (Device -> Pinned)", 3, 130, 10, "gpu_memcpy"),
    ran("_block_scores_kernel", 4, 160, 20),
    ran(LIBRARY, 4, 190, 10),
    ran("_attention_kernel", 9, 500, 10),
]


def test_kernels_belong_to_the_step_that_launched_them():
    found = parse(reversed(EVENTS))
    assert [a.step for a in found] == [0, 0, 0, 1, 1, None]
    assert [a.is_kernel for a in found] == [True, True, False, True, True, True]
    assert found[0] == Activity("_attention_sparse_kernel", 100, 120, 0)


def test_idle_time_is_what_no_activity_covers():
    found = summarize(parse(EVENTS), 2)
    assert found.num_steps == 2
    assert found.step_ms == pytest.approx(0.05)
    assert found.idle == pytest.approx(0.3)
    assert found.no_kernel == pytest.approx(0.4)
    assert found.between_steps == pytest.approx(0.2)


def test_kernels_by_group_and_by_name():
    found = summarize(parse(EVENTS), 2)
    groups = {share.name: (share.ms, share.count) for share in found.groups}
    # The merge counts as the attention before it.
    assert groups == {
        "sparse attention": (pytest.approx(0.015), 1.0),
        "index scan": (pytest.approx(0.01), 0.5),
        "linear": (pytest.approx(0.005), 0.5),
    }
    assert found.group_ms("index scan") == pytest.approx(0.01)
    assert found.group_ms("MoE") == 0.0
    rows = kernel_rows(1, 3, found, {"index scan": 1e6, "MoE": 5.0})
    scan = next(row for row in rows if row.name == "index scan")
    assert scan.is_group and (scan.mb, scan.gb_per_s) == (1.0, pytest.approx(100.0))
    assert scan.share == pytest.approx(0.2)
    assert [row.name for row in rows if not row.is_group][0] == "_attention_sparse_kernel"


def test_overlapping_kernels_are_busy_once():
    found = summarize(
        [
            Activity("a", 0, 50, 0),
            Activity("b", 10, 20, 0),
            Activity("c", 40, 60, 0),
            Activity("d", 80, 100, 0),
        ],
        1,
    )
    assert found.idle == pytest.approx(0.2)
    assert found.between_steps == 0.0
    # What began early waited: its time counts from the end of those before it.
    assert {share.name: share.ms * 1e3 for share in found.top} == pytest.approx(
        {"a": 50, "b": 0, "c": 10, "d": 20}
    )


def test_without_steps_a_profile_counts_as_a_whole():
    found = summarize([Activity("a", 0, 50, None), Activity("b", 75, 100, None)], 4)
    assert (found.num_steps, found.step_ms, found.between_steps) == (4, 0.025, None)
    assert found.idle == pytest.approx(0.25)
    with pytest.raises(ValueError, match="a profile of 1 activities has no kernel"):
        summarize([Activity("a", 0, 50, 0, is_kernel=False)], 1)


def test_on_a_cpu_the_outermost_operators_stand_for_kernels():
    def op(name: str, ts: float, dur: float, tid: int = 1) -> dict:
        return {"ph": "X", "cat": "cpu_op", "name": name, "ts": ts, "dur": dur, "tid": tid}

    found = parse(
        [
            step(0, 0, 100),
            op("aten::linear", 10, 30),
            op("aten::addmm", 12, 20),
            op("aten::add", 40, 10),
            op("aten::mul", 15, 10, tid=2),
        ]
    )
    assert [(a.name, a.step) for a in found] == [
        ("aten::linear", 0),
        ("aten::mul", 0),
        ("aten::add", 0),
    ]


def test_every_module_of_a_group_exists_and_its_kernels_are_known():
    names = {file.stem for file in Path(next(iter(kernels.__path__))).glob("*.py")}
    for prefix in GROUPS:
        assert any(name.startswith(prefix) for name in names), prefix
    assert group_of("_attention_kernel") == "dense attention"
    assert group_of("_attention_sparse_kernel") == "sparse attention"
    assert group_of("_block_scores_kernel") == group_of("_topk_blocks_kernel") == "index scan"
    assert group_of("_up_kernel") == group_of("_choose_kernel") == "MoE"
    assert group_of("_linear_kernel") == group_of(LIBRARY) == "linear"
    assert group_of("_rmsnorm_kernel") == "norms"
    assert group_of("merge_kernel", "sparse attention") == "sparse attention"
    assert group_of("void at::native::vectorized_elementwise_kernel<4>") == "other"


def test_chunks_of_a_prefill_by_the_token():
    activities = [
        Activity("_attention_kernel", 0, 100, 0),
        Activity("_attention_kernel", 100, 400, 1),
        Activity("_block_scores_kernel", 400, 410, 1),
        Activity("copy", 410, 420, 1, is_kernel=False),
        Activity("_attention_sparse_kernel", 420, 440, 1),
        Activity("_rmsnorm_kernel", 440, 450, 1),
    ]
    first, last = chunk_rows(activities, length=150, size=100)
    assert (first.start, first.end, first.dense_us, first.total_us) == (0, 100, 1.0, 1.0)
    assert (last.start, last.end, last.dense_us) == (100, 150, 6.0)
    assert (last.scan_us, last.sparse_us, last.other_us) == (0.2, 0.4, 0.2)
    assert last.total_us == pytest.approx(6.8)
