"""LocalRank: the one rank of an engine, in the engine's own process."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.budget import MemoryUse, graph_outputs
from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError, EngineError
from eaglerun.kernels.compiling import compiles, watching_compiler
from eaglerun.kernels.launch import arch_of
from eaglerun.loader import (
    Models,
    cache_dtypes,
    check_device,
    check_invariant,
    choose_device,
    choose_dtype,
    kv_budget_of,
    load_models,
    narrowest_kv,
    read_checkpoints,
)
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import StepPlan
from eaglerun.progress import counter, steps_bar, tick
from eaglerun.ranks.kernels import Compiling, KernelCache, load_all
from eaglerun.ranks.rank import RankReady
from eaglerun.run.decode import MAX_CAPTURED_ROWS
from eaglerun.run.memory import CudaMemory, DeviceMemory, measure, rehearsing, weights_of
from eaglerun.run.options import RunnerOptions
from eaglerun.run.pending import PendingStep
from eaglerun.run.programs import Launched
from eaglerun.run.runner import Runner
from eaglerun.speculative.verify import synthetic_rates
from eaglerun.stats import Builds

log = logging.getLogger("eaglerun")

# Decode batch sizes that are captured as graphs, as far as max_num_seqs needs them.
CAPTURED_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The models; ``draft`` only where drafts are wanted. ``options``: with one KV block."""

    target: MiniMaxM3
    draft: Eagle3Llama | None
    options: RunnerOptions
    memory: DeviceMemory | None


class LocalRank:
    """See Rank.

    models    already in memory; None: load() reads those that the config names
    served    whether clients will wait for its steps: then, on a GPU, the config's warmup is made
              before the first, and what is missed while there is nothing to do. Otherwise a step
              makes what it is the first to need
    memory    the device's, from which the KV blocks are sized; None: the GPU's, and a CPU's is not
              measured
    progress  whether lines are drawn while weights are read, kernels compiled and graphs captured;
              None: where standard error is a terminal
    """

    def __init__(
        self,
        config: Config,
        models: Models | None = None,
        memory: DeviceMemory | None = None,
        progress: bool | None = False,
        served: bool = False,
    ) -> None:
        self._served = served and config.scheduling.warmup != "none"
        self._config = config
        self._models = models
        self._memory = memory
        self._progress = progress
        self._loaded: _Loaded | None = None
        self._runner: Runner | None = None
        self._before = _kernels()
        # Kernels that others compiled for it, and what was made while there was nothing to do.
        self._ahead = self._idle = Builds()

    def load(self) -> RankReady:
        begin, compiling = time.perf_counter(), self._begin_compiling()
        try:
            ready = self._load_models()
        except BaseException:
            if compiling is not None:
                compiling.cancel()
            raise
        if compiling is not None:
            log.info("weights: %.1f s", time.perf_counter() - begin)
            self._load_kernels(compiling)
        return ready

    def _load_models(self) -> RankReady:
        config = self._config
        models = self._models or load_models(config, self._progress)
        self._models = None
        target = models.target
        draft = models.draft if config.speculation.num_draft_tokens else None
        if config.output.return_aux_hidden_states and not target.taps:
            raise ConfigError("return_aux_hidden_states: no layer is tapped; name aux_layers")
        weight = target.embed_tokens.weight
        device, dtype = weight.device, weight.dtype
        check_invariant(config, target.spec, device, dtype)
        on_gpu = device.type == "cuda"
        memory = self._memory
        if memory is None and on_gpu:
            memory = CudaMemory(device)
        specs = (target.spec, None if draft is None else draft.spec)
        kv = kv_budget_of(config, *specs, dtype)
        num_draft_tokens = config.speculation.num_draft_tokens if draft else 0
        options = options_of(
            config, target.spec, dtype, models.eos_token_ids, num_draft_tokens, on_gpu
        )
        self._loaded = _Loaded(target, draft, options, memory)
        return RankReady(
            model_name=models.name,
            path=models.path,
            tokenizer=models.tokenizer,
            vocab_size=target.spec.vocab_size,
            max_position_embeddings=target.spec.max_position_embeddings,
            eos_token_ids=models.eos_token_ids,
            has_draft=draft is not None,
            on_gpu=on_gpu,
            kv=kv,
            least_kv=narrowest_kv(config, *specs, dtype),
        )

    def rehearse(self) -> MemoryUse | None:
        loaded = self._known()
        if loaded.memory is None:
            return None
        with (
            counter(self._progress, "compiling", "kernels") as line,
            watching_compiler(lambda name: tick(line, name)),
        ):
            return _measured(self._config, loaded, loaded.memory, self._served)

    def allocate(self, num_blocks: int, max_model_len: int, graph_bytes: int | None) -> None:
        loaded = self._known()
        options = replace(
            loaded.options,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            graph_bytes=graph_bytes,
            capture_in_steps=not self._served,
        )
        self._runner = Runner(loaded.target, loaded.draft, options, self._progress)

    def prepare(self) -> None:
        if not self._served:
            return
        decode, begin = self.runner.decode, time.perf_counter()
        if decode.graphs.enabled:
            steps = list(decode.usual_steps(self._config.scheduling.warmup == "full"))
            with steps_bar(self._progress, "capturing", "steps", len(steps)) as bar:
                for step in steps:
                    if decode.graphs.full:
                        break
                    self.runner.capture(step)
                    tick(bar, f"{step.shape.batch} x {step.shape.rows} rows")
            log.info(
                "graphs: %d, of %d decode steps, captured in %.1f s, %.2f GiB",
                len(decode.graphs),
                len(steps),
                time.perf_counter() - begin,
                decode.graphs.num_bytes / 2**30,
            )

    def launch(self, plan: StepPlan) -> PendingStep:
        return self.runner.launch(plan)

    @property
    def has_missed(self) -> bool:
        return self._runner is not None and self._runner.decode.missed() is not None

    def make_missed(self) -> None:
        if (step := self.runner.decode.missed()) is None:
            return
        before = self.builds()
        self.runner.capture(step)
        self._idle = self._idle.plus(self.builds().since(before))

    def builds(self) -> Builds:
        made = _kernels().since(self._before).plus(self._ahead)
        if self._runner is None:
            return made
        graphs = self._runner.decode.graphs
        return replace(made, graphs_captured=len(graphs), capture_s=graphs.capture_s)

    def idle_builds(self) -> Builds:
        return self._idle

    def close(self) -> None:
        self._loaded = self._runner = None

    @property
    def runner(self) -> Runner:
        """Raises  EngineError before allocate() and after close()."""
        if self._runner is None:
            raise EngineError("the rank has no KV memory: it was not allocated, or was closed")
        return self._runner

    def _begin_compiling(self) -> Compiling | None:
        """Have the kernels compiled by others from now on, where they are wanted before the first
        step."""
        config, models = self._config, self._models
        if models is not None:
            weight = models.target.embed_tokens.weight
            device, dtype = weight.device, weight.dtype
        else:
            device = choose_device(config.model.device)
        if device.type != "cuda":
            return None
        check_device(device)
        cache = KernelCache.of(config)
        if not self._served:
            return None
        arch = arch_of(device)
        if models is not None:
            draft = models.draft.spec if models.draft and config.num_draft_tokens else None
            launched = launched_by(config, models.target.spec, draft, dtype, arch)
        else:
            found = read_checkpoints(config)
            dtype = choose_dtype(config.model.dtype, found.target.dtype, device)
            launched = launched_by(config, found.target, found.draft, dtype, arch)
        return Compiling(cache, launched)

    def _load_kernels(self, compiling: Compiling) -> None:
        """Wait until they are compiled, and bring them onto the device."""
        begin = time.perf_counter()
        compiled = compiling.finish(self._progress)
        done = time.perf_counter()
        if compiled.num_new:
            self._ahead = Builds(kernels_compiled=compiled.num_new, compile_s=done - begin)
        load_all(compiled.programs, self._progress)
        log.info(
            "kernels: %d, %d compiled; waited for %.1f s, loaded in %.1f s; %s holds %.0f MiB",
            len(compiled.programs),
            compiled.num_new,
            done - begin,
            time.perf_counter() - done,
            compiling.cache.directory,
            compiling.cache.num_bytes() / 2**20,
        )

    def _known(self) -> _Loaded:
        if self._loaded is None:
            raise EngineError("the rank has no models: they were not loaded, or it was closed")
        return self._loaded


def runner_of(engine: Engine) -> Runner:
    """The runner behind an engine, for measurements and tests. EngineError where its rank is not
    in this process."""
    if not isinstance(engine.rank, LocalRank):
        raise EngineError(f"a {type(engine.rank).__name__} is not in this process")
    return engine.rank.runner


def first_broken(engine: Engine, run: Callable[[], object]) -> str | None:
    """The first part of the target whose numbers are not finite while ``run`` drives the engine:
    "the embedding", "layer 0" ...; None where all are finite."""
    target = runner_of(engine).target
    found: list[str] = []

    def watch(name: str) -> Callable[[object, object, object], None]:
        def look(module: object, args: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    if not tensor.isfinite().all():
                        found.append(name)

        return look

    watched: list[tuple[str, nn.Module]] = [("the embedding", target.embed_tokens)]
    watched += [(f"layer {i}", layer) for i, layer in enumerate(target.layers)]
    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def launched_by(
    config: Config, target: TargetSpec, draft: DraftSpec | None, dtype: torch.dtype, arch: str
) -> Launched:
    """A rank with these models, as far as it decides which kernels are launched."""
    num_draft_tokens = config.speculation.num_draft_tokens if draft else 0
    options = options_of(config, target, dtype, target.eos_token_ids, num_draft_tokens, True)
    taps = config.output.aux_layers if draft is None else draft.taps
    return Launched(target, draft, tuple(taps), options, dtype, arch)


def options_of(
    config: Config,
    target: TargetSpec,
    dtype: torch.dtype,
    eos_token_ids: tuple[int, ...],
    num_draft_tokens: int,
    on_gpu: bool,
) -> RunnerOptions:
    """As for the longest sequence that may be asked for and a single KV block."""
    scheduling = config.scheduling
    sizes = scheduling.decode_batch_sizes
    if on_gpu and not sizes:
        sizes = tuple(n for n in CAPTURED_SIZES if n < scheduling.max_num_seqs)
        sizes += (scheduling.max_num_seqs,)
    widest = max((scheduling.max_num_seqs, *sizes)) * (num_draft_tokens + 1)
    length = config.synthetic_length
    kv_dtype, index_dtype = cache_dtypes(config, dtype)
    return RunnerOptions(
        num_slots=scheduling.max_num_seqs,
        num_blocks=1,
        block_size=config.cache.block_size or target.sparse_block_size,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        max_model_len=config.longest(target.max_position_embeddings),
        max_rows=max(scheduling.max_num_batched_tokens, widest),
        num_draft_tokens=num_draft_tokens,
        eos_token_ids=eos_token_ids,
        rejection=config.speculation.verification == "rejection",
        probabilistic_drafts=config.speculation.draft_sampling == "probabilistic",
        synthetic=() if length is None else synthetic_rates(length, num_draft_tokens),
        processed_logprobs=config.output.logprobs_mode == "processed",
        decode_batch_sizes=sizes,
        capture=not scheduling.enforce_eager,
        capture_in_steps=True,
        overlap_kernels=scheduling.overlap_kernels,
        batch_invariant=scheduling.batch_invariant,
        graph_bytes=None,
        scripted_drafts=config.speculation.scripted == "drafts",
        scripted_tokens=config.speculation.scripted == "tokens",
        keep_aux=config.output.return_aux_hidden_states,
    )


def _measured(config: Config, loaded: _Loaded, memory: DeviceMemory, served: bool) -> MemoryUse:
    """What everything but the KV blocks takes, graphs as far as they are captured at all."""
    target, draft, options = loaded.target, loaded.draft, loaded.options
    spec, scheduling = target.spec, config.scheduling
    outputs = 0
    if options.capture and options.decode_batch_sizes:
        # The target's logits in its dtype and accept's in float32, for every number of drafts and
        # each of the runner's bounds of a row's keys. A server captures two ways of sampling.
        bounds = 1 + (options.max_model_len > spec.sparse_topk_blocks * spec.sparse_block_size)
        ways = 2 if served else 1
        logits = spec.vocab_size * (target.embed_tokens.weight.itemsize + 4 * ways)
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


def _kernels() -> Builds:
    """The kernels that this process's Triton has made so far."""
    made = compiles()
    return Builds(made.num_compiled, made.compile_s, made.num_loaded, made.load_s)
