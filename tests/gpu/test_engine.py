"""The engine on a GPU: graphs, the host one step ahead, any K: the tokens of the plain engine."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from pairs import CPU, draft_spec, target_spec, tiny_draft, tiny_target, without_draft

from eaglerun.bench.caches import compare, logits_of
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.llm import LLM
from eaglerun.loader import Models
from eaglerun.messages import Request, SamplingParams
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine, warm_up
from eaglerun.stats import Builds

pytestmark = pytest.mark.gpu

LENGTHS = (5, 70, 130, 16, 33, 200, 64, 90)


@pytest.fixture(scope="module")
def models() -> dict[str, Models]:
    """The same pair, float32, on both devices: widths a kernel tile can take."""
    kinds = (False, *[True] * 4)
    target = replace(
        target_spec(vocab_size=512, block_size=16, num_layers=5, hidden_size=128),
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        rotary_dim=16,
        index_head_dim=32,
        num_experts=8,
        expert_intermediate_size=64,
        shared_intermediate_size=64,
        dense_intermediate_size=256,
        max_position_embeddings=1024,
        moe_layers=kinds,
        sparse_layers=kinds,
        index_shared=(False,) * 5,
    )
    draft = draft_spec(target, head_dim=128, intermediate_size=256, max_position_embeddings=1024)
    on_cpu = tiny_target(0, target, draft.taps, torch.float32)
    drafts = tiny_draft(1, draft, on_cpu, torch.float32)
    cuda = torch.device("cuda")
    return {
        "cpu": Models("small", on_cpu.to(CPU), drafts, (0,)),
        "cuda": Models(
            "small", copy.deepcopy(on_cpu).to(cuda), copy.deepcopy(drafts).to(cuda), (0,)
        ),
    }


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 512, (n,), generator=generator).tolist() for n in LENGTHS]


def answers(
    models: Models,
    draft: bool,
    poison: bool = False,
    served: bool = False,
    ready: list[Builds] | None = None,
    **settings: object,
) -> tuple[list[list[int]], Engine]:
    """``poison``: NaN in all memory that a cell is written to before it is read. ``ready`` takes
    what the engine had made before it was asked."""
    config = {
        "draft": "small" if draft else None,
        "max_model_len": 512,
        "num_kv_blocks": 400,
        "max_num_seqs": 8,
        "max_chunk_tokens": 64,
        "log_stats_every": 0,
        **settings,
    }
    made = models if draft else without_draft(models)
    engine = start_engine(resolve(config, environ={}), made, served=served)
    if served:
        warm_up(engine)
    if ready is not None:
        ready.append(engine.builds)
    if poison:
        runner = runner_of(engine)
        for region in runner.kv_regions():
            region.tensor.fill_(float("nan"))
        if runner.aux is not None:
            runner.aux.fill_(float("nan"))
    params = [
        SamplingParams(
            temperature=float(i % 2), seed=i, max_tokens=64, ignore_eos=True, top_k=40 * (i % 3)
        )
        for i in range(len(LENGTHS))
    ]
    outputs = LLM.from_engine(engine).generate(prompts(), params, progress=False)
    return [list(o.token_ids) for o in outputs], engine


def test_the_gpu_says_what_the_cpu_says(models: dict[str, Models]):
    assert answers(models["cuda"], False)[0] == answers(models["cpu"], False)[0]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapping"])
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_lossless(models: dict[str, Models], k: int, lag: int, eager: bool, overlap: bool):
    plain, _ = answers(models["cuda"], False, enforce_eager=True, lag=0)
    settings = {"num_draft_tokens": k, "lag": lag, "enforce_eager": eager}
    settings["overlap_kernels"] = overlap
    got, engine = answers(models["cuda"], True, **settings)
    assert got == plain
    assert (len(runner_of(engine).decode.graphs) > 0) == (not eager)
    if k:
        assert engine.stats.acceptance.accepted > 0
    engine.scheduler.check_integrity()


@pytest.mark.parametrize("warmup", ["common", "full"])
@pytest.mark.parametrize("k", [0, 3])
def test_a_served_engine_makes_nothing_in_its_steps(
    models: dict[str, Models],
    k: int,
    warmup: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """No kernel is compiled, read from disk or captured after the warm-up, but while idle; steps
    run as larger ones than their own, and their tokens are the plain engine's."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    plain, _ = answers(models["cuda"], False, enforce_eager=True, lag=0)
    settings = {"num_draft_tokens": k, "warmup": warmup, "max_num_batched_tokens": 256}
    for _ in ("cold", "warm"):
        ready: list[Builds] = []
        got, engine = answers(models["cuda"], True, served=True, ready=ready, **settings)
        [at_ready] = ready
        assert got == plain
        assert engine.builds == at_ready
        while engine.has_missed:
            engine.make_missed()
        made = engine.builds.since(at_ready)
        assert made == engine.idle_builds and made.kernels_compiled == made.kernels_loaded == 0
    assert at_ready.kernels_compiled == 0 < at_ready.kernels_loaded


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("k", [0, 3])
def test_memory_is_written_before_it_is_read(models: dict[str, Models], k: int, eager: bool):
    """Scarce blocks too: sequences are preempted, and blocks change hands."""
    settings = {"num_draft_tokens": k, "enforce_eager": eager, "num_kv_blocks": 60}
    plain, _ = answers(models["cuda"], False, enforce_eager=True, lag=0)
    got, engine = answers(models["cuda"], True, poison=True, **settings)
    assert got == plain
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("keep_aux", [False, True], ids=["", "aux"])
def test_a_launch_waits_for_nothing(models: dict[str, Models], keep_aux: bool):
    """Admissions with all that a request can ask for, prefill and decode: the host goes on."""
    settings = {"enforce_eager": True, "lag": 0, "return_aux_hidden_states": keep_aux}
    _, engine = answers(models["cuda"], True, num_draft_tokens=3, **settings)
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    wishes = [
        greedy,
        replace(greedy, logit_bias={3: 1.0, 5: -1.0}, min_tokens=4, stop_token_ids=(7,)),
        replace(greedy, temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, seed=1),
        replace(greedy, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1),
        replace(greedy, logprobs=2, prompt_logprobs=2),
    ]
    for i, wish in enumerate(wishes):
        engine.submit(Request(str(i), tuple(prompts()[i]), wish))
    while engine.has_work:
        plan = engine.scheduler.plan()
        assert plan is not None
        torch.cuda.set_sync_debug_mode("error")
        try:
            # The result waits for its own step's event, which is no wait for the device.
            pending = runner_of(engine).launch(plan)
            result = pending.result(60)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(pending.aux) == keep_aux
        assert all(rows.start >= 0 for rows in pending.aux)
        engine.scheduler.commit(result)
    assert engine.stats.acceptance.accepted > 0


FP8 = {"kv_cache_dtype": "fp8", "index_cache_dtype": "fp8"}


@pytest.mark.parametrize("lag", [0, 1])
def test_fp8_caches_in_graphs_and_eager(models: dict[str, Models], lag: int):
    settings = {"num_draft_tokens": 3, **FP8}
    eager, _ = answers(models["cuda"], True, enforce_eager=True, lag=0, **settings)
    got, engine = answers(models["cuda"], True, lag=lag, **settings)
    assert got == eager
    assert engine.stats.acceptance.accepted > 0


def test_fp8_caches_hold_what_the_cpu_holds(models: dict[str, Models]):
    """Rounding may differ where a value lies in the middle; that is far less than fp8's error."""
    text = tuple(prompts()[2])
    wide, narrow = ((kind, kind) for kind in (torch.float32, torch.float8_e4m3fn))
    exact, cpu = (logits_of(models["cpu"].target, text, 0, kinds) for kinds in (wide, narrow))
    cuda = logits_of(models["cuda"].target, text, 0, narrow).cpu()
    error, difference = compare(exact, cpu)[0].mean(), compare(cpu, cuda)[0].mean()
    assert difference < 0.05 * error
