"""A command line to a Config: one flag for each setting, and presets that complete it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from eaglerun import configs
from eaglerun.config import Config, Option, nearest, options, resolve
from eaglerun.errors import ConfigError

# Flags of other servers for what this build does not do, or always does. None is ignored.
NOT_HERE = {
    "--pipeline-parallel-size": "this build runs on one GPU",
    "--data-parallel-size": "start one server for each engine",
    "--quantization": "weights are held in --dtype",
    "--enable-chunked-prefill": "prefill is always chunked; --max-chunk-tokens sizes the chunks",
    "--trust-remote-code": "code of a checkpoint is never run",
    "--enable-auto-tool-choice": "tool_choice auto always works",
    "--tool-call-parser": "MiniMax-M3's calls are always parsed",
    "--reasoning-parser": "MiniMax-M3's reasoning is always parsed",
}
# Keys of vLLM's JSON, and our settings.
SPECULATIVE_CONFIG = {"model": "draft", "num_speculative_tokens": "num_draft_tokens"}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def flags(self, command: str | None) -> list[str]:
        """The flags of a command, or of this parser."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and command in action.choices:
                chosen = action.choices[command]
                assert isinstance(chosen, Parser)
                return chosen.flags(None)
        return [flag for action in self._actions for flag in action.option_strings]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """MODEL, --config, --speculative-config, and a flag for every setting."""
    parser.add_argument("MODEL", nargs="?", help="the same as --model")
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file with settings, or the name of a preset"
    )
    parser.add_argument(
        "--speculative-config",
        metavar="JSON",
        help='as in vLLM: {"model": DRAFT, "num_speculative_tokens": 3, "method": "eagle3"}',
    )
    groups = {o.section: parser.add_argument_group(f"[{o.section}]") for o in options()}
    for option in options():
        _add_flag(groups[option.section], option)


def _add_flag(group: argparse._ArgumentGroup, option: Option) -> None:
    """The value stays text, which resolve() parses and checks; a flag not given leaves nothing."""
    text = option.help.replace("%", "%%")
    if option.default is not None and option.default != ():
        text += f" (default: {str(option.default).lower()})"
    if bool in (option.type, *get_args(option.type)):
        no = [flag.replace("--", "--no-", 1) for flag in option.flags]
        for flags, value, words in ((option.flags, "true", text), (no, "false", None)):
            group.add_argument(
                *flags,
                dest=option.name,
                action="store_const",
                const=value,
                default=argparse.SUPPRESS,
                help=words or argparse.SUPPRESS,
            )
        return
    group.add_argument(
        *option.flags,
        dest=option.name,
        default=argparse.SUPPRESS,
        metavar="|".join(option.choices) or option.name.rpartition("_")[2].upper(),
        help=text,
    )


def parse_flags(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """``argv`` with - and _ alike. ConfigError names an unknown flag and the nearest one."""
    namespace, unknown = parser.parse_known_args([_dashes(word) for word in argv])
    if not unknown:
        return namespace
    flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    if flag in NOT_HERE:
        raise ConfigError(f"{flag} is not in this build: {NOT_HERE[flag]}")
    if not flag.startswith("-"):
        raise ConfigError(f"{flag!r} is one word too many")
    known = dict.fromkeys(parser.flags(vars(namespace).get("command")))
    raise ConfigError(f"unknown flag {flag}{nearest(flag, known)}")


def _dashes(word: str) -> str:
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def config_of(namespace: argparse.Namespace) -> tuple[Config, str | None]:
    """The settings of a parsed command line, and the preset that completed them, if one did.

    Without --config, a preset whose target and draft are those that were named is used; a draft
    alone brings its target that way.
    """
    given = vars(namespace)
    overrides = {o.name: given[o.name] for o in options() if o.name in given}
    if given["MODEL"] is not None:
        _set(overrides, "model", given["MODEL"], "MODEL")
    if given["speculative_config"] is not None:
        for name, value in _speculative_config(given["speculative_config"]).items():
            _set(overrides, name, value, "--speculative-config")
    if given["config"] is not None:
        file = _find_file(given["config"])
        return resolve(overrides, file), file.stem
    config = resolve(overrides)
    preset = _preset_of(config)
    return (config, None) if preset is None else (resolve(overrides, preset), preset.stem)


def _set(overrides: dict[str, str], name: str, value: str, source: str) -> None:
    if overrides.setdefault(name, value) != value:
        raise ConfigError(f"{name} is given twice: {overrides[name]!r}, and {value!r} by {source}")


def _speculative_config(text: str) -> dict[str, str]:
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--speculative-config is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError("--speculative-config: expected a JSON object")
    if (method := given.pop("method", "eagle3")) != "eagle3":
        raise ConfigError(f"--speculative-config: method = {method!r}: allowed eagle3")
    for key in given:
        if key not in SPECULATIVE_CONFIG:
            hint = nearest(key, dict.fromkeys(["method", *SPECULATIVE_CONFIG]))
            raise ConfigError(f"--speculative-config: unknown key {key!r}{hint}")
    return {SPECULATIVE_CONFIG[key]: str(value) for key, value in given.items()}


def _find_file(name: str) -> Path:
    """A file, or else a preset by its name."""
    if Path(name).is_file():
        return Path(name)
    presets = {file.stem: file for file in configs.presets()}
    stem = name.removesuffix(".toml")
    if stem not in presets:
        raise ConfigError(
            f"--config {name}: no such file, and no such preset{nearest(stem, presets)}; "
            f"presets: {', '.join(presets)}"
        )
    return presets[stem]


def _preset_of(config: Config) -> Path | None:
    """The preset of this pair; the only one, for several would leave the choice to chance."""
    model, draft = config.model.model, config.model.draft
    draft_alone = model == "demo" and draft not in (None, "demo")
    found = []
    drafts = {}
    for file in configs.presets():
        preset = resolve(None, file, {}).model
        if preset.draft is not None:
            drafts[preset.draft] = file.stem
        if preset.draft == draft and (draft_alone or preset.model == model):
            found.append(file)
    if len(found) > 1:
        names = ", ".join(file.stem for file in found)
        raise ConfigError(f"several presets pair {model} and {draft}: --config one of {names}")
    if draft_alone and not found:
        raise ConfigError(
            f"draft {draft}: its target is not known; name it: eaglerun serve MODEL --draft "
            f"{draft}{nearest(str(draft), drafts)}"
        )
    return found[0] if found else None
