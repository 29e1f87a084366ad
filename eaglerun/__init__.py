"""eaglerun: MiniMax-M3 with an EAGLE3 draft. Nothing heavy is imported before it is used."""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "eaglerun.llm", "SamplingParams": "eaglerun.messages"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'eaglerun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
