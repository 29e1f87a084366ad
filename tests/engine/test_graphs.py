"""Which moves are captured, and that their replays compute the same; captures need a GPU."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from engine.test_engine import answer, make
from replayed import Replayed

from eaglerun.engine import Engine
from eaglerun.errors import EngineError, RankFailed
from eaglerun.llm import LLM
from eaglerun.messages import Request, SamplingParams
from eaglerun.plan.step import StepPlan, StepResult
from eaglerun.ranks.local import runner_of
from eaglerun.run.graphs import Graphs
from eaglerun.stats import Builds


@pytest.mark.parametrize("progress", [True, None])
def test_a_capture_is_named_once(progress, monkeypatch, capsys: pytest.CaptureFixture[str]):
    graphs = Graphs(torch.device("cpu"), True, nullcontext, None, progress)
    graphs.enabled = True
    replayed: list[str] = []

    def capture(key: str, move: object):
        graphs._captured[key] = (SimpleNamespace(replay=lambda: replayed.append(key)), key)
        return graphs._captured[key]

    monkeypatch.setattr(graphs, "_capture", capture)
    assert [graphs.run(key, lambda: None) for key in ("target", "draft", "draft")] == [
        "target",
        "draft",
        "draft",
    ]
    drawn = capsys.readouterr().err
    assert replayed == ["target", "draft", "draft"]
    if progress is None:
        assert drawn == ""
    else:
        assert "capturing: 0 graphs [00:00], target" in drawn
        assert "capturing: 1 graphs [00:00], draft" in drawn and "2 graphs" not in drawn


class Device:
    """torch.cuda as a capture uses it. ``done``: whether each event in turn is ever reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *done: bool) -> None:
        left = iter(done)

        class Event:
            def record(self) -> None:
                self._done = next(left)

            def query(self) -> bool:
                return self._done

        def hangs() -> None:
            pytest.fail("waits without end where the device hangs")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        graph = SimpleNamespace(replay=lambda: None)
        fakes: dict[str, Callable[..., object]] = {
            "Event": Event,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": nullcontext,
            "synchronize": hangs,
            "empty_cache": lambda: None,
            "memory_reserved": lambda: 0,
            "CUDAGraph": lambda: graph,
            "graph_pool_handle": lambda: (0, 1),
            "graph": lambda graph, pool: nullcontext(),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr("eaglerun.run.graphs.STEP_TIMEOUT_S", 0.01)
        self.runs = 0
        self.graphs = Graphs(torch.device("cuda"), True, nullcontext, None)

    def move(self) -> None:
        self.runs += 1


@pytest.mark.parametrize(
    ("done", "words", "runs"),
    [
        ((False,), "what was launched before it is not done", 0),
        ((True, False), "its first run is not done", 1),
    ],
)
def test_a_capture_on_a_device_that_hangs_ends(
    done: tuple[bool, ...], words: str, runs: int, monkeypatch: pytest.MonkeyPatch
):
    device = Device(monkeypatch, *done)
    message = f"^no graph of target can be captured: {words} after 0.01 s: the device hangs$"
    with pytest.raises(RankFailed, match=message):
        device.graphs.run("target", device.move)
    assert device.runs == runs and len(device.graphs) == 0


def test_a_capture_waits_before_and_after_its_first_run(monkeypatch: pytest.MonkeyPatch):
    device = Device(monkeypatch, True, True)
    device.graphs.run("target", device.move)
    assert device.runs == 2 and len(device.graphs) == 1
    # A replay asks for no further event.
    device.graphs.run("target", device.move)
    assert device.runs == 2


KS = (3, 1, 2, 0, 3, 3, 2, 2, 1, 1, 0, 0, 1, 3, 2)


def steps(engine: Engine) -> list[tuple[StepPlan, tuple[tuple[int, ...], ...], list[list[int]]]]:
    """Each plan with what it emitted, and what was proposed in it."""
    found = []

    def observe(plan: StepPlan, result: StepResult) -> None:
        drafts = runner_of(engine).state.draft_tokens
        slots = [row.slot_id for row in plan.decode]
        proposed = [drafts[slot, : plan.num_propose].tolist() for slot in slots]
        found.append((plan, result.decode, proposed))

    engine.observer = observe
    prompts = [list(range(3, 25)), list(range(9, 15)), [7, 8]]
    params = [SamplingParams(temperature=t, max_tokens=40, ignore_eos=True) for t in (0, 0, 1.0)]
    seeded = [dataclasses.replace(p, seed=i) for i, p in enumerate(params)]
    LLM.from_engine(engine).generate(prompts, seeded, progress=False)
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"verification": "rejection", "draft_sampling": "probabilistic"}, {"scripted": "drafts"}],
    ids=["", "probabilistic", "scripted"],
)
def test_a_replay_computes_what_the_move_computes_whatever_k_came_before(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Fill is captured by K_in and propose by K_out: their graphs are a sum and no product."""
    settings = {"decode_batch_sizes": (4,), "max_num_seqs": 4, "lag": 0, **settings}
    plain = steps(make(k=3, ks=KS, **settings))
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, ks=KS, **settings)
    assert steps(engine) == plain
    graphs = runner_of(engine).decode.graphs
    assert isinstance(graphs, Replayed)
    pairs = {(plan.num_drafts, plan.num_propose) for plan, *_ in plain if plan.decode}
    assert len(pairs) > 10
    for move, others in (("fill", 2), ("propose", 1)):
        keys = [key for key in graphs.keys if key[0] == move]
        # By the bound of the keys, by what the sampling needs of a draft that is drawn, and
        # whether there is anything to propose.
        sampled = {key[-1] for key in keys} if move == "propose" else {None}
        assert 0 < len(keys) <= 4 * 2 * others * len(sampled)
    assert {key[0] for key in graphs.keys} == {"target", "accept", "fill", "propose"}


@pytest.mark.parametrize("warmup", ["common", "full"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"verification": "rejection", "draft_sampling": "probabilistic"}],
    ids=["", "probabilistic"],
)
def test_a_served_engine_captures_before_its_first_step_and_while_idle(
    settings: dict[str, str], warmup: str, monkeypatch: pytest.MonkeyPatch
):
    """Steps with fewer drafts, sequences or keys than what is captured run as that, and compute the
    same; for the next ones their own graphs are made once there is nothing to do."""
    settings = {"decode_batch_sizes": (2, 4), "max_num_seqs": 4, "lag": 0, **settings}
    plain = steps(make(k=3, ks=KS, **settings))
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, ks=KS, served=True, warmup=warmup, **settings)
    graphs = runner_of(engine).decode.graphs
    at_start = engine.builds
    assert at_start.graphs_captured == len(graphs) > 0
    assert isinstance(graphs, Replayed)
    begun = graphs.keys
    assert steps(engine) == plain
    assert begun == graphs.keys and engine.builds == at_start
    # All but the number of drafts was captured, or also that.
    assert engine.has_missed == (warmup == "common")
    while engine.has_missed:
        engine.make_missed()
    made = len(graphs) - len(begun)
    assert engine.idle_builds.graphs_captured == made and (made > 0) == (warmup == "common")
    assert engine.builds.since(at_start) == engine.idle_builds
    greedy = SamplingParams(temperature=0.0, max_tokens=20)
    assert answer(engine, greedy).token_ids == answer(make(draft=False), greedy).token_ids


def test_what_was_missed_is_not_made_while_there_is_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, served=True, decode_batch_sizes=(2,))
    engine.submit(Request("a", (3, 4), SamplingParams(max_tokens=2)))
    with pytest.raises(EngineError, match="while there is no work"):
        engine.make_missed()


def test_without_warmup_a_step_captures_what_it_first_needs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, served=True, warmup="none", decode_batch_sizes=(2,))
    assert engine.builds.graphs_captured == 0
    answer(engine, SamplingParams(temperature=0.0, max_tokens=9))
    assert engine.builds.graphs_captured > 0 and not engine.has_missed


def test_no_graph_is_missed_once_no_memory_is_left_for_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, served=True, decode_batch_sizes=(2,))
    graphs = runner_of(engine).decode.graphs
    graphs.max_bytes = graphs.num_bytes
    answer(engine, SamplingParams(temperature=0.0, max_tokens=9, presence_penalty=0.5))
    assert not engine.has_missed


def test_a_device_without_memory_for_a_graph_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """At the start, and while idle."""
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    greedy = SamplingParams(temperature=0.0, max_tokens=9)
    plain = answer(make(draft=False), greedy).token_ids
    engine = make(k=3, served=True, decode_batch_sizes=(2,))
    answer(engine, dataclasses.replace(greedy, presence_penalty=0.5))
    assert engine.has_missed
    capture = Replayed._capture

    def fails(graphs: Replayed, key: object, move: Callable[[], object]) -> object:
        if len(graphs) >= 3:
            raise torch.OutOfMemoryError("out of memory")
        return capture(graphs, key, move)

    monkeypatch.setattr(Replayed, "_capture", fails)
    engine.make_missed()
    assert not engine.has_missed and answer(engine, greedy).token_ids == plain
    other = make(k=3, served=True, decode_batch_sizes=(2,))
    assert len(runner_of(other).decode.graphs) == 3
    assert answer(other, greedy).token_ids == plain and not other.has_missed
    assert caplog.text.count("no memory for more than") == 2


def test_without_a_draft_two_moves_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(draft=False, decode_batch_sizes=(4,), max_num_seqs=4)
    steps(engine)
    graphs = runner_of(engine).decode.graphs
    assert isinstance(graphs, Replayed)
    assert {key[0] for key in graphs.keys} == {"target", "accept"}


def test_captures_are_counted_with_their_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eaglerun.run.decode.Graphs", Replayed)
    engine = make(k=3, decode_batch_sizes=(1, 4), max_num_seqs=4)
    assert engine.builds == Builds()
    params = SamplingParams(temperature=0.0, max_tokens=9)
    LLM.from_engine(engine).generate([[5, 6]], params, progress=False)
    first = engine.builds
    graphs = runner_of(engine).decode.graphs
    assert first.graphs_captured == len(graphs) >= 4 and first.capture_s > 0
    LLM.from_engine(engine).generate([[5, 6]], params, progress=False)
    assert engine.builds == first
    steps(engine)
    more = engine.builds.since(first)
    assert more.graphs_captured == len(graphs) - first.graphs_captured > 0
    # Nothing compiles where the references compute.
    assert more.capture_s > 0 == more.kernels_compiled == more.kernels_loaded
    engine.rank.close()
    assert engine.builds == Builds()
