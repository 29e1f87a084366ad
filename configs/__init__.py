"""Presets: one TOML per (model, machine, purpose)."""
