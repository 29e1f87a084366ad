"""The draft's oracle against the `speculators` package's Eagle3, which trains published drafts.

The engine's draft is held against the same oracle in test_eagle3_oracle.py.
"""

import numpy as np
import pytest
from oracles.eagle3 import Eagle3Oracle
from oracles.speculators_cases import NAMES, PASSES, draft_case, read_record


@pytest.mark.parametrize("name", NAMES)
def test_every_pass_equals_the_packages(name: str) -> None:
    """Each draft token of greedy propose is the package's choice, and the first pass's logits of
    every row are its logits to float32, in which it norms and rotates."""
    case, recorded = draft_case(name), read_record()[name]
    assert case.digest() == recorded.digest, "other inputs: run tests/oracles/record_speculators.py"
    oracle = Eagle3Oracle(case.config, case.weights)
    rows = case.rows
    assert oracle.propose(case.tokens, rows, PASSES).tokens == recorded.tokens
    states = [oracle.fuse(row) for row in rows]
    own = oracle.rows(case.tokens[1:], states, range(len(rows)))
    np.testing.assert_allclose(recorded.logits, [s.logits for s in own], rtol=1e-5, atol=1e-5)
