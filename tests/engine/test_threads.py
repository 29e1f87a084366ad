"""The number of threads on the CPU: the rule, the setting, and how threads wait."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from eaglerun import threads

MIB = 1 << 20


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "AVAILABLE", 8)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.mark.parametrize(
    ("mib", "count"), [(0, 1), (63, 1), (64, 1), (127, 1), (128, 2), (192, 3), (511, 7), (4096, 8)]
)
@pytest.mark.usefixtures("eight_cores")
def test_a_thread_for_each_64_mib_of_weights(mib: int, count: int):
    assert threads.cpu_threads(None, mib * MIB) == count


@pytest.mark.usefixtures("eight_cores")
def test_the_setting_goes_before_the_rule():
    assert threads.cpu_threads(5, 0) == 5
    assert threads.cpu_threads(1, 4096 * MIB) == 1


@pytest.mark.parametrize("policy", [None, "active"])
@pytest.mark.usefixtures("eight_cores")
def test_threads_that_spin_are_not_used(policy: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert threads.cpu_threads(None, 4096 * MIB) == 1
    assert threads.cpu_threads(4, 4096 * MIB) == 4


@pytest.mark.usefixtures("eight_cores")
def test_the_weights_of_both_models_count(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    # 64 MiB each
    wide, other = (nn.Linear(4096, 4096, bias=False, device="meta") for _ in range(2))
    assert threads.use_threads(None, [wide]) == 1
    assert threads.use_threads(None, [wide, other]) == 2
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("first", "told"), [("eaglerun", "passive"), ("torch", "None"), ("torch, eaglerun", "None")]
)
def test_waiting_is_passive_where_torch_comes_later(first: str, told: str):
    script = f"import os, {first}; print(os.environ.get('OMP_WAIT_POLICY'))"
    shown = subprocess.run(
        [sys.executable, "-c", script], env={}, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == told
