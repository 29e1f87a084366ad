"""The command eval: its flags, and what it runs."""

import argparse
import sys
from pathlib import Path

from eaglerun.bench.evaluate import (
    TASKS,
    Answerer,
    evaluate,
    in_process,
    over_http,
    write_json,
)
from eaglerun.config import Config
from eaglerun.loader import load_models


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
