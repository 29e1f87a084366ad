"""What narrower caches cost: the target's logits, with and without, over held-out problems.

Each problem's text is its prompt and the plain engine's greedy answer with caches in the models'
dtype. The target then reads that text once for each pair of cache dtypes, in chunks as a prefill
does, and the rows that decide the answer's tokens are compared.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.bench.table import Columns, Table, number, percent, say
from eaglerun.bench.workbench import Workbench
from eaglerun.config import Config, SpeculationConfig
from eaglerun.kernels.rows import Rows
from eaglerun.llm import LLM
from eaglerun.loader import cache_dtypes
from eaglerun.messages import SamplingParams
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.start import start_engine

# (kv_cache_dtype, index_cache_dtype)
PAIRS = (("bfloat16", "bfloat16"), ("fp8", "auto"), ("auto", "fp8"), ("fp8", "fp8"))
MAX_TOKENS = 256
CHUNK = 256
# Token ids, and the row that decides the answer's first one.
Text = tuple[tuple[int, ...], int]


@dataclass(frozen=True, slots=True)
class Row:
    """One task under one pair of cache dtypes, against caches in the models' dtype.

    kl, kl_p99, kl_max  of the next token's distribution from the exact one, nats
    same_top            share of rows whose best token is the exact one's
    """

    task: str
    kv: str
    index: str
    texts: int
    tokens: int
    kl: float
    kl_p99: float
    kl_max: float
    same_top: float


COLUMNS: Columns[Row] = {
    "task": lambda r, _: r.task,
    "KV": lambda r, _: r.kv,
    "index keys": lambda r, _: r.index,
    "texts": lambda r, _: str(r.texts),
    "tokens": lambda r, _: str(r.tokens),
    "KL mean": lambda r, _: number(r.kl, 6),
    "KL p99": lambda r, _: number(r.kl_p99, 5),
    "KL max": lambda r, _: number(r.kl_max, 4),
    "same best token": lambda r, _: percent(r.same_top, 2),
}


def run(bench: Workbench) -> None:
    """A row for each task and pair of dtypes, of num_prompts problems each."""
    bench.drop_engines()
    config, target = _exact(bench.config), bench.models.target
    exactly = _dtypes(config, ("auto", "auto"), target)
    table = Table("caches", COLUMNS, bench.options.out, bench.settings)
    for task, texts in _texts(bench, config).items():
        if not bench.in_time(f"caches, {task}"):
            continue
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in PAIRS]
        for text, first in texts:
            exact = logits_of(target, text, first, exactly)
            for pair, rows in zip(PAIRS, found, strict=True):
                rows.append(
                    compare(exact, logits_of(target, text, first, _dtypes(config, pair, target)))
                )
        for pair, rows in zip(PAIRS, found, strict=True):
            table.add(_row(task, pair, rows))
    print(table.to_text())


def _row(task: str, pair: tuple[str, str], rows: list[tuple[Tensor, Tensor]]) -> Row:
    """``rows``: compare() of each text."""
    kl, same = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return Row(
        task=task,
        kv=pair[0],
        index=pair[1],
        texts=len(rows),
        tokens=len(kl),
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        same_top=float(same.double().mean()),
    )


def _exact(config: Config) -> Config:
    """The plain engine's settings, with caches in the models' dtype and real text."""
    return dataclasses.replace(
        config,
        cache=dataclasses.replace(config.cache, kv_cache_dtype="auto", index_cache_dtype="auto"),
        speculation=SpeculationConfig(num_draft_tokens=0),
    )


def _dtypes(
    config: Config, pair: tuple[str, str], target: MiniMaxM3
) -> tuple[torch.dtype, torch.dtype]:
    """How a pair's caches are held, for this target."""
    cache = dataclasses.replace(config.cache, kv_cache_dtype=pair[0], index_cache_dtype=pair[1])
    dtype = target.embed_tokens.weight.dtype
    return cache_dtypes(dataclasses.replace(config, cache=cache), dtype)


def _texts(bench: Workbench, config: Config) -> dict[str, list[Text]]:
    """By task: prompts with their greedy answers. The engine is gone afterwards."""
    llm = LLM.from_engine(start_engine(config, bench.models))
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    found = {}
    # As in Workbench.prompts: only chats need the server's packages.
    from eaglerun.bench.evaluate import TASKS, load_problems, render

    for task in TASKS:
        problems = load_problems(task, bench.options.num_prompts)
        prompts = render(bench.models, problems, "adaptive")
        say(f"caches: {len(prompts)} answers of {task}")
        outputs = llm.generate(prompts, params, progress=False)
        found[task] = [
            ((*prompt, *output.token_ids[:-1]), len(prompt) - 1)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
    return found


@torch.inference_mode()
def logits_of(
    target: MiniMaxM3, text: tuple[int, ...], first: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> Tensor:
    """Logits of rows ``first`` ... of a text: [len(text) - first, V] in the model's dtype.

    dtypes  of K and V, and of the index keys
    """
    spec, device = target.spec, target.embed_tokens.weight.device
    size = spec.sparse_block_size
    blocks = -(-len(text) // size)
    kv = TargetKV.allocate(spec, blocks, size, device, *dtypes)
    table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
    found = []
    for start in range(0, len(text), CHUNK):
        end = min(start + CHUNK, len(text))
        positions = torch.arange(start, end, device=device)
        rows = Rows(
            positions=positions,
            kv_slots=positions,
            block_tables=table,
            seq_lens=torch.tensor([end], dtype=torch.int32, device=device),
            max_seq_len=end,
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32, device=device),
            q_lens=(end - start,),
        )
        ids = torch.tensor(text[start:end], device=device)
        hidden = target(ids, rows, kv)
        if end > first:
            found.append(target.logits(hidden[max(first - start, 0) :]))
    return torch.cat(found)


def compare(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of logits [R, V]: KL(exact || other) [R] in nats, and whether the best token is the
    same [R]."""
    p, q = (torch.log_softmax(logits.double(), dim=-1) for logits in (exact, other))
    kl = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0.0)
    return kl, exact.argmax(dim=-1) == other.argmax(dim=-1)
