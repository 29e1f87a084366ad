"""Engine: submit, abort, step, close. Synchronous, no threads; whoever owns it drives it."""

import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer

from eaglerun.checkpoint.budget import KVBudget, MemoryUse, format_use, graph_outputs, size_kv
from eaglerun.config import CPU_KV_GIB, Config
from eaglerun.errors import ConfigError, RequestError
from eaglerun.kernels.compiling import watching_compiler
from eaglerun.loader import (
    Models,
    cache_dtypes,
    check_invariant,
    kv_budget_of,
    load_models,
    narrowest_kv,
)
from eaglerun.memory import CudaMemory, DeviceMemory, measure, rehearsing, weights_of
from eaglerun.messages import Event, Request
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.pending import AuxRows, PendingStep
from eaglerun.plan.blocks import BlockPool
from eaglerun.plan.draft_length import DraftLengthPolicy, FixedDraftLength
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.scheduler import Scheduler
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import STEP_TIMEOUT_S, StepPlan, StepResult
from eaglerun.plan.text import TextStream
from eaglerun.progress import counter
from eaglerun.runner import MAX_CAPTURED_ROWS, Runner, RunnerOptions
from eaglerun.sampling import MAX_LOGIT_BIAS, MAX_STOP_IDS
from eaglerun.speculative.verify import synthetic_rates
from eaglerun.stats import AcceptanceLog, EngineStats

log = logging.getLogger("eaglerun")

# Decode batch sizes that are captured as graphs, as far as max_num_seqs needs them.
CAPTURED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


class Engine:
    """One engine: a scheduler, a runner, and the steps between them.

    ``lag`` steps are launched before the oldest is committed; lag 0 is the reference for lag 1.
    """

    def __init__(
        self,
        config: Config,
        models: Models,
        policy: DraftLengthPolicy | None = None,
        memory: DeviceMemory | None = None,
        progress: bool | None = False,
    ) -> None:
        """``memory`` is the device's, from which the KV blocks are sized; None: that of the GPU,
        and on a CPU none. ``progress``: whether lines are drawn while kernels are compiled and
        graphs captured; None: where standard error is a terminal.

        Raises  ConfigError on settings that exclude one another, CapacityError where the GPU has
        no room for them.
        """
        target = models.target
        draft = models.draft if config.speculation.num_draft_tokens else None
        self.config = config
        self.model_name = models.name
        self.tokenizer: Tokenizer | None = models.tokenizer
        self.path = models.path
        self.vocab_size = target.spec.vocab_size
        self.eos_token_ids = models.eos_token_ids
        self.num_draft_tokens = config.speculation.num_draft_tokens if draft else 0
        if config.output.return_aux_hidden_states and not target.taps:
            raise ConfigError("return_aux_hidden_states: no layer is tapped; name aux_layers")
        scheduling = config.scheduling
        device, dtype = target.embed_tokens.weight.device, target.embed_tokens.weight.dtype
        check_invariant(config, target.spec, device, dtype)
        on_gpu = device.type == "cuda"
        if memory is None and on_gpu:
            memory = CudaMemory(device)
        draft_spec = None if draft is None else draft.spec
        kv = kv_budget_of(config, target.spec, draft_spec, dtype)
        options = self._runner_options(target, kv.block_size, on_gpu)
        use = None
        if memory is not None and not config.cache.sized:
            with (
                counter(progress, "compiling", "kernels") as line,
                watching_compiler(lambda name: _compiled(line, name)),
            ):
                use = _measured(config, memory, target, draft, options)
            least = narrowest_kv(config, target.spec, draft_spec, dtype)
            num_blocks = size_kv(use, kv, config.model.max_model_len, least)
        else:
            num_blocks = _num_blocks(config, kv)
        self.max_model_len = _max_model_len(config, target, num_blocks * kv.block_size)
        self.pool = BlockPool(num_blocks, kv.block_size)
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=scheduling.max_num_seqs,
                max_num_batched_tokens=scheduling.max_num_batched_tokens,
                max_chunk_tokens=scheduling.max_chunk_tokens or scheduling.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                num_draft_tokens=self.num_draft_tokens,
                has_draft=draft is not None,
                prefix_caching=config.cache.enable_prefix_caching
                and not config.output.return_aux_hidden_states,
                eos_token_ids=models.eos_token_ids,
            ),
            self.pool,
            policy or FixedDraftLength(self.num_draft_tokens),
        )
        self.runner = Runner(
            target,
            draft,
            replace(
                options,
                num_blocks=num_blocks,
                max_model_len=self.max_model_len,
                graph_bytes=None if use is None else use.graphs,
            ),
            progress,
        )
        if use is not None:
            lines = "\n".join(format_use(use))
            log.info("memory:\n%s\n  %d blocks of %d", lines, num_blocks, kv.block_size)
        self._lag = int(on_gpu) if scheduling.lag is None else scheduling.lag
        self._pending: deque[PendingStep] = deque()
        self._arrivals = 0
        self._seeds = random.Random(config.model.seed)
        self._acceptance_log = AcceptanceLog(config.output.log_stats_every, time.monotonic())
        # Hidden states by (request_id, index), with return_aux_hidden_states; whoever asked for
        # them takes them out.
        self.aux: dict[tuple[str, int], list[AuxRows]] = {}
        # Sees every committed step; for measurements.
        self.observer: Callable[[StepPlan, StepResult], None] | None = None

    def _runner_options(self, target: MiniMaxM3, block_size: int, on_gpu: bool) -> RunnerOptions:
        """As for the longest sequence that may be asked for and a single KV block."""
        config, scheduling = self.config, self.config.scheduling
        rows_per_seq = self.num_draft_tokens + 1
        sizes = scheduling.decode_batch_sizes
        if on_gpu and not sizes:
            sizes = tuple(n for n in CAPTURED_SIZES if n < scheduling.max_num_seqs)
            sizes += (scheduling.max_num_seqs,)
        widest = max((scheduling.max_num_seqs, *sizes)) * rows_per_seq
        length = config.synthetic_length
        kv_dtype, index_dtype = cache_dtypes(config, target.embed_tokens.weight.dtype)
        return RunnerOptions(
            num_slots=scheduling.max_num_seqs,
            num_blocks=1,
            block_size=block_size,
            kv_dtype=kv_dtype,
            index_dtype=index_dtype,
            max_model_len=_longest(config, target),
            max_rows=max(scheduling.max_num_batched_tokens, widest),
            num_draft_tokens=self.num_draft_tokens,
            eos_token_ids=self.eos_token_ids,
            rejection=config.speculation.verification == "rejection",
            probabilistic_drafts=config.speculation.draft_sampling == "probabilistic",
            synthetic=() if length is None else synthetic_rates(length, self.num_draft_tokens),
            processed_logprobs=config.output.logprobs_mode == "processed",
            decode_batch_sizes=sizes,
            capture=not scheduling.enforce_eager,
            overlap_kernels=scheduling.overlap_kernels,
            batch_invariant=scheduling.batch_invariant,
            graph_bytes=None,
            scripted_drafts=config.speculation.scripted == "drafts",
            scripted_tokens=config.speculation.scripted == "tokens",
            keep_aux=config.output.return_aux_hidden_states,
        )

    @classmethod
    def from_config(
        cls, config: Config, policy: DraftLengthPolicy | None = None, progress: bool | None = False
    ) -> "Engine":
        """Load the checkpoints that ``config`` names (ConfigError, CheckpointError) and start."""
        return cls(config, load_models(config, progress), policy, progress=progress)

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running sequences hold."""
        return self.pool.num_held / self.pool.num_blocks

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError if it can never run; nothing is queued then."""
        self.check(request)
        sampling = request.sampling
        seed = sampling.seed
        if seed is None:
            seed = self._seeds.getrandbits(62)
        leader: Sequence | None = None
        for index in range(sampling.n):
            text = None
            if self.tokenizer is not None:
                text = TextStream(
                    self.tokenizer,
                    sampling.stop,
                    sampling.include_stop_str_in_output,
                    sampling.skip_special_tokens,
                )
            seq = Sequence(request, index, _wrap(seed + index), self._arrivals, text)
            if self.scheduler.limits.prefix_caching:
                seq.leader = leader
            leader = leader or seq
            self.scheduler.add(seq)
        self._arrivals += 1

    def abort(self, request_id: str) -> bool:
        """End a request; its Finished events come with the next step. Whether it was open."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Event]:
        """Plan and launch one step, commit what is due, and return what became final.

        [] when there is nothing to do. Errors of the models or of the bookkeeping are the
        caller's to turn into close().
        """
        plan = self.scheduler.plan()
        if plan is not None:
            self._pending.append(self.runner.launch(plan))
        events: list[Event] = []
        if self._pending and (plan is None or len(self._pending) > self._lag):
            events += self._commit(self._pending.popleft())
        events += self.scheduler.take_events()
        return events

    def close(self, message: str = "the engine was shut down") -> list[Event]:
        """Fail every open request and forget the steps in flight."""
        self._pending.clear()
        return self.scheduler.fail_all(message)

    def _commit(self, pending: PendingStep) -> list[Event]:
        result = pending.result(STEP_TIMEOUT_S)
        if self.config.output.return_aux_hidden_states:
            slots = self.scheduler.oldest_slots()
            for rows in pending.aux:
                seq = slots[rows.slot_id]
                self.aux.setdefault((seq.request.request_id, seq.index), []).append(rows)
        events = self.scheduler.commit(result)
        self.stats.target_ms += result.times.target_ms
        self.stats.draft_ms += result.times.draft_ms
        self.stats.step_ms += result.times.total_ms
        if self.observer is not None:
            self.observer(pending.plan, result)
        line = self._acceptance_log.line(self.stats.acceptance.stats(), time.monotonic())
        if line is not None:
            log.info(line)
        return events

    def check(self, request: Request) -> None:
        """RequestError if the request can never run here."""
        sampling, prompt = request.sampling, request.prompt_ids
        if not prompt:
            raise RequestError("prompt", "is empty")
        if any(type(token) is not int for token in prompt):
            raise RequestError("prompt", "holds something that is not a token id")
        try:
            request.cache_salt.encode()
        except UnicodeEncodeError:
            raise RequestError("cache_salt", f"{request.cache_salt!r} is not text") from None
        worst = max(prompt)
        if worst >= self.vocab_size or min(prompt) < 0:
            bad = worst if worst >= self.vocab_size else min(prompt)
            raise RequestError("prompt", f"token id {bad} is not in [0, {self.vocab_size})")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"{len(prompt)} tokens leave no room for an answer: the model's length is "
                f"{self.max_model_len}",
            )
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop", "stop strings need a tokenizer, and the model has none")
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", tuple(sampling.logit_bias)),
        ):
            for token in ids:
                if token >= self.vocab_size:
                    raise RequestError(name, f"{token} is not in [0, {self.vocab_size})")
        if len(sampling.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(
                "stop_token_ids", f"{len(sampling.stop_token_ids)} given, allowed {MAX_STOP_IDS}"
            )
        if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                "logit_bias", f"{len(sampling.logit_bias)} given, allowed {MAX_LOGIT_BIAS}"
            )
        for name, count in (
            ("logprobs", sampling.logprobs),
            ("prompt_logprobs", sampling.prompt_logprobs),
        ):
            if count is not None and count > self.vocab_size:
                raise RequestError(name, f"{count} exceeds the vocabulary, {self.vocab_size}")
        if self.scheduler.is_open(request.request_id):
            raise RequestError("request_id", f"{request.request_id!r} is already running")


def _wrap(seed: int) -> int:
    """A seed as a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63


def _compiled(line: Any, name: str) -> None:
    """Count one more kernel in the line, and name it."""
    line.set_postfix_str(name, refresh=False)
    line.update()


def _measured(
    config: Config,
    memory: DeviceMemory,
    target: MiniMaxM3,
    draft: Eagle3Llama | None,
    options: RunnerOptions,
) -> MemoryUse:
    """What everything but the KV blocks takes, graphs as far as they are captured at all."""
    spec, scheduling = target.spec, config.scheduling
    outputs = 0
    if options.capture and options.decode_batch_sizes:
        # The target's logits in its dtype and accept's in float32, for every number of drafts and
        # each of the runner's bounds of a row's keys.
        bounds = 1 + (options.max_model_len > spec.sparse_topk_blocks * spec.sparse_block_size)
        logits = spec.vocab_size * (target.embed_tokens.weight.itemsize + 4)
        for rows in range(1, options.num_draft_tokens + 2):
            sizes = options.decode_batch_sizes
            outputs += bounds * graph_outputs(sizes, rows, MAX_CAPTURED_ROWS, logits)
    return measure(
        memory,
        config.cache.gpu_memory_utilization,
        weights_of(target, draft),
        lambda: Runner(target, draft, rehearsing(options)),
        scheduling.max_num_batched_tokens,
        scheduling.max_chunk_tokens or scheduling.max_num_batched_tokens,
        outputs,
    )


def _num_blocks(config: Config, kv: KVBudget) -> int:
    """KV blocks by the settings alone."""
    cache = config.cache
    if cache.num_kv_blocks is not None:
        return cache.num_kv_blocks
    size = cache.kv_cache_gib or CPU_KV_GIB
    blocks = kv.num_blocks(int(size * 2**30))
    if blocks < 1:
        raise ConfigError(f"kv_cache_gib = {size}: one KV block needs {kv.block_bytes} bytes")
    return blocks


def _longest(config: Config, target: MiniMaxM3) -> int:
    """The longest sequence that is asked for, or else that the checkpoint allows."""
    wish, limit = config.model.max_model_len, target.spec.max_position_embeddings
    if wish is not None and wish > limit:
        raise ConfigError(f"max_model_len = {wish}: the checkpoint allows at most {limit}")
    return wish or limit


def _max_model_len(config: Config, target: MiniMaxM3, kv_tokens: int) -> int:
    """The longest sequence; one of that length must always fit the KV memory alone."""
    wish = config.model.max_model_len
    if wish is not None and wish > kv_tokens:
        raise ConfigError(
            f"max_model_len = {wish}: the KV memory holds {kv_tokens} tokens; lower max_model_len "
            "or raise num_kv_blocks or kv_cache_gib"
        )
    return min(_longest(config, target), kv_tokens)
