"""Config -> Engine: read, load, rehearse, size, allocate; and warm up, for who serves at once."""

import logging
import time
from collections.abc import Iterator
from dataclasses import replace

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

WARM_UP_TOKENS = 8
WARM_UP = Request(
    request_id="warm-up",
    prompt_ids=(0, 0),
    sampling=SamplingParams(temperature=0.0, max_tokens=WARM_UP_TOKENS, ignore_eos=True, seed=0),
    cache_salt="warm-up",
)
# Requests whose wishes take other operations.
WARM_UP_ASKED = (
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_p=0.95, top_k=40, min_p=0.01),
    SamplingParams(
        temperature=1.0,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={0: 1.0},
        min_tokens=1,
        logprobs=5,
        prompt_logprobs=1,
    ),
)


def start_engine(
    config: Config,
    models: Models | None = None,
    policy: DraftLengthPolicy | None = None,
    memory: DeviceMemory | None = None,
    progress: bool | None = False,
    served: bool = False,
) -> Engine:
    """An engine that can be stepped.

    models, memory, progress, served  see LocalRank
    policy                    draft lengths; None: the configured one at every step

    Raises  ConfigError on settings that exclude one another, CheckpointError, and CapacityError
    where the GPU has no room for them.
    """
    rank = LocalRank(config, models, memory, progress, served)
    ready = rank.load()
    use = None if config.cache.sized else rank.rehearse()
    num_blocks = _num_blocks(config, ready, use)
    max_model_len = _max_model_len(config, ready, num_blocks * ready.kv.block_size)
    rank.allocate(num_blocks, max_model_len, None if use is None else use.graphs)
    if use is not None:
        lines = "\n".join(format_use(use))
        log.info("memory:\n%s\n  %d blocks of %d", lines, num_blocks, ready.kv.block_size)
    rank.prepare()
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
        max_itl_ms=scheduling.max_itl_ms,
    )


def warm_up(engine: Engine) -> None:
    """Answer a short request, where one fits, and on a GPU, unless warmup is none, prompts of many
    lengths and requests that ask for much, so that the first user does not wait for what is loaded
    or allocated on first use.

    Raises  CheckpointError if its numbers are not finite.
    """
    if engine.max_model_len <= len(WARM_UP.prompt_ids):
        return
    if FinishReason.ERROR in _answer(engine, [WARM_UP]):
        part = first_broken(engine, lambda: _answer(engine, [WARM_UP]))
        where = "" if part is None else f", first in {part}"
        raise CheckpointError(
            f"{engine.model_name}: the model computes NaN or Inf{where}; "
            "another dtype may help, or the checkpoint is broken"
        )
    if engine.on_gpu and engine.config.scheduling.warmup != "none":
        begin = time.perf_counter()
        batches = list(_warm_ups(engine))
        for requests in batches:
            _answer(engine, requests)
        log.info("warm-up: %d batches in %.1f s", len(batches), time.perf_counter() - begin)


def _warm_ups(engine: Engine) -> Iterator[list[Request]]:
    """Requests that are answered together, batch after batch."""
    scheduling = engine.config.scheduling
    longest = engine.max_model_len - WARM_UP_TOKENS
    rows = min(scheduling.max_num_batched_tokens, longest)
    # The library's products are other kernels for other numbers of rows.
    lengths = [n for n in (1 << i for i in range(rows.bit_length())) if n < rows] + [rows]
    for length in lengths:
        yield [_warm_up(f"of {length}", length, WARM_UP.sampling)]
    # Several prompts that end in one step, and then a batch of decode rows.
    several = min(scheduling.max_num_seqs, 8)
    yield [_warm_up(f"{i} of several", rows // several, WARM_UP.sampling) for i in range(several)]
    for i, asked in enumerate(WARM_UP_ASKED):
        sampling = replace(asked, max_tokens=WARM_UP_TOKENS, ignore_eos=True, seed=0)
        yield [_warm_up(f"{i} of what is asked", min(longest, 16), sampling)]


def _warm_up(name: str, length: int, sampling: SamplingParams) -> Request:
    """A request that shares no cached prompt with another."""
    return Request(f"warm-up {name}", (0,) * max(length, 1), sampling, cache_salt=f"warm-up {name}")


def _answer(engine: Engine, requests: list[Request]) -> set[FinishReason]:
    """Why the answers ended."""
    for request in requests:
        engine.submit(request)
    reasons = set()
    while engine.has_work:
        reasons |= {event.reason for event in engine.step() if isinstance(event, Finished)}
    return reasons
