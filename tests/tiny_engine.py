"""The real engine with a small random pair, for the process around it; float64, so that a row's
neighbours cannot turn a greedy choice.

python tests/tiny_engine.py --checkpoint DIRECTORY
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fake_engine import TOKENIZER
from pairs import tiny_pair
from replayed import Replayed

from eaglerun.config import Config
from eaglerun.run import decode
from eaglerun.server.engine_process import Served, run
from eaglerun.start import start_engine, warm_up


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--poison", type=int, help="a token whose embedding becomes NaN")
    parser.add_argument("--broken-layer", type=int, help="a layer whose weights are NaN")
    parser.add_argument("--captures", action="store_true", help="moves are captured, as on a GPU")
    flags = parser.parse_args()
    if flags.captures:
        decode.Graphs = Replayed
    checkpoint = flags.checkpoint
    torch.set_num_threads(1)

    def make_engine(config: Config, progress: Callable[[str], None]) -> Served:
        models = tiny_pair(vocab_size=TOKENIZER.get_vocab_size(), noise=0.3)
        models = dataclasses.replace(models, tokenizer=TOKENIZER, path=checkpoint)
        if flags.broken_layer is not None:
            models.target.layers[flags.broken_layer].self_attn.o_proj.weight.fill_(torch.nan)
        engine = start_engine(config, models, served=True)
        warm_up(engine)
        if flags.poison is not None:
            models.target.embed_tokens.weight[flags.poison] = torch.nan
        return Served(engine, checkpoint)

    return run(make_engine)


if __name__ == "__main__":
    sys.exit(main())
