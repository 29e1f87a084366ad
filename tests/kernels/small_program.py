"""Prints the program of one small kernel on sm_90, as JSON."""

import json

import torch

from eaglerun.kernels import launch
from eaglerun.kernels.ahead import Program, recording
from eaglerun.kernels.draft_inputs import kv_slots_of

found: list[Program] = []
with launch.for_arch("sm_90"), recording("sm_90", found.append):
    for rows in (5, 16):
        positions = torch.empty(rows, 1, dtype=torch.int64, device="meta")
        table = torch.empty(rows, 7, dtype=torch.int32, device="meta")
        kv_slots_of(positions, table, 128)
[program] = found
print(json.dumps(program))
