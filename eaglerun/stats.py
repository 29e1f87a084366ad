"""Counting acceptance: per sequence, in total, by position and by context length.

AL = 1 + accepted / steps, where a step is one verify of at least one draft. The identity
``emitted = sampled by prefill + decode rows + accepted - trimmed`` is asserted at each commit.
"""

from dataclasses import astuple, dataclass, field

from eaglerun.errors import EngineError
from eaglerun.messages import MAX_DRAFT_TOKENS, SpeculationStats


class AcceptanceCounter:
    """Running counts behind a SpeculationStats."""

    def __init__(self) -> None:
        self.steps = 0
        self.drafted = 0
        self.accepted = 0
        self._histogram = [0] * (MAX_DRAFT_TOKENS + 1)
        self._judged_at = [0] * MAX_DRAFT_TOKENS

    def add(self, num_drafts: int, num_accepted: int) -> None:
        """One verify of ``num_drafts`` >= 1 drafts, the first ``num_accepted`` of them right."""
        self.steps += 1
        self.drafted += num_drafts
        self.accepted += num_accepted
        self._histogram[num_accepted] += 1
        for i in range(num_drafts):
            self._judged_at[i] += 1

    def stats(self) -> SpeculationStats:
        width = max((i + 1 for i, n in enumerate(self._judged_at) if n), default=0)
        accepted_at = [sum(self._histogram[i + 1 :]) for i in range(width)]
        return SpeculationStats(
            steps=self.steps,
            drafted=self.drafted,
            accepted=self.accepted,
            acceptance_histogram=tuple(self._histogram[: width + 1]) if width else (),
            judged_at=tuple(self._judged_at[:width]),
            accepted_at=tuple(accepted_at),
        )


def context_bucket(num_tokens: int) -> int:
    """Upper end (exclusive, a power of two, at least 1024) of the bucket of a context length."""
    return max(1024, 1 << num_tokens.bit_length())


@dataclass(slots=True)
class EngineStats:
    """Totals since start. Tokens are counted after trimming unless the name says otherwise.

    prompt_tokens      prompt tokens of admitted requests (each request once)
    cached_tokens      of those, taken from the prefix cache
    emitted_tokens     tokens that left in Tokens events
    prefill_samples    tokens sampled by a final prefill chunk (after a preemption too)
    decode_rows        verify rows committed, with or without drafts
    trimmed_tokens     computed past an EOS, stop or length limit and dropped
    target_ms, draft_ms, step_ms  time of the steps and of its two models, on the device
    steps_discarded    rows computed for a sequence that had already ended
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    emitted_tokens: int = 0
    prefill_samples: int = 0
    decode_rows: int = 0
    trimmed_tokens: int = 0
    steps_discarded: int = 0
    preemptions: int = 0
    target_ms: float = 0.0
    draft_ms: float = 0.0
    step_ms: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    acceptance: AcceptanceCounter = field(default_factory=AcceptanceCounter)
    by_context: dict[int, AcceptanceCounter] = field(default_factory=dict)

    def add_decode_row(self, context_len: int, num_drafts: int, num_accepted: int) -> None:
        self.decode_rows += 1
        if num_drafts:
            self.acceptance.add(num_drafts, num_accepted)
            bucket = context_bucket(context_len)
            self.by_context.setdefault(bucket, AcceptanceCounter()).add(num_drafts, num_accepted)

    def check_identity(self) -> None:
        computed = self.prefill_samples + self.decode_rows + self.acceptance.accepted
        if self.emitted_tokens != computed - self.trimmed_tokens:
            raise EngineError(
                f"{self.emitted_tokens} tokens emitted, but {self.prefill_samples} prefill samples "
                f"+ {self.decode_rows} decode rows + {self.acceptance.accepted} accepted drafts "
                f"- {self.trimmed_tokens} trimmed = {computed - self.trimmed_tokens}"
            )


@dataclass(frozen=True, slots=True)
class Builds:
    """Kernels and graphs that a rank had to make before it could compute. A step that makes one
    takes as much longer, for every sequence in it.

    kernels_compiled, compile_s  compiled by Triton, and how long that took
    kernels_loaded, load_s       found in Triton's cache on disk instead, and read from there
    graphs_captured, capture_s   decode moves captured; kernels made meanwhile are in both times
    """

    kernels_compiled: int = 0
    compile_s: float = 0.0
    kernels_loaded: int = 0
    load_s: float = 0.0
    graphs_captured: int = 0
    capture_s: float = 0.0

    def since(self, then: "Builds") -> "Builds":
        """What was made after ``then``."""
        return Builds(*(a - b for a, b in zip(astuple(self), astuple(then), strict=True)))

    def plus(self, other: "Builds") -> "Builds":
        return Builds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class AcceptanceLog:
    """Decides when a line on acceptance is due, and words it.

    The first part is vLLM's sentence for the interval, the second ATOM's figures since start, so
    that what people grep for in their logs is found in ours.
    """

    def __init__(self, every: int, now_s: float) -> None:
        self._every = every
        self._then = SpeculationStats()
        self._then_s = now_s

    def line(self, now: SpeculationStats, now_s: float) -> str | None:
        """The line, once ``every`` more tokens were drafted; ``now_s`` is any steady clock."""
        drafted = now.drafted - self._then.drafted
        if not self._every or drafted < self._every:
            return None
        accepted = now.accepted - self._then.accepted
        steps = now.steps - self._then.steps
        seconds = max(now_s - self._then_s, 1e-9)
        before = self._then.accepted_at + (0,) * len(now.accepted_at)
        per_position = [(n - b) / steps for n, b in zip(now.accepted_at, before, strict=False)]
        self._then, self._then_s = now, now_s
        return (
            f"SpecDecoding metrics: Mean acceptance length: {1 + accepted / steps:.2f}, "
            f"Accepted throughput: {accepted / seconds:.2f} tokens/s, "
            f"Drafted throughput: {drafted / seconds:.2f} tokens/s, "
            f"Accepted: {accepted} tokens, Drafted: {drafted} tokens, "
            f"Per-position acceptance rate: {', '.join(f'{r:.3f}' for r in per_position)}, "
            f"Avg Draft acceptance rate: {100 * accepted / drafted:.1f}% | "
            f"since start: Average toks/fwd: {now.mean_acceptance_length:.2f}, "
            f"Accepted/Total Draft tokens: {now.accepted}/{now.drafted}, "
            f"Acceptance rate: {100 * now.acceptance_rate:.2f}%"
        )
