"""The command eaglerun: serve, generate, eval, lossless, bench, check-config."""

import argparse
import sys
from collections.abc import Sequence

from eaglerun import __version__
from eaglerun.config import CPU_KV_GIB, Config
from eaglerun.errors import CheckpointError, ConfigError, EaglerunError
from eaglerun.messages import SamplingParams, SpeculationStats
from eaglerun.server.flags import Parser, add_settings, config_of, parse_flags

REFUSED, FAILED = 2, 1


def main(argv: Sequence[str] | None = None, engine: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code. ``engine`` starts the engine's process of a server; None:
    this build's."""
    try:
        return _run(sys.argv[1:] if argv is None else argv, engine)
    except (ConfigError, CheckpointError) as error:
        print(f"eaglerun: {error}", file=sys.stderr)
        return REFUSED
    except EaglerunError as error:
        print(f"eaglerun: {error}", file=sys.stderr)
        return FAILED


def _run(argv: Sequence[str], engine: Sequence[str] | None) -> int:
    flags = parse_flags(_parser(argv), argv)
    config, preset = config_of(flags)
    if preset is not None:
        _say(f"settings that are not given come from {preset}.toml")
    if config.model.model == "demo":
        _say(f"{config.model.model} is the bundled pair of small models; name a MODEL for another")
    match flags.command:
        case "serve":
            # Nothing else needs the packages of a web server.
            from eaglerun.server import serve

            return serve.serve(config, serve.ENGINE if engine is None else engine)
        case "generate":
            return _generate(config, flags)
        case "eval" | "bench" | "lossless":
            return _measure(config, flags)
        case _:
            return _check_config(config)


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = Parser(prog="eaglerun", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "an OpenAI server; with nothing else, of the bundled demo pair"),
        ("generate", "answers to prompts, here and now"),
        ("eval", "accuracy on the demo's held-out problems, with and without the draft"),
        ("lossless", "answers with the draft against those without it, each difference explained"),
        ("bench", "step time, throughput, long contexts, prefill, kernels; with and without draft"),
        ("check-config", "the settings in effect and what the models would take; loads nothing"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "generate":
            _add_sampling(command)
        if name in ("eval", "bench", "lossless") and name in argv[:1]:
            _add_measuring(command, name)
        add_settings(command)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and sampling")
    group.add_argument("--prompt", action="append", default=[], help="may be given several times")
    group.add_argument("--max-tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--stop", action="append", default=[], help="may be given several times")


def _add_measuring(parser: argparse.ArgumentParser, name: str) -> None:
    # See _generate; only the command that is asked for pays.
    if name == "bench":
        from eaglerun.bench.commands import add_bench_flags

        add_bench_flags(parser)
    elif name == "lossless":
        from eaglerun.bench.lossless import add_flags

        add_flags(parser)
    else:
        from eaglerun.bench.eval_command import add_eval_flags

        add_eval_flags(parser)


def _measure(config: Config, flags: argparse.Namespace) -> int:
    # See _generate.
    if flags.command == "bench":
        from eaglerun.bench.commands import run_bench

        return run_bench(config, flags)
    if flags.command == "lossless":
        from eaglerun.bench.lossless import run

        return run(config, flags)
    from eaglerun.bench.eval_command import run_eval

    return run_eval(config, flags)


def _generate(config: Config, flags: argparse.Namespace) -> int:
    """Prompts are flags, or else the lines of standard input; answers go to standard output."""
    # torch takes seconds to import, and a server's HTTP process has no use for it.
    from eaglerun.engine import Engine
    from eaglerun.llm import LLM

    prompts = flags.prompt or [line.rstrip("\n") for line in sys.stdin]
    params = SamplingParams(
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_tokens=flags.max_tokens,
        stop=tuple(flags.stop),
    )
    llm = LLM.from_engine(Engine.from_config(config, progress=sys.stderr.isatty()))
    for output in llm.generate(prompts, params, progress=sys.stderr.isatty()):
        print(output.text)
        _say(f"{len(output.token_ids)} tokens{_with_drafts(output.speculation)}")
    return 0


def _with_drafts(stats: SpeculationStats) -> str:
    if not stats.steps:
        return ""
    return (
        f", acceptance length {stats.mean_acceptance_length:.2f}, "
        f"{100 * stats.acceptance_rate:.1f}% of drafts accepted"
    )


def _check_config(config: Config) -> int:
    # See _generate.
    from eaglerun.budget import format_budget
    from eaglerun.loader import choose_device, choose_dtype, kv_budget_of, read_checkpoints

    print(config.to_toml())
    found = read_checkpoints(config)
    device = choose_device(config.model.device)
    dtype = choose_dtype(config.model.dtype, found.target.dtype, device)
    name = str(dtype).removeprefix("torch.")
    kv = kv_budget_of(config, found.target, found.draft, dtype)
    gib = config.cache.kv_cache_gib
    if gib is None and device.type == "cpu":
        gib = CPU_KV_GIB
    # On a GPU the rest is sized at start, once what the models and a step need is measured.
    kv_bytes = None if gib is None else int(gib * 2**30)
    if config.cache.num_kv_blocks is not None:
        kv_bytes = config.cache.num_kv_blocks * kv.block_bytes
    print(format_budget(found.target, found.draft, kv, name, kv_bytes))
    return 0


def _say(text: str) -> None:
    print(f"eaglerun: {text}", file=sys.stderr)
