"""What the device did in a profile: kernels by group, by step, and the time in which none ran.

Read from the trace events of torch.profiler (the Chrome trace format), where a kernel and the call
that launched it share a correlation id, and the call lies inside the step's annotation. On a CPU
the outermost operators stand for kernels.
"""

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from eaglerun import kernels

STEP = "bench step "
OTHER, LINEAR = "other", "linear"
# Modules of eaglerun.kernels by the beginning of their name, and what their kernels count as.
GROUPS = {
    "attention_dense": "dense attention",
    "attention_sparse": "sparse attention",
    "index_topk": "index scan",
    "moe": "MoE",
    "linear": LINEAR,
    "rmsnorm": "norms",
    "draft_fuse": "norms",
}
# Joins the splits of whichever attention ran before it.
FOLLOWS = "merge_kernel"
_PRODUCT = re.compile(
    r"gemm|nvjet|cutlass|splitk|cublas|Cijk|^aten::(linear|mm|addmm|matmul)", re.I
)


_DEFINITION = re.compile(r"^def (\w+_kernel)\(", re.M)


@dataclass(frozen=True, slots=True)
class Activity:
    """Something that ran on the device. Times in microseconds; ``step``: in which step's
    annotation it was launched, None outside of all. Not ``is_kernel``: a copy or a fill."""

    name: str
    begin_us: float
    end_us: float
    step: int | None
    is_kernel: bool = True

    @property
    def us(self) -> float:
        return self.end_us - self.begin_us


def parse(events: Iterable[Mapping[str, Any]]) -> list[Activity]:
    """The device's activities, in order of their begin. ``events``: a trace's traceEvents."""
    spans = [e for e in events if e.get("ph") == "X"]
    device = [e for e in spans if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    steps = sorted(
        (float(e["ts"]), float(e["ts"]) + float(e["dur"]), int(e["name"].removeprefix(STEP)))
        for e in spans
        if e.get("cat") == "user_annotation" and e["name"].startswith(STEP)
    )
    launched: dict[int, float] = {}
    for e in spans:
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", ()):
            launched.setdefault(e["args"]["correlation"], float(e["ts"]))
    if not device:
        device = _outermost([e for e in spans if e.get("cat") == "cpu_op"])
        launched = {}
    found = []
    for e in device:
        begin = float(e["ts"])
        at = begin if e["cat"] == "cpu_op" else launched.get(e["args"].get("correlation", -1))
        found.append(
            Activity(
                e["name"],
                begin,
                begin + float(e["dur"]),
                None if at is None else _step_at(steps, at),
                e["cat"] in ("kernel", "cpu_op"),
            )
        )
    return sorted(found, key=lambda a: a.begin_us)


def _outermost(spans: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Spans that lie in no other of their thread."""
    found = []
    ends: dict[object, float] = {}
    for e in sorted(spans, key=lambda e: (float(e["ts"]), -float(e["dur"]))):
        if float(e["ts"]) >= ends.get(e.get("tid"), float("-inf")):
            ends[e.get("tid")] = float(e["ts"]) + float(e["dur"])
            found.append(e)
    return found


def _step_at(steps: Sequence[tuple[float, float, int]], at: float) -> int | None:
    i = bisect_right(steps, (at, float("inf"), 0)) - 1
    return steps[i][2] if i >= 0 and at <= steps[i][1] else None


@cache
def _own_kernels() -> dict[str, str]:
    """Names of this build's kernels and their groups, by the files that define them."""
    found: dict[str, str] = {}
    for folder in kernels.__path__:
        for file in Path(folder).glob("*.py"):
            group = next((g for prefix, g in GROUPS.items() if file.stem.startswith(prefix)), OTHER)
            found |= dict.fromkeys(_DEFINITION.findall(file.read_text("utf-8")), group)
    return found


def group_of(name: str, before: str = OTHER) -> str:
    """The group of a kernel by its name; ``before``: the group of the kernel before it."""
    if name.startswith(FOLLOWS):
        return before
    own = _own_kernels()
    if name in own:
        return own[name]
    return LINEAR if _PRODUCT.search(name) else OTHER


@dataclass(frozen=True, slots=True)
class Share:
    """Of one group, or one kernel: milliseconds and launches, a step."""

    name: str
    ms: float
    count: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Of ``num_steps`` steps, from the begin of their first kernel to the end of their last.

    step_ms        that time, a step
    idle           share of it in which the device did nothing
    no_kernel      share of it in which no kernel ran; copies and fills count as nothing
    between_steps  share of it between the last activity of a step and the first of the next;
                   None where the trace does not tell the steps apart
    groups         every group, longest first;  top: every kernel name, longest first; a kernel's
                   time counts from the end of those that began before it
    """

    num_steps: int
    step_ms: float
    idle: float
    no_kernel: float
    between_steps: float | None
    groups: tuple[Share, ...]
    top: tuple[Share, ...]

    def group_ms(self, name: str) -> float:
        return sum(share.ms for share in self.groups if share.name == name)


def summarize(activities: Sequence[Activity], num_steps: int) -> Summary:
    """Of the activities that belong to a step; of all, where the trace does not say which.

    Raises  ValueError if there is no kernel.
    """
    steps = sorted({a.step for a in activities if a.step is not None})
    inside = [a for a in activities if a.step is not None] if steps else activities
    kernels_only = [a for a in inside if a.is_kernel]
    if not kernels_only:
        raise ValueError(f"a profile of {len(activities)} activities has no kernel")
    begin = min(a.begin_us for a in kernels_only)
    end = max(a.end_us for a in kernels_only)
    inside = [a for a in inside if a.end_us > begin and a.begin_us < end]
    span = end - begin
    edges = [
        (
            max(begin, min(a.begin_us for a in inside if a.step == step)),
            min(end, max(a.end_us for a in inside if a.step == step)),
        )
        for step in steps
    ]
    gaps = [max(0.0, after[0] - before[1]) for before, after in itertools.pairwise(edges)]
    count = len(steps) or num_steps
    return Summary(
        num_steps=count,
        step_ms=span / count / 1e3,
        idle=1 - _covered(inside, begin, end) / span,
        no_kernel=1 - _covered(kernels_only, begin, end) / span,
        between_steps=sum(gaps) / span if steps else None,
        groups=_shares(grouped(kernels_only), count),
        top=_shares([(a.name, a) for a in kernels_only], count),
    )


def grouped(activities: Iterable[Activity]) -> list[tuple[str, Activity]]:
    """Each kernel with its group; the activities are in order."""
    found = []
    before = OTHER
    for a in activities:
        before = group_of(a.name, before)
        found.append((before, a))
    return found


def _shares(named: Sequence[tuple[str, Activity]], num_steps: int) -> tuple[Share, ...]:
    """Of activities in order of their begin."""
    spent: dict[str, tuple[float, int]] = {}
    reached = -math.inf
    for name, a in named:
        us, count = spent.get(name, (0.0, 0))
        # One that has begun while another still ran has waited for it until then.
        spent[name] = (us + max(0.0, a.end_us - max(a.begin_us, reached)), count + 1)
        reached = max(reached, a.end_us)
    shares = [Share(n, us / num_steps / 1e3, c / num_steps) for n, (us, c) in spent.items()]
    return tuple(sorted(shares, key=lambda share: -share.ms))


def _covered(activities: Sequence[Activity], begin: float, end: float) -> float:
    """Length of the union, within [begin, end]; the activities are in order of their begin."""
    total, reached = 0.0, begin
    for a in activities:
        total += max(0.0, min(a.end_us, end) - max(a.begin_us, reached))
        reached = max(reached, a.end_us)
    return total
