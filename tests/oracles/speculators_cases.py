"""Small EAGLE3 drafts, and what the `speculators` package computes for them.

`speculators` trains published drafts. It is no dependency of the tests: the package's numbers lie
in `speculators.json`, beside the command that recorded them (`record_speculators.py`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from oracles.drafts import TOGGLES, draft_config, random_weights, taps_of
from pairs import target_spec

RECORD = Path(__file__).with_name("speculators.json")
PASSES = 4
VOCAB = 11
# The toggles that the package has. It knows no narrow draft and no scaled logits.
NAMES = (
    "plain",
    "fc_norm",
    "norm_before_fc",
    "norm_output",
    "norm_before_residual",
    "eagle_3_1",
    "eagle_3_1_gqa",
    "reduced_vocab_3_1",
    "attention_bias",
    "five_taps",
)


@dataclass(frozen=True)
class DraftCase:
    """One draft and the rows that it is given.

    ``tokens`` are 9 ids; ``aux`` [taps, 8, 32] are the target's tapped states of positions 0 to 7.
    """

    config: dict[str, Any]
    weights: dict[str, np.ndarray]
    tokens: list[int]
    aux: np.ndarray

    @property
    def rows(self) -> list[list[np.ndarray]]:
        """The tapped states of each position."""
        return [list(self.aux[:, j]) for j in range(self.aux.shape[1])]

    @property
    def kept_ids(self) -> np.ndarray:
        """The target's id of each row of the draft's head."""
        return np.arange(len(self.weights["lm_head.weight"])) + self.weights.get("d2t", 0)

    def digest(self) -> str:
        """A hash of every number of the case, rounded, so that a record names its inputs."""
        total = hashlib.sha256(json.dumps([self.config, self.tokens], sort_keys=True).encode())
        for name in sorted(self.weights):
            total.update(name.encode() + np.round(self.weights[name], 4).tobytes())
        total.update(np.round(self.aux, 4).tobytes())
        return total.hexdigest()


@dataclass(frozen=True)
class Recorded:
    """What the package computed for one case.

    ``digest`` names the inputs; ``tokens`` [PASSES] are the ids that greedy passes choose;
    ``logits`` [8, draft vocabulary] are those of the first pass.
    """

    digest: str
    tokens: list[int]
    logits: list[list[float]]


def draft_case(name: str) -> DraftCase:
    spec = dataclasses.replace(target_spec(VOCAB, 4), max_position_embeddings=128)
    config = draft_config(spec, **TOGGLES[name])
    generator = np.random.default_rng(5)
    tokens = [int(t) for t in generator.integers(0, VOCAB, 9)]
    aux = generator.normal(size=(len(taps_of(config)), len(tokens) - 1, 32))
    return DraftCase(config, random_weights(config, 5), tokens, aux)


def read_record() -> Mapping[str, Recorded]:
    cases = json.loads(RECORD.read_text())["cases"]
    return {name: Recorded(**case) for name, case in cases.items()}
