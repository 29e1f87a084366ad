"""Config -> Engine: read, load, rehearse, size, allocate; and warm up, for who serves at once."""

import logging

from eaglerun.checkpoint.budget import KVBudget, MemoryUse, format_use, size_kv
from eaglerun.config import CPU_KV_GIB, Config
from eaglerun.engine import Engine
from eaglerun.errors import CheckpointError, ConfigError
from eaglerun.loader import Models
from eaglerun.messages import Finished, FinishReason, Request, SamplingParams
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import DraftLengthPolicy, FixedDraftLength
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.scheduler import Scheduler
from eaglerun.ranks.local import LocalRank, first_broken
from eaglerun.ranks.rank import RankReady
from eaglerun.run.memory import DeviceMemory

log = logging.getLogger("eaglerun")

WARM_UP = Request(
    request_id="warm-up",
    prompt_ids=(0, 0),
    sampling=SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0),
    cache_salt="warm-up",
)


def start_engine(
    config: Config,
    models: Models | None = None,
    policy: DraftLengthPolicy | None = None,
    memory: DeviceMemory | None = None,
    progress: bool | None = False,
) -> Engine:
    """An engine that can be stepped.

    models, memory, progress  see LocalRank
    policy                    draft lengths; None: the configured one at every step

    Raises  ConfigError on settings that exclude one another, CheckpointError, and CapacityError
    where the GPU has no room for them.
    """
    rank = LocalRank(config, models, memory, progress)
    ready = rank.load()
    use = None if config.cache.sized else rank.rehearse()
    num_blocks = _num_blocks(config, ready, use)
    max_model_len = _max_model_len(config, ready, num_blocks * ready.kv.block_size)
    rank.allocate(num_blocks, max_model_len, None if use is None else use.graphs)
    if use is not None:
        lines = "\n".join(format_use(use))
        log.info("memory:\n%s\n  %d blocks of %d", lines, num_blocks, ready.kv.block_size)
    limits = _limits(config, ready, max_model_len)
    scheduler = Scheduler(
        limits,
        BlockPool(num_blocks, ready.kv.block_size),
        policy or FixedDraftLength(limits.num_draft_tokens),
    )
    return Engine(config, ready, scheduler, rank)


def _num_blocks(config: Config, ready: RankReady, use: MemoryUse | None) -> int:
    """KV blocks: what the rehearsal left room for, or else by the settings alone."""
    if use is not None:
        return size_kv(use, ready.kv, config.model.max_model_len, ready.least_kv)
    if config.cache.num_kv_blocks is not None:
        return config.cache.num_kv_blocks
    return _blocks_in(config.cache.kv_cache_gib or CPU_KV_GIB, ready.kv)


def _blocks_in(gib: float, kv: KVBudget) -> int:
    blocks = kv.num_blocks(int(gib * 2**30))
    if blocks < 1:
        raise ConfigError(f"kv_cache_gib = {gib}: one KV block needs {kv.block_bytes} bytes")
    return blocks


def _max_model_len(config: Config, ready: RankReady, kv_tokens: int) -> int:
    """The longest sequence; one of that length must always fit the KV memory alone."""
    wish = config.model.max_model_len
    if wish is not None and wish > kv_tokens:
        raise ConfigError(
            f"max_model_len = {wish}: the KV memory holds {kv_tokens} tokens; lower max_model_len "
            "or raise num_kv_blocks or kv_cache_gib"
        )
    return min(config.longest(ready.max_position_embeddings), kv_tokens)


def _limits(config: Config, ready: RankReady, max_model_len: int) -> SchedulerLimits:
    scheduling = config.scheduling
    return SchedulerLimits(
        max_num_seqs=scheduling.max_num_seqs,
        max_num_batched_tokens=scheduling.max_num_batched_tokens,
        max_chunk_tokens=scheduling.max_chunk_tokens or scheduling.max_num_batched_tokens,
        max_model_len=max_model_len,
        num_draft_tokens=config.speculation.num_draft_tokens if ready.has_draft else 0,
        has_draft=ready.has_draft,
        prefix_caching=config.cache.enable_prefix_caching
        and not config.output.return_aux_hidden_states,
        eos_token_ids=ready.eos_token_ids,
    )


def warm_up(engine: Engine) -> None:
    """Answer one short request, where one fits, so that the first user does not wait for what is
    compiled or allocated on first use.

    Raises  CheckpointError if its numbers are not finite.
    """
    if engine.max_model_len <= len(WARM_UP.prompt_ids):
        return
    if FinishReason.ERROR in _answer_warm_up(engine):
        part = first_broken(engine, lambda: _answer_warm_up(engine))
        where = "" if part is None else f", first in {part}"
        raise CheckpointError(
            f"{engine.model_name}: the model computes NaN or Inf{where}; "
            "another dtype may help, or the checkpoint is broken"
        )


def _answer_warm_up(engine: Engine) -> set[FinishReason]:
    """Why the answer ended."""
    engine.submit(WARM_UP)
    reasons = set()
    while engine.has_work:
        reasons |= {event.reason for event in engine.step() if isinstance(event, Finished)}
    return reasons
