"""python -m eaglerun.server.engine_main: the engine process with the real engine in it."""

import sys
from collections.abc import Callable

from eaglerun.config import Config
from eaglerun.server.engine_process import Served, run
from eaglerun.start import start_engine, warm_up


def make_engine(config: Config, progress: Callable[[str], None]) -> Served:
    """Load, size the KV cache, and warm up."""
    progress(f"Loading {config.model.model}" + _with_draft(config))
    engine = start_engine(config, progress=None, served=True)
    num_blocks, block_size = engine.pool.num_blocks, engine.pool.block_size
    progress(
        f"KV cache: {num_blocks} blocks of {block_size} = {num_blocks * block_size} tokens, "
        f"longest sequence {engine.max_model_len}"
    )
    progress("Warming up")
    warm_up(engine)
    return Served(engine, engine.path)


def _with_draft(config: Config) -> str:
    return "" if config.model.draft is None else f" with the draft {config.model.draft}"


if __name__ == "__main__":
    sys.exit(run(make_engine))
