"""The command bench: its flags, and the parts that it runs."""

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from eaglerun.bench import caches, contexts, latency, prefill, profile, throughput, waves
from eaglerun.bench.table import say
from eaglerun.bench.workbench import Options, Workbench
from eaglerun.config import Config
from eaglerun.errors import ConfigError, RankFailed

# In the order in which they are worth a GPU's time; what is only timed precedes what is profiled.
# The last runs alone: the models are in a server's process, and would not fit twice.
PARTS = (
    *("latency", "fill", "profile", "contexts", "prefill", "throughput", "caches", "kernels"),
    "waves",
)


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    default = Options()
    parser.add_argument(
        "PARTS",
        type=_parts,
        help="what to measure, separated by commas, over one loading of the models: latency (steps "
        "at fixed concurrencies), fill (what the draft's KV costs at K = 0), profile (idle time "
        "and kernels of decode steps), contexts (decode steps at long contexts), prefill (time to "
        "first token of long prompts), throughput (many prompts, continuous batching), caches "
        "(what bf16 and fp8 caches change in the logits of the demo's held-out problems), kernels "
        "(each kernel alone, on a GPU; needs no model); or waves alone (a fresh server, over HTTP: "
        "for each concurrency c three waves of c requests at once, then one of 4c)",
    )
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--concurrency",
        type=_number(1),
        action="append",
        help="sequences at once; several times (default: each part's own)",
    )
    group.add_argument(
        "--num-drafts", type=_number(0), action="append", help="K, 0 is plain; several times"
    )
    group.add_argument(
        "--input-len", type=_number(1), default=default.input_len, help="of random prompts, tokens"
    )
    group.add_argument("--output-len", type=_number(1), default=default.output_len)
    group.add_argument(
        "--num-prompts",
        type=_number(1),
        default=default.num_prompts,
        help="throughput: in all; caches: of each task",
    )
    group.add_argument(
        "--vary",
        type=float,
        default=default.vary,
        metavar="SHARE",
        help="throughput: lengths are between (1 - SHARE) times the given ones and those",
    )
    group.add_argument(
        "--prompts", choices=("random", "demo"), default="random", help="demo: word problems"
    )
    group.add_argument(
        "--context",
        type=_number(2),
        action="append",
        help="contexts, prefill: tokens; several times (default: 8192, 32768, 131072)",
    )
    group.add_argument(
        "--num-steps",
        type=_number(2),
        default=default.num_steps,
        help="contexts, profile: decode steps measured",
    )
    group.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds TEXT")
    group.add_argument("--bandwidth-gb-s", type=float, help="of the memory, for the bytes floor")
    group.add_argument("--tflops", type=float, help="of a large product, for floors")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="PART.json and PART.md go here, row by row"
    )
    group.add_argument(
        "--url",
        help="waves: a server that runs; without, one is started with these settings, on a free "
        "local port, without TLS, keys and rate limit",
    )
    group.add_argument(
        "--start-timeout",
        type=float,
        default=default.start_timeout_s,
        metavar="SECONDS",
        help="waves: how long the server may take until it is ready",
    )
    group.add_argument(
        "--vocab-size",
        type=_number(2),
        help="waves: ids of prompts are below this (default: the model's)",
    )
    group.add_argument(
        "--budget-s", type=float, metavar="SECONDS", help="begin no further row after so long"
    )


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r}: allowed {', '.join(PARTS)}")
    return parts


def _number(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value}: allowed {low} or more")
        return value

    parse.__name__ = "whole number"
    return parse


def run_bench(config: Config, flags: argparse.Namespace) -> int:
    """Every part asked for, in the order given; a part that fails does not keep the next from
    running.

    Raises  RankFailed at once: on a device that hangs nothing can be measured any more;
            what else failed once all have run, several as an ExceptionGroup.
    """
    options = _options(flags)
    wanted: Sequence[str] = flags.PARTS
    if "waves" in wanted:
        if len(wanted) > 1:
            raise ConfigError(f"{','.join(wanted)}: waves runs alone, for its server needs the GPU")
        waves.run(config, options)
        return 0
    longest = 0
    if "contexts" in wanted:
        drafts = max(options.num_drafts or (config.num_draft_tokens,))
        longest = contexts.longest(options.contexts, options.num_steps, drafts)
    elif "prefill" in wanted:
        longest = max(options.contexts) + 2
    parts: dict[str, Callable[[], object]] = {"kernels": partial(_run_kernels, options)}
    bench: Workbench | None = None
    if set(wanted) - {"kernels"}:
        bench = Workbench(config, options, longest)
        parts |= {
            "latency": partial(latency.run, bench),
            "fill": partial(latency.run_fill, bench),
            "profile": partial(profile.run, bench),
            "contexts": partial(contexts.run, bench),
            "prefill": partial(prefill.run, bench),
            "throughput": partial(throughput.run, bench),
            "caches": partial(caches.run, bench),
        }
    failed: list[Exception] = []
    for name in wanted:
        begun = time.perf_counter()
        say(f"{name}: begun")
        try:
            parts[name]()
        except RankFailed:
            raise
        except Exception as error:
            say(f"{name}: failed: {type(error).__name__}: {error}")
            traceback.print_exc()
            # What the frames hold on the device must not be missing in the next part.
            traceback.clear_frames(error.__traceback__)
            if bench is not None:
                bench.drop_engines()
            failed.append(error)
        else:
            say(f"{name}: {time.perf_counter() - begun:.1f} s")
    if len(failed) == 1:
        raise failed[0]
    if failed:
        raise ExceptionGroup("parts of the benchmark failed", failed)
    return 0


def _run_kernels(options: Options) -> None:
    # Its shapes are made on the GPU as the module loads.
    from eaglerun.bench import kernels

    kernels.run(options.only, options.out)


def _options(flags: argparse.Namespace) -> Options:
    """The flags, checked. ConfigError names the flag."""
    for name, low, high in (
        ("vary", 0.0, 0.99),
        ("bandwidth_gb_s", 1e-3, 1e6),
        ("tflops", 1e-6, 1e6),
        ("budget_s", 0.0, 1e9),
        ("start_timeout", 0.0, 1e9),
    ):
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: allowed {low:g} to {high:g}")
    if flags.out is not None and flags.out.exists() and not flags.out.is_dir():
        raise ConfigError(f"--out {flags.out}: is a file, and a directory is wanted")
    return Options(
        concurrency=tuple(flags.concurrency or ()),
        num_drafts=tuple(flags.num_drafts or ()),
        input_len=flags.input_len,
        output_len=flags.output_len,
        num_prompts=flags.num_prompts,
        vary=flags.vary,
        prompts=flags.prompts,
        contexts=tuple(flags.context or Options().contexts),
        num_steps=flags.num_steps,
        only=flags.only,
        bandwidth=None if flags.bandwidth_gb_s is None else flags.bandwidth_gb_s * 1e9,
        flops=None if flags.tflops is None else flags.tflops * 1e12,
        out=flags.out,
        budget_s=flags.budget_s,
        url=flags.url,
        start_timeout_s=flags.start_timeout,
        vocab_size=flags.vocab_size,
    )
