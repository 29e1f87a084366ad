"""The benchmark on a real GPU: replayed graphs are taken apart into kernels, steps and groups, and
a fresh server tells what it compiles and captures."""

import json
from pathlib import Path

import pytest

from eaglerun.server import cli

pytestmark = pytest.mark.gpu

SETTINGS = (
    "--max-num-seqs=4",
    "--max-num-batched-tokens=256",
    "--num-kv-blocks=800",
    "--scripted=tokens",
    "--input-len=100",  # past the keys that are all selected, so that every step is alike
    "--output-len=24",
    "--num-steps=6",
    "--concurrency=1",
    "--concurrency=4",
    "--log-stats-every=0",
)


def bench(tmp_path: Path, parts: str, *more: str) -> dict[str, list[dict]]:
    """Rows of the demo pair by table."""
    assert cli.main(["bench", parts, *SETTINGS, *more, f"--out={tmp_path}"]) == 0
    return {file.stem: json.loads(file.read_text())["rows"] for file in tmp_path.glob("*.json")}


def test_replayed_kernels_have_their_steps_and_groups(tmp_path: Path):
    found = bench(tmp_path, "latency,profile", "--bandwidth-gb-s=4000")
    assert len(found["latency"]) == len(found["profile"]) == 4
    for row in found["profile"]:
        assert row["num_steps"] == 6 and row["between_steps"] is not None
        assert 0 <= row["between_steps"] <= row["no_kernel"] < 1
    for conc in (1, 4):
        for k in (0, 3):
            rows = [
                r
                for r in found["profile_kernels"]
                if (r["concurrency"], r["num_draft_tokens"]) == (conc, k) and r["is_group"]
            ]
            ms = {r["name"]: r["ms"] for r in rows}
            assert {"linear", "MoE", "norms", "dense attention", "other"} <= ms.keys()
            # Now and then a step has a new block's number to note, which is among the others.
            odd = [r for r in rows if r["launches"] != round(r["launches"])]
            assert [r["name"] for r in odd] in ([], ["other"]), odd


def test_long_contexts_select_and_prefill_grows(tmp_path: Path):
    found = bench(tmp_path, "contexts,prefill", "--context=300", "--context=1500")
    for row in found["contexts"]:
        assert row["scan_ms"] > 0 and row["sparse_ms"] > 0 and row["dense_ms"] > 0
    chunks = [row for row in found["prefill_chunks"] if row["length"] == 1500]
    assert [row["end"] for row in chunks] == [256, 512, 768, 1024, 1280, 1500]
    assert all(row["scan_us"] > 0 and row["sparse_us"] > 0 for row in chunks[1:])
    assert all(row["peak_gib"] > 0 for row in found["prefill"])


def test_a_fresh_server_makes_nothing_in_served_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With an empty cache of kernels, then with the one that this filled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "kernels"))
    starts = []
    for name in ("cold", "warm"):
        found = bench(tmp_path / name, "waves")
        [start] = found["waves_start"]
        assert start["ready_s"] > 0
        starts.append(start["builds"])
        assert len(found["waves"]) == 2 * 4
        assert all(set(row["builds"].values()) == {0} for row in found["waves"])
        # Each of the four moves has a graph for one sequence and one for four.
        assert starts[-1]["graphs_captured"] >= 8
    cold, warm = starts
    assert cold["kernels_compiled"] > 50 and warm["kernels_compiled"] == 0
    assert warm["kernels_loaded"] > 50
