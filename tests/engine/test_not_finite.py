"""NaN and Inf in the model's numbers end the answers they touch, and no others."""

import math

import pytest
import torch
from pairs import tiny_pair

from eaglerun.config import resolve
from eaglerun.engine import Engine
from eaglerun.messages import Finished, FinishReason, Request, SamplingParams, Tokens
from eaglerun.ranks.local import runner_of
from eaglerun.start import start_engine

BAD = 7


def make_engine(lag: int, value: float | None) -> Engine:
    config = resolve({"draft": "d", "max_num_seqs": 4, "lag": lag, "num_kv_blocks": 200}, None, {})
    models = tiny_pair()
    if value is not None:
        models.target.embed_tokens.weight[BAD] = value
    return start_engine(config, models)


def request(name: str, prompt: tuple[int, ...], n: int = 1, **more: object) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, n=n, **more)
    return Request(name, prompt, params)


def answers(
    engine: Engine, requests: list[Request]
) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Tokens and reason by request and index."""
    for one in requests:
        engine.submit(one)
    tokens: dict[tuple[str, int], list[int]] = {}
    found = {}
    while engine.has_work:
        for event in engine.step():
            assert isinstance(event, Tokens | Finished)
            key = (event.request_id, event.index)
            if isinstance(event, Tokens):
                tokens.setdefault(key, []).extend(event.token_ids)
            else:
                assert key not in found
                found[key] = (tokens.get(key, []), event.reason)
    return found


GOOD = [
    # BAD is never sampled, for its logit is as low as it can be.
    request("a", (1, 2, 3), logit_bias={BAD: -100.0}),
    request("b", (4, 5, 6, 8, 9, 10, 11, 12), n=2, logit_bias={BAD: -100.0}),
]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_ends_its_own_answer(lag: int, value: float):
    alone = answers(make_engine(lag, None), GOOD)
    engine = make_engine(lag, value)
    bad = [
        # In the prompt; sampled as the first token; in a prompt of several chunks.
        request("prompt", (1, BAD, 2)),
        request("sampled", (1, 2), logit_bias={BAD: 100.0}),
        request("several", (1, BAD, 2), n=2),
    ]
    found = answers(engine, [bad[0], GOOD[0], bad[1], GOOD[1], bad[2]])
    for key, expected in alone.items():
        assert found[key] == expected and expected[1] is FinishReason.LENGTH
    assert found["prompt", 0] == ([], FinishReason.ERROR)
    assert found["several", 0] == found["several", 1] == ([], FinishReason.ERROR)
    # The token itself was sampled from good numbers; what follows it is not.
    assert found["sampled", 0] == ([BAD], FinishReason.ERROR)
    assert engine.stats.finished[FinishReason.ERROR] == 4
    assert engine.num_running == 0 and engine.pool.num_held == 0
    # What comes after is as before, from the cache too.
    assert answers(engine, GOOD) == alone


def test_a_chunk_that_is_not_finite_is_not_cached():
    engine = make_engine(0, math.nan)
    prompt = (1, 2, 3, 4, BAD, 5, 6, 8, 9, 10)
    for _ in range(2):
        found = answers(engine, [request("r", prompt)])
        assert found["r", 0] == ([], FinishReason.ERROR)
        assert engine.pool.num_held == 0
    runner_of(engine).target.embed_tokens.weight[BAD] = torch.zeros(())
    assert answers(engine, [request("r", prompt)])["r", 0][1] is FinishReason.LENGTH
