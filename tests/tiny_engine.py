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

from eaglerun.config import Config
from eaglerun.engine import Engine
from eaglerun.server.engine_main import warm_up
from eaglerun.server.engine_process import Served, run


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    checkpoint = parser.parse_args().checkpoint
    torch.set_num_threads(1)

    def make_engine(config: Config, progress: Callable[[str], None]) -> Served:
        models = tiny_pair(vocab_size=TOKENIZER.get_vocab_size(), noise=0.3)
        models = dataclasses.replace(models, tokenizer=TOKENIZER, path=checkpoint)
        engine = Engine(config, models)
        warm_up(engine)
        return Served(engine, checkpoint)

    return run(make_engine)


if __name__ == "__main__":
    sys.exit(main())
