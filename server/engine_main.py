"""python -m eaglerun.server.engine_main: the engine process with the real engine in it."""

import sys
from collections.abc import Callable

from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.loader import load_models
from eaglerun.messages import Request, SamplingParams
from eaglerun.server.engine_process import Served, run

WARM_UP = Request(
    request_id="warm-up",
    prompt_ids=(0, 0),
    sampling=SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, seed=0),
    cache_salt="warm-up",
)


def make_engine(config: Config, progress: Callable[[str], None]) -> Served:
    """Load, size the KV cache, and run one short request, so that the first user does not wait
    for what is compiled or allocated on first use."""
    progress(f"Loading {config.model.model}" + _with_draft(config))
    models = load_models(config, progress=None)
    engine = Engine(config, models, progress=None)
    num_blocks, block_size = engine.pool.num_blocks, engine.pool.block_size
    progress(
        f"KV cache: {num_blocks} blocks of {block_size} = {num_blocks * block_size} tokens, "
        f"longest sequence {engine.max_model_len}"
    )
    progress("Warming up")
    warm_up(engine)
    return Served(engine, models.path)


def warm_up(engine: Engine) -> None:
    """Answer one short request, where one fits."""
    if engine.max_model_len > len(WARM_UP.prompt_ids):
        engine.submit(WARM_UP)
        while engine.has_work:
            engine.step()


def _with_draft(config: Config) -> str:
    return "" if config.model.draft is None else f" with the draft {config.model.draft}"


if __name__ == "__main__":
    sys.exit(run(make_engine))
