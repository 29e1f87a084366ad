"""SlotRows: a batch's sampling parameters, each gathered once and only when asked for."""

import torch

from eaglerun.head import Head
from eaglerun.messages import SamplingParams
from eaglerun.sampling import Features, SamplingState
from eaglerun.speculative.verify import Drafts, Invariant

PARAMS = SamplingParams(temperature=0.5, top_k=3, seed=7)


def test_each_parameter_is_gathered_once_and_when_asked_for():
    state = SamplingState(3, 8, 1, torch.device("cpu"))
    state.admit(2, PARAMS, 7, (), (), (), 0)
    rows = state.rows(torch.tensor([2, 0]), Features.of([PARAMS]))
    assert rows.temperature.tolist() == [0.5, 0.0]
    state.admit(2, SamplingParams(temperature=0.9, top_k=4), 8, (), (), (), 0)
    # Asked for before: kept. Not asked for before: what the state holds now.
    assert rows.temperature.tolist() == [0.5, 0.0] and rows.sampled.tolist() == [True, False]
    assert rows.top_k.tolist() == [4, 0] and rows.seed.tolist() == [8, 0]
    assert rows.seeds(3).tolist() == [8, 8, 8, 0, 0, 0]
    assert rows.top_k is rows.top_k


def test_a_greedy_verify_gathers_nothing():
    state = SamplingState(3, 8, 1, torch.device("cpu"))
    rows = state.rows(torch.tensor([1]), Features.of([SamplingParams(temperature=0.0)]))
    before = set(vars(rows))
    drafts = Drafts(torch.tensor([[4, 2]]), torch.tensor([2]))
    logits = torch.eye(8)[torch.tensor([[4, 5, 6]])]
    judge = Invariant(Head(torch.Tensor.clone))
    judged = judge.judge(logits, drafts, torch.tensor([9]), rows)
    assert judged.emitted.tokens.tolist() == [[4, 5, -1]]
    assert set(vars(rows)) == before
