"""What the parts of a benchmark share: the models, loaded once, engines over them, and the time."""

import dataclasses
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from eaglerun.bench.drive import random_prompts
from eaglerun.bench.floor import StepBytes, arithmetic_s, step_bytes, step_products
from eaglerun.bench.table import say
from eaglerun.checkpoint.budget import KVBudget
from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.errors import ConfigError
from eaglerun.loader import Models, kv_budget_of, load_models
from eaglerun.start import start_engine


@dataclass(frozen=True, slots=True)
class Options:
    """What a benchmark's flags say; see commands.add_bench_flags.

    concurrency    sequences at once; empty: the part's own choice
    num_drafts     the numbers of drafts to measure; empty: 0 and the configured K
    bandwidth, flops  of the machine, bytes and operations a second, for the floors
    """

    concurrency: tuple[int, ...] = ()
    num_drafts: tuple[int, ...] = ()
    input_len: int = 1024
    output_len: int = 256
    num_prompts: int = 128
    vary: float = 0.0
    prompts: str = "random"
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    num_steps: int = 32
    only: str = ""
    bandwidth: float | None = None
    flops: float | None = None
    out: Path | None = None
    budget_s: float | None = None
    url: str | None = None
    start_timeout_s: float = 1800.0
    vocab_size: int | None = None


class Workbench:
    """The models of a Config and engines over them: one with the draft, one without.

    ``longest``: positions that the models must reach, where a part needs more than max_model_len.
    """

    def __init__(self, config: Config, options: Options, longest: int = 0) -> None:
        """Raises  ConfigError when more drafts are asked for than the draft is loaded for."""
        self.config = config
        self.options = options
        self.num_drafts = options.num_drafts or tuple(sorted({0, config.num_draft_tokens}))
        if max(self.num_drafts) > config.num_draft_tokens:
            raise ConfigError(
                f"--num-drafts {max(self.num_drafts)}: the draft is loaded for num_draft_tokens = "
                f"{config.num_draft_tokens}; raise that"
            )
        self._begun = time.perf_counter()
        model = config.model
        if model.max_model_len is not None:
            length = max(model.max_model_len, longest)
            model = dataclasses.replace(model, max_model_len=length)
        say("loading the models")
        self.models: Models = load_models(
            dataclasses.replace(config, model=model), progress=sys.stderr.isatty()
        )
        weight = self.models.target.embed_tokens.weight
        self.device, self._torch_dtype = weight.device, weight.dtype
        self.dtype = str(weight.dtype).removeprefix("torch.")
        self.settings = config.to_toml()
        self._engines: dict[bool, tuple[Config, Engine]] = {}
        self.synchronize()
        say(f"loaded {self.models.name} on {self.device} in {self.dtype}")

    def kv_budget(self, draft: bool) -> KVBudget:
        """Bytes of KV memory a token, with the draft's or without."""
        models = self.models
        spec = models.draft.spec if draft and models.draft is not None else None
        return kv_budget_of(self.config, models.target.spec, spec, self._torch_dtype)

    def free_blocks(self, draft: bool, reserved_bytes: int) -> int:
        """KV blocks that the GPU's free memory holds beside ``reserved_bytes``; a CPU sets no
        bound."""
        if self.device.type != "cuda":
            return sys.maxsize
        self._collect()
        free, _ = torch.cuda.mem_get_info()
        return self.kv_budget(draft).num_blocks(free - reserved_bytes)

    def concurrencies(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """The flag's, or the default as far as max_num_seqs allows."""
        limit = self.config.scheduling.max_num_seqs
        return self.options.concurrency or tuple(n for n in default if n <= limit)

    def engine(
        self,
        draft: bool,
        max_num_seqs: int,
        max_model_len: int | None = None,
        num_kv_blocks: int | None = None,
        prefix_caching: bool = False,
    ) -> Engine:
        """An engine over the models, a new one where its settings are others than the last one's.

        The prefix cache is off unless asked for: a prompt that runs twice must be computed twice.
        """
        config = self.config
        scheduling = dataclasses.replace(
            config.scheduling, max_num_seqs=max(max_num_seqs, config.scheduling.max_num_seqs)
        )
        cache = dataclasses.replace(config.cache, enable_prefix_caching=prefix_caching)
        if num_kv_blocks is not None:
            cache = dataclasses.replace(cache, num_kv_blocks=num_kv_blocks)
        model, speculation = config.model, config.speculation
        if max_model_len is not None:
            model = dataclasses.replace(model, max_model_len=max_model_len)
        if not draft:
            speculation = dataclasses.replace(
                speculation,
                num_draft_tokens=0,
                synthetic_acceptance_length=None,
                synthetic_acceptance_rate=None,
            )
        config = dataclasses.replace(
            config, model=model, cache=cache, scheduling=scheduling, speculation=speculation
        )
        kept = self._engines.get(draft)
        if kept is None or kept[0] != config:
            if kept is not None:
                del self._engines[draft]
                kept[1].rank.close()
            kept = None
            self._collect()
            kept = (config, start_engine(config, self.models))
            self._engines[draft] = kept
        return kept[1]

    def drop_engines(self) -> None:
        """Give the engines' memory back."""
        for _, engine in self._engines.values():
            engine.rank.close()
        self._engines.clear()
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompts(self, count: int) -> list[tuple[int, ...]]:
        """``count`` prompts: random ids of input_len tokens, or the demo's problems as chats."""
        if self.options.prompts == "random":
            vocab_size, seed = self.models.target.spec.vocab_size, self.config.model.seed
            return random_prompts(count, self.options.input_len, vocab_size, seed)
        # The server's packages, which chat templates need, may be missing where one only measures.
        from eaglerun.bench.evaluate import load_problems, render

        return render(self.models, load_problems("seeds", count), "adaptive")

    def step_bytes(
        self, num_draft_tokens: int, experts: float, num_sequences: int, context: float
    ) -> StepBytes:
        draft = None if self.models.draft is None else self.models.draft.spec
        return step_bytes(
            self.models.target.spec,
            draft,
            self.kv_budget(True),
            self.dtype,
            num_draft_tokens,
            experts,
            num_sequences,
            context,
        )

    def ms_of(self, num_bytes: float) -> float | None:
        """How long so many bytes take at the bandwidth, if that is known."""
        bandwidth = self.options.bandwidth
        return None if bandwidth is None else num_bytes / bandwidth * 1e3

    def arithmetic_ms(self, num_draft_tokens: int, num_sequences: int) -> float | None:
        """What a decode step's products take beyond their bytes, if both peaks are known."""
        bandwidth, flops = self.options.bandwidth, self.options.flops
        if bandwidth is None or flops is None:
            return None
        draft = None if self.models.draft is None else self.models.draft.spec
        products = step_products(
            self.models.target.spec, draft, self.dtype, num_draft_tokens, num_sequences
        )
        return arithmetic_s(products, bandwidth, flops) * 1e3

    def experts(self, summed: float) -> float:
        """Mean over the MoE layers of a count summed over them."""
        layers = sum(self.models.target.spec.moe_layers)
        return summed / layers if layers else 0.0

    def in_time(self, what: str) -> bool:
        """Whether there is time for ``what``; says so if not."""
        budget = self.options.budget_s
        if budget is None or time.perf_counter() - self._begun < budget:
            return True
        say(f"left out, for --budget-s {budget:g} is spent: {what}")
        return False

    def skip(self, part: str, why: str) -> None:
        say(f"{part} is skipped: {why}")

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
