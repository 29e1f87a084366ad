"""python -m eaglerun.server.engine_main: the engine process with the real engine in it."""

import sys
from collections.abc import Callable

from torch import Tensor, nn

from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.errors import CheckpointError
from eaglerun.loader import load_models
from eaglerun.messages import Finished, FinishReason, Request, SamplingParams
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
    """Answer one short request, where one fits. CheckpointError if its numbers are not finite."""
    if engine.max_model_len <= len(WARM_UP.prompt_ids):
        return
    reasons = answer_warm_up(engine)
    if FinishReason.ERROR in reasons:
        raise CheckpointError(
            f"{engine.model_name}: the model computes NaN or Inf{first_broken_layer(engine)}; "
            "another dtype may help, or the checkpoint is broken"
        )


def answer_warm_up(engine: Engine) -> set[FinishReason]:
    """Why the answer ended."""
    engine.submit(WARM_UP)
    reasons = set()
    while engine.has_work:
        reasons |= {event.reason for event in engine.step() if isinstance(event, Finished)}
    return reasons


def first_broken_layer(engine: Engine) -> str:
    """ ", first in layer N", by the same request once more with an eye on every layer."""
    target, found = engine.runner.target, []

    def watch(name: str) -> Callable[[object, object, object], None]:
        def look(module: object, args: object, output: object) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            for tensor in tensors:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    if not tensor.isfinite().all():
                        found.append(name)

        return look

    watched: list[tuple[str, nn.Module]] = [("the embedding", target.embed_tokens)]
    watched += [(f"layer {i}", layer) for i, layer in enumerate(target.layers)]
    handles = [module.register_forward_hook(watch(name)) for name, module in watched]
    try:
        answer_warm_up(engine)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in {found[0]}" if found else ""


def _with_draft(config: Config) -> str:
    return "" if config.model.draft is None else f" with the draft {config.model.draft}"


if __name__ == "__main__":
    sys.exit(run(make_engine))
