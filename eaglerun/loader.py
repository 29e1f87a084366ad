"""From a Config to two models in memory: which checkpoints, checked, then loaded or made up."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from eaglerun import configs
from eaglerun.checkpoint.budget import (
    KVBudget,
    draft_components,
    kv_budget,
    refusal,
    size_kv,
    target_components,
)
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_checkpoint_config
from eaglerun.checkpoint.table import check_ranks
from eaglerun.checkpoint.target import TargetSpec, check_block_size
from eaglerun.checkpoint.weights import UNDIVIDED, draft_weights, target_weights
from eaglerun.config import Config
from eaglerun.errors import CapacityError, ConfigError
from eaglerun.kernels.launch import TABLE, can_be_invariant, has_kernels
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.loading import fill_dummy, load_draft, load_target, resolve_checkpoint
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.text import read_tokenizer
from eaglerun.run.memory import CudaMemory, DeviceMemory, before_loading
from eaglerun.threads import use_threads

DEMO = Path(next(iter(configs.__path__))) / "demo"


@dataclass(frozen=True, slots=True)
class Models:
    """What an engine needs of the checkpoints. ``path``: the target's directory, if any."""

    name: str
    target: MiniMaxM3
    draft: Eagle3Llama | None
    eos_token_ids: tuple[int, ...]
    tokenizer: Tokenizer | None = None
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The two checkpoints of a Config, parsed and checked against each other; nothing loaded."""

    name: str
    target_path: Path
    target: TargetSpec
    draft_path: Path | None
    draft: DraftSpec | None


def read_checkpoints(config: Config) -> Checkpoints:
    """Find and check the checkpoints. ConfigError before any weight is read."""
    model = config.model
    target_path = _find(model.model, "target")
    overrides = {
        "use_index_cache": model.use_index_cache,
        "index_topk_freq": model.index_topk_freq,
        "index_skip_topk_offset": model.index_skip_topk_offset,
        "index_topk_pattern": model.index_topk_pattern,
    }
    target = TargetSpec.from_config(
        read_checkpoint_config(target_path), overrides if model.use_index_cache else None
    )
    if config.cache.block_size is not None:
        check_block_size(target, config.cache.block_size)
    draft_path = None
    draft = None
    if config.num_draft_tokens and model.draft is not None:
        draft_path = _find(model.draft, "draft")
        draft = DraftSpec.from_config(read_checkpoint_config(draft_path), target)
    tables = [target_weights(target)]
    if draft is not None:
        tables.append(draft_weights(draft, UNDIVIDED.whole_embedding))
    check_ranks(model.tensor_parallel_size, *tables)
    name = model.served_model_name or model.model
    return Checkpoints(name, target_path, target, draft_path, draft)


def load_models(config: Config, progress: bool | None = False) -> Models:
    """Both models on their device. ConfigError, CheckpointError, each naming what is wrong;
    CapacityError where the GPU cannot hold them. ``progress``: whether bars are drawn."""
    config.check_one_rank()
    found = read_checkpoints(config)
    device = choose_device(config.model.device)
    check_device(device)
    dtype = choose_dtype(config.model.dtype, found.target.dtype, device)
    taps = config.output.aux_layers if found.draft is None else found.draft.taps
    limit = config.model.max_model_len
    check_invariant(config, found.target, device, dtype)
    if device.type == "cuda":
        refuse_what_cannot_fit(config, found, dtype, CudaMemory(device))
    else:
        refuse_what_memory_cannot_hold(config, found, dtype)
    # Before the weights, which take long.
    tokenizer_file = found.target_path / "tokenizer.json"
    tokenizer = read_tokenizer(tokenizer_file) if tokenizer_file.exists() else None
    target = MiniMaxM3(found.target, taps, device=device, dtype=dtype, max_positions=limit)
    draft = None
    if found.draft is not None:
        draft = Eagle3Llama(found.draft, device=device, dtype=dtype, max_positions=limit)
    if device.type == "cpu":
        use_threads(config.model.cpu_threads, [m for m in (target, draft) if m is not None])
    if config.model.load_format == "dummy":
        fill_dummy(target, config.model.seed)
        if draft is not None:
            fill_dummy(draft, config.model.seed + 1)
    else:
        load_target(target, found.target_path, found.target, progress)
        if draft is not None and found.draft is not None and found.draft_path is not None:
            load_draft(draft, found.draft_path, found.draft, target, progress, found.target_path)
    return Models(
        name=found.name,
        target=target,
        draft=draft,
        eos_token_ids=found.target.eos_token_ids,
        tokenizer=tokenizer,
        path=found.target_path,
    )


def check_invariant(
    config: Config, target: TargetSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """ConfigError where batch_invariant is asked for and cannot be had."""
    if not config.scheduling.batch_invariant:
        return
    if not can_be_invariant(device, dtype):
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"batch_invariant = True: {name} on {where}; allowed bfloat16 on a Hopper GPU"
        )
    block = target.sparse_block_size
    ratio = target.num_attention_heads // target.num_key_value_heads
    selected = target.sparse_topk_blocks * block
    # What a layer's dense and selected attention agree for.
    for what, found, allowed, fits in (
        ("sparse_block_size", block, "64, 128, 256", block in (64, 128, 256)),
        ("selected keys", selected, "at most 8192", selected <= 8192),
        ("query heads of a KV head", ratio, "at most 64", ratio <= 64),
    ):
        if any(target.sparse_layers) and not fits:
            raise ConfigError(f"batch_invariant = True: {what} {found}; allowed {allowed}")


def refuse_what_cannot_fit(
    config: Config, found: Checkpoints, dtype: torch.dtype, memory: DeviceMemory
) -> None:
    """CapacityError before weights are read that leave no room for one sequence, or for the KV
    blocks that were asked for.

    What is left out can only make it worse: the draft's embedding and head, which may turn out
    to be the target's, and all that a step needs.
    """
    name, cache = str(dtype).removeprefix("torch."), config.cache
    parts = list(target_components(found.target, name))
    if found.draft is not None:
        own = draft_components(found.draft, name)
        parts += [part for part in own if part.name not in ("embedding", "head")]
    weights = sum(part.num_bytes for part in parts)
    kv = kv_budget_of(config, found.target, found.draft, dtype)
    # Settings that size the KV memory may use all of the GPU.
    share = 1.0 if cache.sized else cache.gpu_memory_utilization
    use = before_loading(memory, share, weights)
    blocks = cache.num_kv_blocks
    if blocks is None and cache.kv_cache_gib is not None:
        blocks = kv.num_blocks(int(cache.kv_cache_gib * 2**30))
    if blocks is None:
        least = narrowest_kv(config, found.target, found.draft, dtype)
        size_kv(use, kv, config.model.max_model_len, least)
    elif kv.num_blocks(use.left) < blocks:
        advice = ["num_kv_blocks, kv_cache_gib: at most what is left for KV"]
        wanted = (f"{blocks:,} KV blocks", blocks * kv.block_bytes)
        raise CapacityError(refusal(f"{blocks} KV blocks do not fit the GPU:", use, advice, wanted))


def refuse_what_memory_cannot_hold(config: Config, found: Checkpoints, dtype: torch.dtype) -> None:
    """ConfigError on a CPU whose memory is smaller than the weights and tables alone."""
    name = str(dtype).removeprefix("torch.")
    parts = list(target_components(found.target, name))
    if found.draft is not None:
        own = draft_components(found.draft, name)
        parts += [part for part in own if part.name not in ("embedding", "head")]
    weights = sum(part.num_bytes for part in parts)
    positions = config.model.max_model_len or found.target.max_position_embeddings
    table = 4 * positions * found.target.rotary_dim
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if weights + table > memory:
        raise ConfigError(
            f"the models do not fit this machine: {weights / 2**30:,.1f} GiB of weights in {name} "
            f"and {table / 2**30:,.1f} GiB for {positions:,} positions; it has "
            f"{memory / 2**30:,.1f} GiB"
        )


def kv_budget_of(
    config: Config, target: TargetSpec, draft: DraftSpec | None, dtype: torch.dtype
) -> KVBudget:
    """The paged memory of the pair as the settings want it, of models in ``dtype``; of one rank,
    where several divide them."""
    kinds = (dtype, *cache_dtypes(config, dtype))
    own, kv, index = (str(kind).removeprefix("torch.") for kind in kinds)
    size = config.model.tensor_parallel_size
    return kv_budget(target, draft, config.cache.block_size, own, kv, index, size)


def narrowest_kv(
    config: Config, target: TargetSpec, draft: DraftSpec | None, dtype: torch.dtype
) -> KVBudget:
    """kv_budget_of with both caches in fp8: what a refusal may advise."""
    cache = replace(config.cache, kv_cache_dtype="fp8", index_cache_dtype="fp8")
    return kv_budget_of(replace(config, cache=cache), target, draft, dtype)


def cache_dtypes(config: Config, dtype: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """How K and V, and the indexer's keys, are held for models in ``dtype``."""
    known = {"auto": dtype, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
    return known[config.cache.kv_cache_dtype], known[config.cache.index_cache_dtype]


def _find(name: str, role: str) -> Path:
    """The directory of a checkpoint; 'demo' is the pair that comes with the package."""
    return DEMO / role if name == "demo" else resolve_checkpoint(name)


def choose_device(wish: str) -> torch.device:
    if wish == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device = 'cuda': torch finds no GPU here; allowed cpu, auto")
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wish)


def check_device(device: torch.device) -> None:
    """ConfigError on a GPU that the launch table does not know."""
    if device.type == "cuda" and not has_kernels(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(
            f"device = 'cuda': no kernels for {name}; allowed {', '.join(TABLE)}, cpu"
        )


def choose_dtype(wish: str, stored: str, device: torch.device) -> torch.dtype:
    """The type of the weights: as asked, or the checkpoint's own; float32 on a CPU, which has
    no fast bfloat16."""
    if wish == "auto":
        wish = "float32" if device.type == "cpu" else stored
    known = {
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
        "float64": torch.float64,
    }
    return known[wish]
