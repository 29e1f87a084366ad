"""From a Config to an engine, and what its one rank does in between."""

import gc
import weakref

import pytest
from pairs import tiny_pair

from eaglerun.config import Config, resolve
from eaglerun.engine import Engine
from eaglerun.errors import CheckpointError, ConfigError, EngineError, RankFailed
from eaglerun.loader import DEMO
from eaglerun.messages import Failed, Request, SamplingParams
from eaglerun.plan.step import STEP_TIMEOUT_S, StepPlan, StepResult
from eaglerun.ranks.local import LocalRank, runner_of
from eaglerun.start import WARM_UP, start_engine, warm_up

PLAN = StepPlan(0, (), (), (), (), 0, 0, -1)


def config(**settings: object) -> Config:
    given = {"draft": "tiny", "num_kv_blocks": 40, "max_model_len": 96, "log_stats_every": 0}
    return resolve(given | settings, environ={})


class Hanging:
    """A launched step that is never done."""

    aux = ()

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan

    def result(self, timeout_s: float) -> StepResult:
        assert timeout_s == STEP_TIMEOUT_S
        raise RankFailed(f"step {self.plan.step_id} is not done")


def test_models_in_memory_are_not_taken_for_several_ranks():
    with pytest.raises(ConfigError, match="tensor_parallel_size = 2: allowed 1, as no engine"):
        start_engine(config(tensor_parallel_size=2), tiny_pair(num_attention_heads=2))


def test_a_rank_loads_allocates_launches_and_closes():
    rank = LocalRank(config(), tiny_pair())
    with pytest.raises(EngineError, match="the rank has no models"):
        rank.allocate(4, 96, None)
    ready = rank.load()
    assert (ready.vocab_size, ready.has_draft, ready.on_gpu) == (40, True, False)
    assert ready.max_position_embeddings == 256 and ready.kv.block_size == 4
    assert rank.rehearse() is None
    with pytest.raises(EngineError, match="the rank has no KV memory"):
        rank.launch(PLAN)
    rank.allocate(4, 96, None)
    assert rank.runner.options.num_blocks == 4 and rank.runner.options.max_model_len == 96
    assert rank.launch(PLAN).result(1.0).step_id == 0
    runner = weakref.ref(rank.runner)
    rank.close()
    gc.collect()
    assert runner() is None
    with pytest.raises(EngineError, match="the rank has no KV memory"):
        rank.launch(PLAN)
    with pytest.raises(EngineError, match="the rank has no models"):
        rank.rehearse()


def test_without_drafts_a_rank_tells_of_no_draft():
    rank = LocalRank(config(num_draft_tokens=0), tiny_pair())
    ready = rank.load()
    assert not ready.has_draft and ready.kv.draft_bytes == 0
    assert start_engine(config(num_draft_tokens=0), tiny_pair()).num_draft_tokens == 0


def test_the_bundled_pair_starts_from_its_settings():
    settings = {"model": "demo", "draft": str(DEMO / "draft"), "max_model_len": 64}
    engine = start_engine(resolve(settings | {"num_kv_blocks": 4}, environ={}))
    assert engine.path == DEMO / "target" and engine.tokenizer is not None
    assert engine.num_draft_tokens == 3 and engine.max_model_len == 64
    assert runner_of(engine).drafter is not None


def test_kv_memory_too_small_for_a_block_is_refused():
    with pytest.raises(ConfigError, match="kv_cache_gib = 0.001: one KV block needs"):
        start_engine(config(num_kv_blocks=None, kv_cache_gib=0.001, max_model_len=None), wide())


def wide():
    """A pair whose one block takes more than a thousandth of a GiB."""
    return tiny_pair(block_size=2048)


def test_a_step_that_hangs_fails_what_is_open():
    engine = start_engine(config(), tiny_pair())
    engine.submit(Request("a", (1, 2, 3), SamplingParams(max_tokens=4)))
    launch = engine.rank.launch
    engine.rank.launch = Hanging
    with pytest.raises(RankFailed, match="step 0 is not done"):
        engine.step()
    assert engine.close("gone") == [Failed("a", "gone")]
    engine.rank.launch = launch
    assert not engine.has_work


def test_warming_up_leaves_nothing_behind():
    engine = start_engine(config(), tiny_pair())
    warm_up(engine)
    assert engine.pool.num_held == 0 and engine.stats.emitted_tokens == 8
    # Nothing is asked of a model too short for the request.
    short = start_engine(config(max_model_len=len(WARM_UP.prompt_ids)), tiny_pair())
    warm_up(short)
    assert short.stats.steps == 0


def test_a_broken_layer_is_named_by_the_warm_up():
    models = tiny_pair()
    models.target.layers[2].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="computes NaN or Inf, first in layer 2; another"):
        warm_up(start_engine(config(), models))


def test_a_runner_elsewhere_is_not_handed_out():
    engine = start_engine(config(), tiny_pair())

    class Elsewhere:
        pass

    ready = LocalRank(config(), tiny_pair()).load()
    away = Engine(engine.config, ready, engine.scheduler, Elsewhere())
    with pytest.raises(EngineError, match="a Elsewhere is not in this process"):
        runner_of(away)
