"""StepPlan goes down to the ranks, StepResult comes back: all that crosses between them.

Ints, floats, strings and tuples only, so that a plan can be logged, sent, replayed and compared:
a bug report is a list of StepPlans.
"""

from dataclasses import dataclass

from eaglerun.messages import SamplingParams, TokenLogprobs

# A launched step that is not done after so long never will be: a device or a rank hangs. The widest
# prefill takes seconds; what is compiled or captured first is done before a launch returns.
STEP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot, new or back from preemption.

    prompt_ids, output_ids  the history the penalties count; empty where none is asked for
    num_output_tokens       tokens generated before (0 unless preempted)
    carry_block             block whose carry precedes the first computed row; -1: start at 0
    """

    slot_id: int
    sampling: SamplingParams
    seed: int
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    num_output_tokens: int
    carry_block: int


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Block-table entries ``first_index ...`` of a slot become ``block_ids``."""

    slot_id: int
    first_index: int
    block_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One running sequence: verify its first ``num_drafts`` drafts, then draft ``num_propose``.

    ``max_len``: the host's upper bound of the sequence's length before this step, its last
    sampled token included (the true length is on the device when the host runs ahead).
    """

    slot_id: int
    num_drafts: int
    num_propose: int
    max_len: int

    @property
    def max_emitted(self) -> int:
        """Tokens that the step emits at most: all the drafts, and the target's own."""
        return self.num_drafts + 1

    @property
    def min_emitted(self) -> int:
        return 1


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Tokens of one sequence whose KV is computed in this step, at positions start, start + 1...

    next_token       the known token after the chunk; -1 where the chunk samples it
    num_propose      drafts to propose after sampling
    prompt_logprobs  how many best log-probabilities of each next prompt token; -1: none
    """

    slot_id: int
    token_ids: tuple[int, ...]
    start: int
    next_token: int
    num_propose: int
    prompt_logprobs: int = -1

    @property
    def samples(self) -> bool:
        return self.next_token < 0

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def max_emitted(self) -> int:
        """Tokens that the step emits at most, and at least: the one it samples, if it does."""
        return int(self.samples)

    @property
    def min_emitted(self) -> int:
        return int(self.samples)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of every rank.

    num_drafts   K_in: the verify is padded to num_drafts + 1 rows a sequence
    num_propose  K_out: draft passes run, the largest num_propose of the rows
    num_logprobs best log-probabilities to return with each sampled token; -1: none at all
    """

    step_id: int
    admissions: tuple[Admission, ...]
    blocks: tuple[BlockUpdate, ...]
    decode: tuple[DecodeRow, ...]
    prefill: tuple[PrefillChunk, ...]
    num_drafts: int
    num_propose: int
    num_logprobs: int


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Wall time of a step's parts on rank 0, milliseconds."""

    target_ms: float = 0.0
    draft_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed, untrimmed.

    decode[b]            emitted ids of decode row b: num_accepted[b] accepted drafts, then the
                         target's own token (correction or bonus)
    prefill[c]           id sampled after chunk c, -1 where the chunk samples none
    decode_logprobs[b]   one per emitted id; empty where none was asked for
    prefill_logprobs[c]  of the sampled id; None where none was asked for
    prompt_logprobs[c]   of the token that follows each of the chunk's, as far as it is known before
                         sampling (one fewer in a chunk that samples); () where not asked
    drafts[b]            proposed after decode row b, its num_propose of them, for the next step to
                         judge; prefill_drafts[c] likewise after chunk c; empty where none was made
    num_experts          distinct experts read by the decode rows, summed over the layers
    broken[b]            the target's numbers for decode row b are not finite: its ids mean nothing;
                         broken_prefill[c] likewise of chunk c; empty where none is
    """

    step_id: int
    decode: tuple[tuple[int, ...], ...]
    num_accepted: tuple[int, ...]
    prefill: tuple[int, ...]
    decode_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    prefill_logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()
    prefill_drafts: tuple[tuple[int, ...], ...] = ()
    num_experts: int = 0
    broken: tuple[bool, ...] = ()
    broken_prefill: tuple[bool, ...] = ()
    times: StepTimes = StepTimes()
