"""All word-problem templates (word_problems.toml) and the ones kept out of training."""

import tomllib
from pathlib import Path

from tiny_m3.arithmetic import Template


def load_templates(path: Path) -> tuple[tuple[Template, ...], tuple[Template, ...]]:
    """(trained, held out). The wording of a held-out template is never trained on; the kinds of
    step that it needs all occur in others."""
    trained: list[Template] = []
    held_out: list[Template] = []
    for entry in tomllib.loads(path.read_text())["template"]:
        template = Template(
            entry["name"],
            entry["question"],
            tuple(entry["steps"]),
            entry["final"],
            entry["answer"],
            tuple(entry["numbers"].items()),
        )
        (held_out if "held_out" in entry else trained).append(template)
    return tuple(trained), tuple(held_out)


TRAINED, HELD_OUT = load_templates(Path(__file__).parent / "word_problems.toml")
