"""A step's result is waited for, but not for ever."""

import pytest
import torch

from eaglerun.errors import EngineError, RankFailed
from eaglerun.plan.step import StepPlan
from eaglerun.run.pending import Clock, PendingStep

PLAN = StepPlan(7, (), (), (), (), 0, 0, -1)


class Event:
    """A device's event that is reached after ``questions`` of them."""

    questions = 0

    def __init__(self, enable_timing: bool) -> None:
        self._left = self.questions

    def record(self) -> None: ...

    def query(self) -> bool:
        self._left -= 1
        return self._left < 0

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


def pending(monkeypatch: pytest.MonkeyPatch, questions: int) -> PendingStep:
    monkeypatch.setattr(Event, "questions", questions)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    clock.end()
    return PendingStep(PLAN, None, None, [], clock)


def test_a_device_that_hangs_is_told_of(monkeypatch: pytest.MonkeyPatch):
    step = pending(monkeypatch, 10**9)
    with pytest.raises(RankFailed, match="step 7 is not done after 0.01 s: the device hangs"):
        step.result(0.01)
    assert issubclass(RankFailed, EngineError)


def test_a_device_that_is_late_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    result = pending(monkeypatch, 50).result(60)
    assert result.step_id == 7 and result.times.total_ms == 1.0


def test_a_device_that_is_done_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    assert pending(monkeypatch, 0).result(0).step_id == 7
