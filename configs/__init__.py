"""Presets: one TOML per (model, machine, purpose)."""

from pathlib import Path


def presets() -> tuple[Path, ...]:
    """All preset files, by name."""
    return tuple(sorted(Path(__file__).parent.glob("*.toml")))
