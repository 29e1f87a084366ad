"""The target against transformers' own MiniMax-M3, fp32, through the engine.

Each case is a random model saved by transformers, loaded by our loader and run by the engine with
chunked prefill and cached decode over shuffled blocks: every tap, the logits and 64 greedy tokens.
Contexts span 40 blocks and more, far beyond the top-k, so that the selection decides.
"""

import inspect
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
)

from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.llm import LLM
from eaglerun.loader import Models
from eaglerun.messages import SamplingParams
from eaglerun.models import minimax_m3
from eaglerun.models.loading import load_target
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine

SCALE = int(os.environ.get("EAGLERUN_TEST_CASES", "1"))
CPU = torch.device("cpu")
NUM_GREEDY = 64
# transformers 5.24 renamed the cache's parameter.
FORWARD = inspect.signature(MiniMaxM3VLForCausalLM.forward).parameters
CACHE_NAME = "cache" if "cache" in FORWARD else "past_key_values"
TOLERANCE = 1e-4
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


@dataclass(frozen=True)
class Case:
    """What varies. ``layout``: text or vl, the two forms in which transformers saves."""

    heads: int
    groups: int
    head_dim: int
    rotary: float
    block: int
    topk: int
    local: int
    experts: int
    experts_per_tok: int
    layers: str  # one letter a layer: d dense and full, s sparse and MoE, m sparse and dense
    layout: str
    chunk: int


CASES = [
    Case(4, 1, 16, 0.5, 4, 3, 1, 8, 2, "dsss", "vl", 37),
    Case(4, 2, 16, 0.5, 4, 2, 1, 8, 4, "ddss", "text", 16),
    Case(4, 4, 8, 0.5, 4, 4, 2, 5, 1, "dss", "vl", 7),
    Case(8, 2, 8, 1.0, 4, 3, 3, 6, 3, "dsm", "text", 64),
    Case(6, 3, 16, 0.25, 5, 3, 1, 4, 4, "dsds", "vl", 23),
    Case(8, 8, 8, 0.5, 4, 4, 1, 16, 4, "ddsss", "text", 200),
    Case(2, 1, 32, 0.5, 8, 2, 1, 8, 2, "dss", "vl", 41),
    Case(16, 4, 8, 0.5, 4, 3, 2, 8, 2, "ss", "text", 1000),
    Case(4, 2, 32, 0.5, 4, 1, 1, 8, 2, "dss", "vl", 31),
]
KINDS = {
    "d": ("dense", "full_attention"),
    "s": ("sparse", "minimax_m3_sparse"),
    "m": ("dense", "minimax_m3_sparse"),
}


def text_config(case: Case) -> dict[str, object]:
    return {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": len(case.layers),
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.groups,
        "head_dim": case.head_dim,
        "intermediate_size": 24,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 40,
        "num_local_experts": case.experts,
        "num_experts_per_tok": case.experts_per_tok,
        "routed_scaling_factor": 2.0,
        "mlp_layer_types": [KINDS[kind][0] for kind in case.layers],
        "layer_types": [KINDS[kind][1] for kind in case.layers],
        "index_n_heads": case.groups,
        "index_head_dim": 16,
        "index_block_size": case.block,
        "index_topk_blocks": case.topk,
        "index_local_blocks": case.local,
        "rotary_dim": int(case.head_dim * case.rotary),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": case.rotary,
        },
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def golden(case: Case, seed: int, folder: Path) -> MiniMaxM3VLForCausalLM:
    """transformers' model with random weights, norms and routing bias away from their neutral
    values; saved in the case's layout."""
    torch.manual_seed(seed)
    settings = text_config(case)
    text = MiniMaxM3VLForCausalLM._from_config(
        MiniMaxM3VLTextConfig(**settings), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, tensor in text.state_dict().items():
            if "norm" in name:
                tensor.normal_(0, 0.2)
            elif "e_score_correction_bias" in name:
                tensor.normal_(0, 0.3)
            elif "embed" in name:
                tensor.normal_()
            else:
                tensor.normal_(0, 1.5 * tensor.shape[-1] ** -0.5)
    if case.layout == "text":
        text.save_pretrained(folder)
    else:
        config = MiniMaxM3VLConfig(text_config=settings, vision_config=VISION)
        vl = MiniMaxM3SparseForConditionalGeneration(config)
        state = text.state_dict()
        for name, tensor in vl.state_dict().items():
            if name.startswith(("model.language_model.", "lm_head.")):
                tensor.copy_(state[name.replace("language_model.", "")])
        vl.save_pretrained(folder, max_shard_size="50KB")
    return text


@torch.inference_mode()
def golden_greedy(model: MiniMaxM3VLForCausalLM, prompt: list[int]) -> list[int]:
    """64 greedy tokens by transformers' own cached decode."""
    cache = {CACHE_NAME: DynamicCache(config=model.config)}
    ids = torch.tensor([prompt])
    tokens: list[int] = []
    for _ in range(NUM_GREEDY):
        logits = model(ids, use_cache=True, **cache).logits[0, -1]
        tokens.append(int(logits.argmax()))
        ids = torch.tensor([tokens[-1:]])
    return tokens


def our_engine(
    folder: Path, case: Case, num_layers: int, overrides: dict[str, object] | None = None
) -> Engine:
    spec = TargetSpec.from_config(read_checkpoint_config(folder), overrides)
    taps = tuple(range(num_layers + 1))
    target = MiniMaxM3(spec, taps, device=CPU, dtype=torch.float32)
    load_target(target, folder, spec)
    config = resolve(
        {
            "model": str(folder),
            "max_model_len": 600,
            "num_kv_blocks": 700 // case.block,
            "max_num_seqs": 4,
            "max_num_batched_tokens": max(case.chunk, 8),
            "max_chunk_tokens": case.chunk,
            "return_aux_hidden_states": True,
            "log_stats_every": 0,
        },
        environ={},
    )
    engine = start_engine(config, Models("golden", target, None, (2,)))
    # Blocks handed out in no order, as in an engine that has run for a while.
    order = torch.randperm(engine.pool.num_blocks, generator=torch.Generator().manual_seed(0))
    taken = engine.pool.allocate(engine.pool.num_blocks)
    engine.pool.release([taken[i] for i in order])
    return engine


def is_stable(model: MiniMaxM3VLForCausalLM, ids: Tensor, seed: int) -> bool:
    """Whether transformers' own hidden states move smoothly with their input.

    A router or block score within rounding of a tie makes them jump, and then no two float32
    programs agree; such a prompt tests nothing. Ours has no say in this.
    """
    states = torch.stack(model(ids, output_hidden_states=True, use_cache=False).hidden_states)
    generator = torch.Generator().manual_seed(seed)
    embeds = model.model.embed_tokens(ids)
    for _ in range(8):
        moved = embeds * (1 + 1e-5 * torch.randn(embeds.shape, generator=generator))
        other = model(inputs_embeds=moved, output_hidden_states=True, use_cache=False)
        if (torch.stack(other.hidden_states) - states).abs().max() > 1e-2:
            return False
    return True


def stable_prompt(
    model: MiniMaxM3VLForCausalLM, length: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """A random prompt whose greedy continuation is far from every tie, and that continuation."""
    for seed in range(40):
        prompt = torch.randint(3, 97, (length,), generator=generator).tolist()
        tokens = golden_greedy(model, prompt)
        if is_stable(model, torch.tensor([[*prompt, *tokens[:-1]]]), seed):
            return prompt, tokens
    raise AssertionError("no stable prompt in 40")


@torch.inference_mode()
def compare(case: Case, seed: int, folder: Path) -> None:
    model = golden(case, seed, folder)
    layers = len(case.layers)
    engine = our_engine(folder, case, layers)
    generator = torch.Generator().manual_seed(seed)
    lengths = (40 * case.block + 11, 3 * case.block + 1)
    pairs = [stable_prompt(model, n, generator) for n in lengths]
    params = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)
    prompts = [prompt for prompt, _ in pairs]
    outputs = LLM.from_engine(engine).generate(prompts, params, progress=False)
    target = runner_of(engine).target
    for (prompt, expected), out in zip(pairs, outputs, strict=True):
        ids = torch.tensor([[*prompt, *expected[:-1]]])
        assert list(out.token_ids) == expected
        whole = model(ids, output_hidden_states=True, use_cache=False)
        assert out.aux_hidden_states is not None
        for tap in range(layers):
            close(out.aux_hidden_states[tap], whole.hidden_states[tap][0], f"tap {tap}")
        ours = target.norm(out.aux_hidden_states[layers])
        close(ours, whole.hidden_states[layers][0], "final norm")
        close(target.logits(ours), whole.logits[0], "logits")


def close(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Within 1e-4, absolute for values of about one and relative for larger ones."""
    distance = (ours - theirs).abs() / theirs.abs().clamp(min=1)
    assert distance.max() < TOLERANCE, f"{what}: {distance.max():.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.heads}x{c.groups}-{c.layers}-{c.layout}")
@pytest.mark.parametrize("seed", range(SCALE))
def test_taps_logits_and_greedy_tokens(case: Case, seed: int, tmp_path: Path):
    compare(case, seed, tmp_path)


@torch.inference_mode()
def test_the_selection_matters(tmp_path: Path):
    """With every block selected the outputs differ: the cases above do exercise the indexer."""
    case = CASES[0]
    golden(case, 0, tmp_path)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 97, (40 * case.block,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1)
    states = []
    for topk in (case.topk, 1000):
        engine = our_engine(tmp_path, case, len(case.layers))
        for layer in runner_of(engine).target.layers:
            if layer.self_attn.sparse:
                layer.self_attn.selector.topk = topk
        out = LLM.from_engine(engine).generate([prompt], params, progress=False)[0]
        assert out.aux_hidden_states is not None
        states.append(out.aux_hidden_states[-1])
    assert (states[0] - states[1]).abs().max() > 0.1


@torch.inference_mode()
def test_shared_selections_are_computed_once_per_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cross-layer index sharing: layers that share compute no score and keep no index keys."""
    case = replace(CASES[0], layers="dssss")
    golden(case, 0, tmp_path)
    calls: list[int] = []
    real = minimax_m3.index_topk
    monkeypatch.setattr(minimax_m3, "index_topk", lambda *args: (calls.append(1), real(*args))[1])
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 97, (40 * case.block,), generator=generator).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=1)
    for freq, computing in ((1, 4), (2, 2), (4, 1)):
        overrides = {"use_index_cache": True, "index_topk_freq": freq}
        engine = our_engine(tmp_path, replace(case, chunk=1000), 5, overrides)
        kept = [kv.index_k is not None for kv in runner_of(engine).target_kv.layers]
        assert sum(kept) == computing
        calls.clear()
        LLM.from_engine(engine).generate([prompt], params, progress=False)
        assert len(calls) == computing
