"""eaglerun: MiniMax-M3 with an EAGLE3 draft. Nothing heavy is imported before it is used."""

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

# OpenMP reads this when torch is loaded. By default a thread that waits for the others spins. Where
# another program runs too, it then takes the processor from the thread that it waits for.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# The folders server/, kernels/ and configs/ of a clone become parts of this package only when it is
# installed. The clone's own folder eaglerun/ does not have them.
if find_spec("eaglerun.kernels") is None:
    _clone = Path(__file__).resolve().parents[1]
    raise ImportError(
        f"eaglerun was imported from the folder {_clone / 'eaglerun'}, which holds only a part of "
        "the package: its server, kernels and configs lie beside it. Python looks into the current "
        "folder before it looks at what is installed. Start Python from another folder, or install "
        f"the clone in place: pip install -e {_clone}"
    )

_HOMES = {"LLM": "eaglerun.llm", "SamplingParams": "eaglerun.messages"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'eaglerun' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
