"""Every part of the benchmark from end to end, on a tiny random pair."""

import contextlib
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from pairs import tiny_pair, without_draft

from eaglerun.bench import commands, profile, workbench
from eaglerun.bench.contexts import fill_memory, publish
from eaglerun.bench.drive import Steps, decode_steps, run_to_end, submit
from eaglerun.bench.throughput import lengths, percentiles
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError, EngineError, RankFailed
from eaglerun.loader import load_models
from eaglerun.messages import Finished, Request, SamplingParams
from eaglerun.server import cli
from eaglerun.server.hung import RANK_FAILED
from eaglerun.start import start_engine

SETTINGS = (
    "--max-num-seqs=3",
    "--max-num-batched-tokens=24",
    "--num-kv-blocks=200",
    "--max-model-len=120",
    "--log-stats-every=0",
    "--scripted=tokens",
    "--synthetic-acceptance-length=2.5",
)
SMALL = ("--input-len=9", "--output-len=14", "--num-steps=2", "--num-prompts=5", "--vary=0.5")


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch: pytest.MonkeyPatch):
    models = tiny_pair()
    plain = without_draft(models)
    monkeypatch.setattr(
        workbench,
        "load_models",
        lambda config, progress: models if config.num_draft_tokens else plain,
    )


def bench(tmp_path: Path, parts: str, *more: str) -> dict[str, list[dict]]:
    """Rows by table."""
    flags = (*SETTINGS, *SMALL, *more)
    if not any(flag.startswith("--concurrency") for flag in more):
        flags += ("--concurrency=1", "--concurrency=3")
    assert cli.main(["bench", parts, *flags, f"--out={tmp_path}"]) == 0
    found = {}
    for file in tmp_path.glob("*.json"):
        assert file.with_suffix(".md").read_text().startswith("| ")
        body = json.loads(file.read_text())
        assert "num_kv_blocks = 200" in body["settings"] and body["machine"]["python"]
        found[file.stem] = body["rows"]
    return found


def test_latency_and_what_the_drafts_kv_costs(tmp_path: Path):
    found = bench(tmp_path, "latency,fill", "--bandwidth-gb-s=1", "--tflops=0.001")
    rows = found["latency"]
    assert [(r["concurrency"], r["num_draft_tokens"]) for r in rows] == [
        (1, 0), (3, 0), (1, 3), (3, 3)
    ]  # fmt: skip
    for r in rows:
        assert r["step_ms"] > 0 and r["out_tok_s"] > 0 and r["floor_ms"] > 0 and r["kv_ms"] > 0
        floor = r["floor_ms"] + r["kv_ms"] + r["arithmetic_ms"]
        assert r["share_with_all"] == pytest.approx(floor / r["step_ms"])
        assert r["step_ms"] == pytest.approx(r["target_ms"] + r["draft_ms"] + r["host_ms"])
        assert (r["mean_acceptance_length"] > 1) == (r["num_draft_tokens"] > 0)
        assert 9 <= r["context"] <= 9 + 14 + 4
    fill = found["fill"]
    assert [r["concurrency"] for r in fill] == [1, 3]
    assert fill[0]["cost"] == pytest.approx(fill[0]["filling_ms"] / fill[0]["plain_ms"] - 1)


def test_a_profile_has_its_groups(tmp_path: Path):
    found = bench(tmp_path, "profile", "--num-drafts=3")
    assert [r["num_steps"] for r in found["profile"]] == [2, 2]
    assert all(0 <= r["no_kernel"] < 1 for r in found["profile"])
    assert {"linear", "other"} <= {r["name"] for r in found["profile_kernels"] if r["is_group"]}
    assert (tmp_path / "trace-3-3.json.gz").is_file()


def test_no_sequence_ends_within_a_profile(tmp_path: Path):
    """Prompts that are prefilled one after the other: the first decodes long before the last."""
    found = bench(
        tmp_path,
        "profile",
        "--num-drafts=0",
        "--concurrency=8",
        "--max-num-seqs=8",
        "--max-num-batched-tokens=34",
        "--input-len=30",
    )
    assert found["profile"][0]["num_steps"] == 2
    for row in found["profile_kernels"]:
        assert row["launches"] == round(row["launches"]), "steps are alike"


def test_long_contexts_and_prefill(tmp_path: Path):
    found = bench(
        tmp_path,
        "contexts,prefill",
        "--context=30",
        "--context=50",
        "--tflops=0.001",
        "--concurrency=2",
    )
    rows = found["contexts"]
    assert [(r["num_draft_tokens"], r["context"], r["batch"]) for r in rows] == [
        (k, context, 2) for k in (0, 3) for context in (30, 50)
    ]
    assert all(r["step_ms"] > 0 and r["experts"] > 0 for r in rows)
    prefill = found["prefill"]
    assert [(r["length"], r["chunk"]) for r in prefill] == [(30, 24), (50, 24)]
    assert all(r["ttft_ms"] > 0 and r["share_of_floor"] > 0 for r in prefill)
    chunks = [(r["start"], r["end"]) for r in found["prefill_chunks"]]
    assert chunks == [(0, 24), (24, 30), (0, 24), (24, 48), (48, 50)]


def test_what_does_not_fit_is_shrunk_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(workbench.Workbench, "free_blocks", lambda *_: 45)
    found = bench(tmp_path, "contexts", "--context=30", "--context=200", "--num-drafts=0")
    assert [(r["wanted"], r["batch"]) for r in found["contexts"]] == [(1, 1), (3, 3)]
    assert "context 200 is skipped: 45 KV blocks do not hold one" in capsys.readouterr().err
    monkeypatch.setattr(workbench.Workbench, "free_blocks", lambda *_: 35)
    found = bench(tmp_path, "contexts", "--context=30", "--num-drafts=0", "--concurrency=3")
    assert [(r["wanted"], r["batch"]) for r in found["contexts"]] == [(3, 2)]
    assert "| 2 (of 3) |" in (tmp_path / "contexts.md").read_text()


@pytest.mark.long
def test_long_contexts_in_fp8_read_fewer_bytes(tmp_path: Path):
    flags = ("--context=50", "--concurrency=1", "--num-drafts=0", "--bandwidth-gb-s=1")
    (wide,) = bench(tmp_path, "contexts", *flags)["contexts"]
    fp8 = ("--kv-cache-dtype=fp8", "--index-cache-dtype=fp8")
    (narrow,) = bench(tmp_path, "contexts", *flags, *fp8)["contexts"]
    # The tiny pair is in float64.
    assert narrow["kv_ms"] == pytest.approx(wide["kv_ms"] / 8)


def test_memory_is_sized_without_the_last_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[weakref.ref[Engine]] = []
    alive: list[int] = []

    def watched(*args: object) -> Engine:
        new = start_engine(*args)
        made.append(weakref.ref(new))
        return new

    def free_blocks(*_: object) -> int:
        alive.append(sum(ref() is not None for ref in made))
        return 50

    monkeypatch.setattr(workbench, "start_engine", watched)
    monkeypatch.setattr(workbench.Workbench, "free_blocks", free_blocks)
    bench(tmp_path, "latency,contexts,prefill", "--context=30", "--concurrency=1")
    assert len(made) == 5 and alive == [0, 0]


def test_throughput_counts_every_token(tmp_path: Path):
    rows = bench(tmp_path, "throughput")["throughput"]
    assert [r["num_draft_tokens"] for r in rows] == [0, 3]
    outputs = lengths(5, 14, 0.5, seed=1)
    for r in rows:
        assert r["output_tokens"] == sum(outputs) and r["num_prompts"] == 5
        assert r["req_s"] == pytest.approx(5 / r["elapsed_s"])
        assert sorted(r["ttft_ms"]) == r["ttft_ms"] and sorted(r["itl_ms"]) == r["itl_ms"]
    assert rows[1]["mean_acceptance_length"] > rows[0]["mean_acceptance_length"] == 1.0


def test_word_problems_end_where_the_model_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workbench, "load_models", load_models)
    flags = ["throughput", "--prompts=demo", "--num-prompts=2", "--output-len=200"]
    assert cli.main(["bench", *flags, "--log-stats-every=0", f"--out={tmp_path}"]) == 0
    plain, draft = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert plain["output_tokens"] == draft["output_tokens"] < 400
    assert draft["mean_acceptance_length"] > 3.5  # past its end the demo's draft guesses badly


def test_without_a_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = (*SETTINGS[:-1], "--draft=none", *SMALL, "--concurrency=2")
    assert cli.main(["bench", "latency,fill", *flags, f"--out={tmp_path}"]) == 0
    assert "fill is skipped: there is no draft" in capsys.readouterr().err
    (row,) = json.loads((tmp_path / "latency.json").read_text())["rows"]
    assert (row["num_draft_tokens"], row["floor_ms"]) == (0, None)


def test_the_time_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    found = bench(tmp_path, "latency,throughput", "--budget-s=0")
    assert found == {}
    said = capsys.readouterr().err
    assert "left out, for --budget-s 0 is spent: latency of K = 0 at 1" in said
    assert "throughput of K = 3" in said


def test_a_part_that_fails_does_not_keep_the_next_from_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> None:
        raise EngineError("the device is lost")

    monkeypatch.setattr(commands.profile, "run", broken)
    flags = (*SETTINGS, *SMALL, "--concurrency=1", "--num-drafts=0", f"--out={tmp_path}")
    assert cli.main(["bench", "profile,latency", *flags]) == cli.FAILED
    assert (tmp_path / "latency.json").is_file()
    monkeypatch.setattr(commands.throughput, "run", broken)
    with pytest.raises(ExceptionGroup, match="parts of the benchmark failed"):
        cli.main(["bench", "profile,throughput", *flags])


def test_a_device_that_hangs_ends_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def hang(*_: object) -> None:
        raise RankFailed("step 5 is not done")

    def leave() -> NoReturn:
        sys.exit(RANK_FAILED)

    def touched(*_: object) -> None:
        pytest.fail("the device that hangs is used again")

    monkeypatch.setattr(commands.profile, "run", hang)
    monkeypatch.setattr(commands.latency, "run", touched)
    monkeypatch.setattr(workbench.Workbench, "drop_engines", touched)
    monkeypatch.setattr(cli.hung, "leave", leave)
    with pytest.raises(SystemExit, match=f"^{RANK_FAILED}$"):
        cli.main(["bench", "profile,latency", *SETTINGS, *SMALL, f"--out={tmp_path}"])
    assert capsys.readouterr().err.endswith("eaglerun: step 5 is not done\n")


def test_a_profile_does_not_wait_for_a_device_that_hangs(monkeypatch: pytest.MonkeyPatch):
    class Waiting(contextlib.AbstractContextManager[None]):
        def __init__(self, **options: object) -> None: ...

        def __exit__(self, *error: object) -> None:
            pytest.fail("waits without end where the device hangs")

    def hang() -> None:
        raise RankFailed("step 5 is not done")

    monkeypatch.setattr(profile, "profile", Waiting)
    bench = SimpleNamespace(device=torch.device("cpu"), synchronize=lambda: None)
    with pytest.raises(RankFailed, match="step 5 is not done"):
        profile.record(bench, hang, 2)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["speed"], "argument PARTS: 'speed': allowed latency, fill, profile"),
        (["latency", "--num-drafts=4"], "--num-drafts 4: the draft is loaded for num_draft_tok"),
        (["latency", "--concurrency=0"], "argument --concurrency: 0: allowed 1 or more"),
        (["latency", "--concurrency=x"], "--concurrency: invalid whole number value: 'x'"),
        (["throughput", "--vary=1"], "--vary 1: allowed 0 to 0.99"),
        (["latency", "--tflops=-1"], "--tflops -1: allowed 1e-06 to 1e"),
        (["latency", f"--out={__file__}"], "is a file, and a directory is wanted"),
    ],
)
def test_bad_flags(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["bench", *argv]) == cli.REFUSED
    assert words in capsys.readouterr().err


def engine(**settings: object) -> Engine:
    given = {"draft": "t", "max_model_len": 120, "num_kv_blocks": 60, "log_stats_every": 0}
    return start_engine(resolve(given | settings, environ={}), tiny_pair())


def test_a_published_context_is_all_but_its_last_token_there():
    made = engine()
    fill_memory(made, seed=1)
    prompts = [tuple(range(1, 34)), tuple(range(1, 14)), tuple(range(2, 35))]
    for prompt in prompts:
        publish(made, prompt)
    made.pool.check_integrity([])
    # The second is the beginning of the first.
    assert made.pool.num_free == 60 and len(list(made.pool.published())) == 8 + 8
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        made.submit(Request(str(i), prompt, params))
    ends = []
    while made.has_work:
        ends += [e for e in made.step() if isinstance(e, Finished)]
    cached = {e.request_id: e.num_cached_tokens for e in ends}
    assert cached == {"0": 32, "1": 12, "2": 32}


def test_a_measurement_without_a_full_step_is_refused(capsys: pytest.CaptureFixture[str]):
    flags = (*SETTINGS, *SMALL, "--concurrency=3", "--num-drafts=0", "--output-len=1")
    assert cli.main(["bench", "latency", *flags]) == cli.FAILED
    assert "3 sequences of 1 tokens: no two steps in a row" in capsys.readouterr().err


def test_decoding_that_ends_too_soon_is_an_error():
    made = engine(max_num_seqs=2)
    steps = Steps(1)
    made.observer = steps
    times = submit(made, [(1, 2, 3)], [4], 0)
    with pytest.raises(EngineError, match="ended after 2 full decode steps"):
        decode_steps(made, steps, 9)
    run_to_end(made, times)


def test_percentiles_are_values_that_occurred():
    assert percentiles([float(i) for i in range(1, 101)]) == (50.0, 90.0, 99.0)
    assert percentiles([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no values"):
        percentiles([])
    assert set(lengths(50, 8, 0.5, 0)) == {4, 5, 6, 7, 8} and lengths(3, 8, 0.0, 0) == [8, 8, 8]


def test_options_default_to_the_parts_own_choice():
    made = workbench.Workbench(
        resolve({"max_num_seqs": 16, "draft": "t"}, environ={}), workbench.Options()
    )
    assert made.concurrencies((1, 4, 16, 64)) == (1, 4, 16)
    with pytest.raises(ConfigError, match="--num-drafts 5"):
        workbench.Workbench(made.config, workbench.Options(num_drafts=(5,)))
