"""Parts: what the two halves of a step, decode and prefill, work on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.head import Head
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.run.options import RunnerOptions
from eaglerun.run.state import DeviceState
from eaglerun.speculative.drafter import Drafter
from eaglerun.speculative.verify import Judge


@dataclass(frozen=True, slots=True)
class Parts:
    """The things of one rank.

    head     the target's
    drafter  None where there is no draft
    aux      [taps, max_rows, H], hidden states that a target forward captures; None where nobody
             reads them
    """

    options: RunnerOptions
    device: torch.device
    target: MiniMaxM3
    target_kv: TargetKV
    head: Head
    state: DeviceState
    judge: Judge
    drafter: Drafter | None
    aux: Tensor | None
