"""eaglerun generate and eaglerun chat: their flags, and what they need before the first prompt."""

import argparse
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from eaglerun.config import Config, options
from eaglerun.conversation import THINKING_MODES
from eaglerun.errors import ConfigError
from eaglerun.messages import SamplingParams
from eaglerun.server.conversation_loop import Talk
from eaglerun.server.http_partner import OverHttp
from eaglerun.server.partners import Partner, Wish
from eaglerun.server.terminal import DIM, Screen, acceptance_words, bytes_kept, is_text

OK, FAILED = 0, 1
# Settings that are said about a server, too.
_OF_A_SERVER = frozenset({"model", "api_key"})


def add_generate_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts and sampling")
    group.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times; without it, every line of standard input is one",
    )
    group.add_argument(
        "--raw", action="store_true", help="prompts as they are, without the chat template"
    )
    _add_sampling(group, 256)


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversation and sampling")
    group.add_argument(
        "--url", help="talk to the server there, through OpenAI's chat API; MODEL is its name there"
    )
    _add_sampling(group, 1024)


def _add_sampling(group: argparse._ArgumentGroup, max_tokens: int) -> None:
    group.add_argument("--system", metavar="TEXT", help="what the model is told first")
    group.add_argument(
        "--thinking",
        choices=THINKING_MODES,
        help="MiniMax-M3's thinking mode; not given: as the chat template does",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"the longest answer, in tokens (default: {max_tokens})",
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--stop", action="append", default=[], help="may be given several times")


def generate(config: Config, flags: argparse.Namespace) -> int:
    """Prompts are flags, or else the lines of standard input; answers go to standard output."""
    prompts = _prompts(flags.prompt)
    params = SamplingParams(
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_tokens=flags.max_tokens,
        stop=tuple(flags.stop),
    )
    if flags.raw and (flags.system is not None or flags.thinking is not None):
        name = "--system" if flags.system is not None else "--thinking"
        raise ConfigError(f"{name} goes through the chat template, which --raw leaves out")
    _say_what_comes(config)
    # torch takes seconds to import, and a server's HTTP process has no use for it.
    from eaglerun.llm import LLM
    from eaglerun.server.local_partner import parts_of
    from eaglerun.start import start_engine

    screen = Screen(sys.stdout, sys.stderr)
    llm = LLM.from_engine(start_engine(config, progress=None))
    raw = flags.raw
    if not raw and llm.chat_template is None:
        raw = True
        screen.note("eaglerun: the model has no chat template; prompts go as they are")
    if raw:
        outputs = llm.generate(prompts, params)
    else:
        conversations = [_conversation(prompt, flags.system) for prompt in prompts]
        values = {} if flags.thinking is None else {"thinking_mode": flags.thinking}
        outputs = llm.chat(conversations, params, chat_template_kwargs=values)
    for output in outputs:
        thinking, text = ("", output.text) if raw else parts_of(llm, output)
        if thinking:
            screen.think(f"{thinking}\n", drafted=False)
        screen.write(f"{text}\n", drafted=False)
        cut = f" (cut at --max-tokens {flags.max_tokens})"
        words = f"{len(output.token_ids)} tokens{cut if output.finish_reason == 'length' else ''}"
        screen.note(f"eaglerun: {words}{acceptance_words(output.speculation)}", DIM)
    return OK


def _conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": prompt}]


def _prompts(given: list[str]) -> list[str]:
    """--prompt, or the lines of standard input; ConfigError for one that cannot be asked."""
    name = "--prompt"
    if not given:
        name = "standard input, line"
        if sys.stdin.isatty():
            print("eaglerun: a prompt on each line, Ctrl-D after the last", file=sys.stderr)
        with bytes_kept(sys.stdin):
            given = [line.rstrip("\n") for line in sys.stdin]
    if not given:
        raise ConfigError("no prompt: give --prompt TEXT, or lines on standard input")
    for number, text in enumerate(given, 1):
        if not text.strip():
            raise ConfigError(f"{name} {number} is empty")
        if not is_text(text):
            raise ConfigError(f"{name} {number} is not UTF-8 text")
    return given


def chat(config: Config, flags: argparse.Namespace) -> int:
    """Talk in the terminal. Without one, every line of standard input is a question."""
    wish = Wish(
        temperature=flags.temperature,
        top_p=flags.top_p,
        max_tokens=flags.max_tokens,
        stop=tuple(flags.stop),
        thinking=flags.thinking,
    )
    SamplingParams(
        temperature=wish.temperature,
        top_p=wish.top_p,
        max_tokens=wish.max_tokens,
        stop=wish.stop,
    )
    screen = Screen(sys.stdout, sys.stderr)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    partner = _local(config) if flags.url is None else _remote(config, flags)
    if interactive:
        for line in _greeting(partner, screen):
            screen.note(line, DIM)
    with bytes_kept(sys.stdin):
        talk = Talk(partner, screen, _reader(interactive), wish, flags.system)
        talk.run()
    return FAILED if talk.failed and not interactive else OK


def _say_what_comes(config: Config) -> None:
    """Tell whoever looks what the next seconds are for, until the first bar."""
    if sys.stderr.isatty():
        print(f"eaglerun: loading {config.model.model}", file=sys.stderr)


def _local(config: Config) -> Partner:
    _say_what_comes(config)
    # See generate.
    from eaglerun.chat_template import load_chat_template
    from eaglerun.llm import LLM
    from eaglerun.loader import read_checkpoints
    from eaglerun.server.local_partner import InProcess
    from eaglerun.start import start_engine

    found = read_checkpoints(config)
    file = config.server.chat_template
    # Found out before the weights are read.
    if load_chat_template(found.target_path, None if file is None else Path(file)) is None:
        raise ConfigError(
            f"{found.name} has no chat template, and so no chat: --chat-template FILE brings one, "
            "eaglerun generate --raw completes text"
        )
    return InProcess(LLM.from_engine(start_engine(config, progress=None)))


def _remote(config: Config, flags: argparse.Namespace) -> Partner:
    given = vars(flags)
    names = [o.name for o in options() if o.name in given and o.name not in _OF_A_SERVER]
    names += [name for name in ("config", "speculative_config") if given[name] is not None]
    if names:
        flag = f"--{names[0].replace('_', '-')}"
        raise ConfigError(f"{flag} is the server's to set; with --url go MODEL and --api-key")
    model = flags.MODEL or given.get("model")
    return OverHttp(flags.url, model, config.server.api_key)


def _greeting(partner: Partner, screen: Screen) -> Iterator[str]:
    drafts = "the server does not tell of drafts"
    if partner.most_drafts is not None:
        drafts = f"up to {partner.most_drafts} drafts a step" if partner.most_drafts else "no draft"
    yield f"{partner.name}; {drafts}; /help lists commands"
    if partner.most_drafts and screen.has_tints:
        yield "green text was guessed by the draft and accepted by the target"


def _reader(interactive: bool) -> Callable[[str], str]:
    if interactive:
        # Gives input() its line editing and history, where there is such a module.
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")
        return input

    def read(prompt: str) -> str:
        if line := sys.stdin.readline():
            return line
        raise EOFError

    return read
