"""KV blocks from what a device has left: a runner that really runs, on made-up bytes."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine.schedules import pair
from pairs import without_draft

from eaglerun.checkpoint.budget import kv_budget
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.errors import CapacityError, ConfigError
from eaglerun.llm import LLM
from eaglerun.loader import Checkpoints, kv_budget_of, refuse_what_cannot_fit
from eaglerun.messages import SamplingParams
from eaglerun.plan.blocks import hash_block, root_name
from eaglerun.ranks.local import runner_of
from eaglerun.run.memory import weights_of, widest_plans
from eaglerun.run.options import RunnerOptions
from eaglerun.run.runner import Runner
from eaglerun.start import start_engine

MODELS = pair(0, 4, torch.float64)
WEIGHTS = weights_of(MODELS.target, MODELS.draft)
MIB = 1 << 20
PROMPT = list(range(3, 25))


class Scripted:
    """A device of ``total`` bytes whose readings follow the rehearsal: what is held at each
    settle(), and the peak of each step."""

    def __init__(self, total: int, others: int = 3 * MIB) -> None:
        self._total, self._others = total, others
        self._held = [WEIGHTS + 100, WEIGHTS + 100 + 5 * MIB, WEIGHTS + 100 + 6 * MIB]
        self._held += [WEIGHTS + 100]
        self._peaks = [self._held[1] + 40 * MIB, self._held[2] + 20 * MIB]
        self._now = 0

    def total(self) -> int:
        return self._total

    def free(self) -> int:
        return self._total - self._others - self._now

    def settle(self) -> int:
        self._now = self._held.pop(0)
        return self._now

    def held(self) -> int:
        return self._now

    def peak(self) -> int:
        return self._peaks.pop(0)


def engine(memory: Scripted | None, draft: bool = True, **settings: object) -> Engine:
    config = {
        "draft": "tiny" if draft else None,
        "max_model_len": 96,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "log_stats_every": 0,
        **settings,
    }
    models = MODELS if draft else without_draft(MODELS)
    return start_engine(resolve(config, environ={}), models, memory=memory)


def test_blocks_fill_what_is_left():
    memory = Scripted(1024 * MIB)
    made = engine(memory, gpu_memory_utilization=0.5)
    kv = kv_budget(MODELS.target.spec, MODELS.draft.spec, 4, "float64")
    regions = runner_of(made).kv_regions()
    assert sum(region.bytes_per_block for region in regions) == kv.block_bytes
    # Each of the regions may take up to a page more; the one block's own bytes come back.
    state = 5 * MIB + len(regions) * 2 * MIB - kv.block_bytes
    # The prefill's 40 MiB over idle beat the decode step's 20 over its own 1.
    left = 512 * MIB - 3 * MIB - 100 - WEIGHTS - state - 40 * MIB
    assert made.pool.num_blocks == runner_of(made).options.num_blocks == left // kv.block_bytes
    assert not memory._held and not memory._peaks
    assert made.max_model_len == 96


@pytest.mark.parametrize("kv", ["auto", "bfloat16", "fp8"])
@pytest.mark.parametrize("index", ["auto", "fp8"])
def test_narrower_caches_are_more_blocks(kv: str, index: str):
    """The budget is that of the memory that is allocated, whatever its dtypes."""
    made = engine(None, kv_cache_dtype=kv, index_cache_dtype=index, kv_cache_gib=0.01)
    regions = runner_of(made).kv_regions()
    assert made.pool.num_blocks == int(0.01 * 2**30) // sum(r.bytes_per_block for r in regions)
    sizes = {"auto": 8, "bfloat16": 2, "fp8": 1}
    for region in regions:
        kind = index if "index" in region.name else "auto" if "carry" in region.name else kv
        assert region.tensor.element_size() == sizes[kind], region.name
    assert {r.name for r in regions} >= {"target.0.k", "target.3.v", "target.1.index_k", "draft.v"}


def test_the_measured_engine_answers_as_another():
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    expected, got = (
        LLM.from_engine(e).generate([PROMPT], params, progress=False)[0].token_ids
        for e in (engine(None, num_kv_blocks=100), engine(Scripted(1024 * MIB)))
    )
    assert got == expected


def test_what_is_compiled_is_counted_for_a_terminal(capsys):
    config = {"draft": "tiny", "max_model_len": 96, "max_num_seqs": 4, "log_stats_every": 0}
    settings = resolve(config | {"max_num_batched_tokens": 64})
    start_engine(settings, MODELS, memory=Scripted(1024 * MIB))
    assert capsys.readouterr().err == ""
    start_engine(settings, MODELS, memory=Scripted(1024 * MIB), progress=True)
    # On a CPU there is nothing to compile.
    assert "compiling: 0 kernels [00:00]" in capsys.readouterr().err


def test_graphs_have_room_where_they_are_captured():
    sizes = {"decode_batch_sizes": (1, 2, 4)}
    eager = engine(Scripted(1024 * MIB), enforce_eager=True, **sizes)
    captured = engine(Scripted(1024 * MIB), **sizes)
    block = sum(region.bytes_per_block for region in runner_of(eager).kv_regions())
    # A decode step's 20 MiB once more; for 7 sequences of 1 to 4 rows the float64 logits of the
    # target and accept's in float32, under both bounds of the keys: 12 of them are selected.
    room = 20 * MIB + 7 * (1 + 2 + 3 + 4) * 40 * (8 + 4) * 2
    assert runner_of(captured).options.graph_bytes == room
    assert runner_of(eager).options.graph_bytes == 0
    assert eager.pool.num_blocks - captured.pool.num_blocks in (room // block, room // block + 1)


def test_settings_that_size_the_kv_memory_are_not_measured():
    for settings, blocks in (({"num_kv_blocks": 50}, 50), ({"kv_cache_gib": 0.001}, None)):
        memory = Scripted(1024 * MIB)
        made = engine(memory, **settings)
        assert len(memory._held) == 4
        assert blocks is None or made.pool.num_blocks == blocks
        assert runner_of(made).options.graph_bytes is None


def test_what_does_not_fit_is_refused_with_the_budget():
    with pytest.raises(CapacityError) as refused:
        engine(Scripted(80 * MIB))
    text = str(refused.value)
    assert text.startswith("max_model_len = 96 does not fit the GPU:\n")
    for part in ("0.9 of 0.078 GiB", "weights", "activations", "left for KV", "one sequence of 96"):
        assert part in text
    assert "gpu_memory_utilization: " in text and "max_num_batched_tokens" in text
    advised = float(text.split("gpu_memory_utilization: ")[1].split()[0])
    made = engine(Scripted(80 * MIB), gpu_memory_utilization=advised)
    assert made.max_model_len == 96
    with pytest.raises(CapacityError):
        engine(Scripted(80 * MIB), gpu_memory_utilization=advised - 0.001)


def test_a_step_that_runs_out_of_memory_is_refused_with_the_budget(monkeypatch):
    def launch(self: Runner, plan: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Runner, "launch", launch)
    with pytest.raises(CapacityError, match="the widest step does not fit the GPU") as refused:
        engine(Scripted(1024 * MIB))
    assert "weights" in str(refused.value) and "activations" not in str(refused.value)


def test_a_length_beyond_the_checkpoint_is_refused_before_anything_runs():
    memory = Scripted(1024 * MIB)
    with pytest.raises(ConfigError, match="max_model_len = 300: the checkpoint allows at most 256"):
        engine(memory, max_model_len=300)
    assert len(memory._held) == 4


@pytest.mark.parametrize("k", [0, 3, 8])
@pytest.mark.parametrize(
    ("rows", "chunk", "length"), [(64, 64, 96), (200, 30, 96), (200, 500, 40), (64, 64, 2)]
)
def test_the_widest_steps(k: int, rows: int, chunk: int, length: int):
    """As many rows as may be, a row at the far end, all slots; nothing beyond the length."""
    options = SimpleNamespace(num_slots=4, num_draft_tokens=k, max_model_len=length)
    prefill, decode = widest_plans(options, rows, chunk, 1000)
    ends = {c.slot_id: c.end for c in prefill.prefill if c.samples}
    assert len(ends) == 4 and [a.slot_id for a in prefill.admissions] == [0, 1, 2, 3]
    assert max(c.end for c in prefill.prefill) == max(length - 1, *ends.values())
    room = 4 * max(min(chunk, length - 2 * k - 2), 1) + 1
    assert sum(len(c.token_ids) for c in prefill.prefill) == min(rows, room)
    assert all(c.end <= chunk for c in prefill.prefill if c.samples)
    assert len(decode.decode) == 4
    for row in decode.decode:
        # The sampled token, the drafts judged, the target's own, and the drafts made then.
        assert ends[row.slot_id] + 1 + row.num_drafts + 1 + row.num_propose <= max(length, 3)


def test_loading_is_refused_before_it_begins():
    spec, draft = MODELS.target.spec, MODELS.draft.spec
    found = Checkpoints("tiny", None, spec, None, draft)
    config = resolve({"draft": "d", "max_model_len": 96}, environ={})
    dtype = torch.float64
    block = kv_budget_of(config, spec, draft, dtype).block_bytes
    small = Scripted(WEIGHTS // 2, others=0)
    with pytest.raises(CapacityError, match="a GPU with more memory") as refused:
        refuse_what_cannot_fit(config, found, dtype, small)
    assert "activations" not in str(refused.value)
    roomy = Scripted(4 * WEIGHTS, others=0)
    refuse_what_cannot_fit(config, found, dtype, roomy)
    for settings in ({"num_kv_blocks": 4 * WEIGHTS // block}, {"kv_cache_gib": 1}):
        cache = replace(config.cache, **settings)
        with pytest.raises(CapacityError, match="KV blocks do not fit the GPU"):
            refuse_what_cannot_fit(replace(config, cache=cache), found, dtype, roomy)


def test_the_rehearsal_leaves_nothing_behind(monkeypatch):
    made: list[weakref.ref[Runner]] = []
    original = Runner.__init__

    def init(self: Runner, *args: object) -> None:
        made.append(weakref.ref(self))
        original(self, *args)

    monkeypatch.setattr(Runner, "__init__", init)
    running = engine(Scripted(1024 * MIB))
    gc.collect()
    assert len(made) == 2 and made[0]() is None and made[1]() is runner_of(running)
    assert isinstance(runner_of(running).options, RunnerOptions)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_blocks_moved_by_their_regions_are_found_and_go_on_alike(dtype: str):
    """All that a block holds is in kv_regions(): its bytes in another engine serve as computed."""
    settings = {"num_kv_blocks": 60, "kv_cache_dtype": dtype, "index_cache_dtype": dtype}
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    computed, moved = engine(None, **settings), engine(None, **settings)
    first = LLM.from_engine(computed).generate([PROMPT], params, progress=False)[0]
    names, parent = [], root_name("")
    for start in range(0, len(PROMPT) - 4 + 1, 4):
        parent = hash_block(parent, PROMPT[start : start + 4])
        names.append(parent)
    theirs = computed.pool.match(names)
    assert len(theirs) == 5
    # Other places there than here.
    held = moved.pool.allocate(7)
    ours = moved.pool.allocate(len(theirs))
    for block, name in zip(ours, names, strict=True):
        moved.pool.publish(block, name)
    moved.pool.release(held + ours)
    for here, there in zip(
        runner_of(computed).kv_regions(), runner_of(moved).kv_regions(), strict=True
    ):
        assert (here.name, here.layout) == (there.name, there.layout)
        source, target = (r.tensor.view(torch.uint8).flatten(1) for r in (here, there))
        assert source.shape == (60, here.bytes_per_block)
        target.fill_(0xFF)
        target[ours] = source[theirs]
    second = LLM.from_engine(moved).generate([PROMPT], params, progress=False)[0]
    assert (moved.stats.cached_tokens, computed.stats.cached_tokens) == (20, 0)
    assert second.token_ids == first.token_ids
    assert second.speculation == first.speculation
