"""The commands eval and bench: their flags, and what they run."""

import argparse
import sys
from pathlib import Path

from eaglerun.bench.evaluate import (
    TASKS,
    Answerer,
    evaluate,
    in_process,
    load_problems,
    over_http,
    render,
    write_json,
)
from eaglerun.bench.latency import Row, measure, random_prompts, to_text
from eaglerun.bench.latency import write_json as write_rows
from eaglerun.config import Config
from eaglerun.errors import ConfigError
from eaglerun.loader import Models, load_models


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--num", type=int, help="problems of each task; without it all")
    group.add_argument("--task", action="append", choices=TASKS, help="may be given several times")
    group.add_argument("--thinking-mode", default="adaptive")
    group.add_argument("--max-tokens", type=int, default=512)
    group.add_argument("--json", type=Path, metavar="FILE", help="write the scores here too")
    group.add_argument("--url", help="ask this eaglerun server and load nothing")
    group.add_argument("--url-api-key", help="its API key")
    group.add_argument("--concurrency", type=int, default=8, help="requests to the server at once")


def run_eval(config: Config, flags: argparse.Namespace) -> int:
    """Both modes on the demo's held-out problems; 1 where their answers differ."""
    k = config.num_draft_tokens
    modes: dict[str, Answerer] = {}
    if flags.url is not None:
        for name, drafts in (("plain", 0), ("EAGLE3", None)):
            modes[name] = over_http(
                flags.url,
                flags.url_api_key,
                drafts,
                flags.thinking_mode,
                flags.max_tokens,
                flags.concurrency,
            )
    else:
        models = load_models(config, progress=sys.stderr.isatty())
        options = (flags.thinking_mode, flags.max_tokens)
        modes["plain"] = in_process(config, models, 0, *options)
        if k:
            modes[f"EAGLE3 K={k}"] = in_process(config, models, k, *options)
    report = evaluate(modes, flags.task or TASKS, flags.num)
    print(report.to_text())
    if flags.json is not None:
        write_json(report, flags.json)
    return int(any(same != of for same, of in report.identical.values()))


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--concurrency", type=int, action="append", help="may be given several times"
    )
    group.add_argument(
        "--num-drafts", type=int, action="append", help="K, 0 is plain; several times"
    )
    group.add_argument("--input-len", type=int, default=1024, help="of random prompts, tokens")
    group.add_argument("--output-len", type=int, default=256)
    group.add_argument(
        "--prompts", choices=("random", "demo"), default="random", help="demo: word problems"
    )
    group.add_argument("--bandwidth-gb-s", type=float, help="of the memory, for the floor")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")


def run_latency(config: Config, flags: argparse.Namespace) -> int:
    """One row for each concurrency and K; the plain rows first, for the gain."""
    drafts = flags.num_drafts or sorted({0, config.num_draft_tokens})
    if max(drafts) > config.num_draft_tokens:
        raise ConfigError(
            f"--num-drafts {max(drafts)}: the draft is loaded for num_draft_tokens = "
            f"{config.num_draft_tokens}; raise that"
        )
    models = load_models(config, progress=sys.stderr.isatty())
    rows: list[Row] = []
    for concurrency in flags.concurrency or [1, 8]:
        prompts = prompts_of(models, flags.prompts, concurrency, flags.input_len, config.model.seed)
        for k in drafts:
            rows.append(measure(config, models, prompts, k, flags.output_len, flags.bandwidth_gb_s))
            print(to_text(rows[-1:]).splitlines()[-1], file=sys.stderr)
    print(to_text(rows))
    if flags.json is not None:
        write_rows(config, rows, flags.json)
    return 0


def prompts_of(
    models: Models, kind: str, count: int, length: int, seed: int
) -> list[tuple[int, ...]]:
    """``count`` prompts: random ids of ``length``, or the demo's word problems as chats."""
    if kind == "random":
        return random_prompts(count, length, models.target.spec.vocab_size, seed)
    return [render(models, p, "adaptive") for p in load_problems("seeds", count)]
