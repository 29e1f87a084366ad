"""The command eaglerun: serve, chat, generate, eval, lossless, bench, check-config, warm."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from eaglerun import __version__
from eaglerun.config import CPU_KV_GIB, Config
from eaglerun.errors import CheckpointError, ConfigError, EaglerunError, RankFailed
from eaglerun.server import hung, prompt_commands
from eaglerun.server.flags import Parser, add_settings, config_of, parse_flags

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None, engine: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code. ``engine`` starts the engine's process of a server; None:
    this build's.

    After RankFailed it does not return: the process ends (hung.leave).
    """
    _show_what_can_be_shown()
    try:
        return _run(sys.argv[1:] if argv is None else argv, engine)
    except (ConfigError, CheckpointError) as error:
        print(f"eaglerun: {error}", file=sys.stderr)
        return REFUSED
    except RankFailed as error:
        print(f"eaglerun: {error}", file=sys.stderr)
        hung.leave()
    except EaglerunError as error:
        print(f"eaglerun: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("eaglerun: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _show_what_can_be_shown() -> None:
    """Characters that the terminal's encoding lacks are replaced, and end nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _run(argv: Sequence[str], engine: Sequence[str] | None) -> int:
    flags = parse_flags(_parser(argv), argv)
    config, preset = config_of(flags)
    talks_elsewhere = flags.command == "chat" and flags.url is not None
    if preset is not None and not talks_elsewhere:
        _say(f"settings that are not given come from {preset}.toml")
    if flags.MODEL is None and config.model.model == "demo" and not talks_elsewhere:
        _say(f"{config.model.model} is the bundled pair of small models; name a MODEL for another")
    if flags.command != "check-config" and not talks_elsewhere:
        config.check_one_rank()
    match flags.command:
        case "serve":
            # Nothing else needs the packages of a web server.
            from eaglerun.server import serve

            return serve.serve(config, serve.ENGINE if engine is None else engine)
        case "generate":
            return prompt_commands.generate(config, flags)
        case "chat":
            return prompt_commands.chat(config, flags)
        case "eval" | "bench" | "lossless":
            return _measure(config, flags)
        case "warm":
            # See _add_measuring.
            from eaglerun.server.warm_command import compile_kernels

            print(compile_kernels(config, flags.arch))
            return 0
        case _:
            return _check_config(config)


def _parser(argv: Sequence[str]) -> Parser:
    parser = Parser(prog="eaglerun", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("serve", "an OpenAI server; with nothing else, of the bundled demo pair"),
        ("chat", "a conversation in the terminal, with an engine here or a server elsewhere"),
        ("generate", "answers to prompts, here and now"),
        ("eval", "accuracy on the demo's held-out problems, with and without the draft"),
        ("lossless", "answers with the draft against those without it, each difference explained"),
        ("bench", "step time, throughput, contexts, prefill, kernels; the first users of a server"),
        ("check-config", "the settings in effect and what the models would take; loads nothing"),
        ("warm", "a server's kernels compiled ahead, into its cache; needs no GPU and no weights"),
    ):
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == "generate":
            prompt_commands.add_generate_flags(command)
        if name == "warm":
            command.add_argument(
                "--arch",
                help="architecture to compile for, as sm_90 or gfx942; none: that of the GPU here",
            )
        if name == "chat":
            prompt_commands.add_chat_flags(command)
        if name in ("eval", "bench", "lossless") and name in argv[:1]:
            _add_measuring(command, name)
        add_settings(command)
    return parser


def _add_measuring(parser: argparse.ArgumentParser, name: str) -> None:
    # torch takes seconds to import; only the command that is asked for pays.
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
    # See _add_measuring.
    if flags.command == "bench":
        from eaglerun.bench.commands import run_bench

        return run_bench(config, flags)
    if flags.command == "lossless":
        from eaglerun.bench.lossless import run

        return run(config, flags)
    from eaglerun.bench.eval_command import run_eval

    return run_eval(config, flags)


def _check_config(config: Config) -> int:
    # See _add_measuring.
    from eaglerun.checkpoint.budget import format_budget
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
    size = config.model.tensor_parallel_size
    print(format_budget(found.target, found.draft, kv, name, kv_bytes, size))
    return 0


def _say(text: str) -> None:
    print(f"eaglerun: {text}", file=sys.stderr)
