"""The KV memory that a real GPU is given: what is left, and still left when all of it is in use."""

import gc
from dataclasses import replace

import pytest
import torch
from pairs import draft_spec, target_spec, tiny_draft, tiny_target

from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.errors import CapacityError
from eaglerun.llm import LLM
from eaglerun.loader import Models
from eaglerun.messages import SamplingParams
from eaglerun.ranks.local import runner_of
from eaglerun.run.memory import CudaMemory
from eaglerun.start import start_engine

pytestmark = pytest.mark.gpu

VOCAB, LENGTH, SEQUENCES = 50_000, 8192, 16
SHARE = 0.2


@pytest.fixture(scope="module")
def models() -> Models:
    """Logits, experts and index scores of some size, and blocks of a megabyte."""
    target = replace(
        target_spec(vocab_size=VOCAB, block_size=128, hidden_size=256),
        num_attention_heads=8,
        num_key_value_heads=4,
        num_index_heads=4,
        head_dim=128,
        rotary_dim=64,
        index_head_dim=128,
        num_experts=8,
        expert_intermediate_size=512,
        shared_intermediate_size=512,
        dense_intermediate_size=1024,
        max_position_embeddings=LENGTH,
    )
    draft = draft_spec(target, head_dim=128, num_attention_heads=2, num_key_value_heads=2)
    draft = replace(draft, intermediate_size=512, max_position_embeddings=LENGTH)
    made = tiny_target(0, target, draft.taps, torch.bfloat16)
    drafts = tiny_draft(1, draft, made, torch.bfloat16)
    cuda = torch.device("cuda")
    return Models("small", made.to(cuda), drafts.to(cuda), (0,))


@pytest.fixture(autouse=True)
def emptied():
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def engine(models: Models, **settings: object) -> Engine:
    config = {
        "draft": "small",
        "max_num_seqs": SEQUENCES,
        "max_num_batched_tokens": 2048,
        "gpu_memory_utilization": SHARE,
        "log_stats_every": 0,
        **settings,
    }
    return start_engine(resolve(config, environ={}), models)


def answers(made: Engine) -> list[list[int]]:
    """Long prompts at once, greedy and sampled with every filter."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, VOCAB, (SEQUENCES, 3000), generator=generator).tolist()
    params = [
        SamplingParams(
            temperature=float(i % 2),
            top_p=0.9,
            top_k=1000,
            repetition_penalty=1.1,
            seed=i,
            max_tokens=40,
            ignore_eos=True,
            prompt_logprobs=5 if i == 0 else None,
            logprobs=20,
        )
        for i in range(SEQUENCES)
    ]
    outputs = LLM.from_engine(made).generate(prompts, params, progress=False)
    return [list(o.token_ids) for o in outputs]


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_the_share_is_used_and_kept(models: Models, eager: bool):
    memory = CudaMemory(torch.device("cuda"))
    limit = int(SHARE * memory.total())
    made = engine(models, enforce_eager=eager)
    block = sum(region.bytes_per_block for region in runner_of(made).kv_regions())
    # Most of the share is KV: nothing else of this pair is large.
    assert made.pool.num_blocks * block > 0.5 * limit
    assert made.max_model_len == LENGTH
    answers(made)
    memory.settle()
    assert memory.total() - memory.free() <= limit


def test_the_measured_engine_answers_as_another(models: Models):
    settings = {"enforce_eager": True, "lag": 0}
    measured = answers(engine(models, **settings))
    assert measured == answers(engine(models, num_kv_blocks=16 * 25, **settings))


def test_a_share_that_is_too_small_is_refused(models: Models):
    memory = CudaMemory(torch.device("cuda"))
    # The smallest share that may be asked for is more than this pair needs.
    held = torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
    used = (memory.total() - memory.free()) / memory.total()
    with pytest.raises(CapacityError, match="does not fit the GPU") as refused:
        engine(models, gpu_memory_utilization=used + 0.001, max_model_len=LENGTH)
    assert "activations" in str(refused.value) and "left for KV" in str(refused.value)
    # What is advised is enough.
    share = float(str(refused.value).split("gpu_memory_utilization: ")[1].split()[0])
    engine(models, gpu_memory_utilization=share + 0.001, max_model_len=LENGTH)
    del held


def test_no_graph_is_captured_beyond_its_room(models: Models):
    made = engine(models, num_kv_blocks=16 * 25)
    expected = answers(made)
    assert len(runner_of(made).decode.graphs) > 2
    tight = engine(models, num_kv_blocks=16 * 25)
    runner_of(tight).decode.graphs.max_bytes = 1
    assert answers(tight) == expected
    assert len(runner_of(tight).decode.graphs) < len(runner_of(made).decode.graphs)
    assert runner_of(tight).decode.graphs.num_refused > 0
