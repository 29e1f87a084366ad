"""Rank: what an engine asks of a device and its share of the models. No torch.

An engine has one rank today, in its own process (ranks/local.py). Of several, each would load,
measure and allocate its own share, and all would be launched with the same plan. A step whose
judgement waits for the host (masks of a grammar) would be launched in two calls, cut between the
target and the judge: begin(plan), then finish(masks). launch(plan) is both in one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from eaglerun.checkpoint.budget import KVBudget, MemoryUse
from eaglerun.plan.step import StepPlan, StepResult
from eaglerun.stats import Builds


@dataclass(frozen=True, slots=True)
class RankReady:
    """A rank's description of the models that it has loaded.

    has_draft     a draft is loaded and drafts are wanted
    path          the target's directory, if it has one
    on_gpu        the rank runs on a GPU, so that the host can plan while it does
    kv, least_kv  bytes of its KV memory, as the settings want it and at its narrowest
    """

    model_name: str
    path: Path | None
    tokenizer: Tokenizer | None
    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    has_draft: bool
    on_gpu: bool
    kv: KVBudget
    least_kv: KVBudget


class HiddenRows(Protocol):
    """Hidden states of the sequence in a slot, for whoever asked for them; the engine only files
    them."""

    @property
    def slot_id(self) -> int: ...


class Pending(Protocol):
    """A launched step."""

    @property
    def plan(self) -> StepPlan: ...

    @property
    def aux(self) -> Sequence[HiddenRows]:
        """What was captured, with return_aux_hidden_states; there once the result is."""

    def result(self, timeout_s: float) -> StepResult:
        """Wait for the step. RankFailed where it is not done after ``timeout_s``."""


class Rank(Protocol):
    """The calls come in this order; launch() as often as there are steps."""

    def load(self) -> RankReady:
        """Bring the models into memory. ConfigError, CheckpointError or CapacityError where they
        cannot be served as the settings want."""

    def rehearse(self) -> MemoryUse | None:
        """What everything but the KV blocks takes; None where memory is not measured."""

    def allocate(self, num_blocks: int, max_model_len: int, graph_bytes: int | None) -> None:
        """Make the KV memory and the state of the slots. ``graph_bytes``: what captured graphs may
        hold; None: as much as they like."""

    def prepare(self) -> None:
        """Make what steps would otherwise make when they first need it, as far as the settings
        want that done before the first."""

    def launch(self, plan: StepPlan) -> Pending:
        """Run one step, without waiting for it. Plans come in the order they were made."""

    @property
    def has_missed(self) -> bool:
        """True where steps did without something that can be made for the next ones."""

    def make_missed(self) -> None:
        """Make one such thing. No step may be in flight."""

    def builds(self) -> Builds:
        """Kernels and graphs that it has made. Reads counts, and may be called at any time."""

    def idle_builds(self) -> Builds:
        """Those of builds() that make_missed() made."""

    def close(self) -> None:
        """Let go of the models and of all memory. Nothing is launched any more."""
