"""What enters the engine (Request) and what leaves it (Tokens, Finished, Failed).

Plain frozen values that any process can hold; nothing here knows torch or HTTP.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from eaglerun.errors import RequestError

MAX_LOGPROBS = 20
MAX_DRAFT_TOKENS = 8
MAX_STOP_IDS = 64
MAX_LOGIT_BIAS = 300
MAX_INT = 2**31 - 1


class FinishReason(StrEnum):
    """Why a sequence ended. ``stop``: EOS, a stop token or a stop string. ``error``: the model's
    numbers for it were no longer finite."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to turn logits into tokens and when to stop; names and defaults are vLLM's.

    The logits of a row pass, in this order: logit_bias, repetition / frequency / presence
    penalty, min_tokens mask; then, where temperature > 0: temperature, min_p, top_k, top_p.

    temperature     0 is greedy.
    top_k           0 or -1 keeps all.
    seed            None lets the engine draw one (reported with the request's result).
    max_tokens      None means up to the model's length.
    logprobs        None: none; k: the sampled token and the k best, at most 20.
    num_draft_tokens  at most so many drafts a step for this request; None: as the engine does.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_draft_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if value is None:
                value = ()
            elif isinstance(value, str):
                value = (value,)
            elif not isinstance(value, list | tuple):
                raise RequestError(name, f"{value!r} is not a list")
            object.__setattr__(self, name, tuple(value))
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, dict):
            raise RequestError("logit_bias", f"{bias!r} does not map token ids to numbers")
        # A copy: the caller's dict may change while the request waits.
        object.__setattr__(self, "logit_bias", dict(bias))
        _check(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        """Whether a row's logits depend on the tokens before it."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check(p: SamplingParams) -> None:
    """Types and ranges of every field; RequestError names the first that is wrong."""
    for name, low, high in (
        ("temperature", 0.0, 100.0),
        ("min_p", 0.0, 1.0),
        ("presence_penalty", -2.0, 2.0),
        ("frequency_penalty", -2.0, 2.0),
        # Next to 0 it makes logits infinite in float32.
        ("repetition_penalty", 0.01, 100.0),
    ):
        _in_range(name, getattr(p, name), low, high)
    if not (_is_number(p.top_p) and 0 < p.top_p <= 1):
        raise RequestError("top_p", f"{p.top_p!r} is not in (0, 1]")
    for name, low, limit, optional in (
        ("top_k", -1, MAX_INT, False),
        ("min_tokens", 0, MAX_INT, False),
        ("n", 1, 128, False),
        ("max_tokens", 1, MAX_INT, True),
        ("logprobs", 0, MAX_LOGPROBS, True),
        ("prompt_logprobs", 0, MAX_LOGPROBS, True),
        ("num_draft_tokens", 0, MAX_DRAFT_TOKENS, True),
        ("seed", -(2**63), 2**63 - 1, True),
    ):
        value = getattr(p, name)
        if value is None and optional:
            continue
        if not _is_int(value):
            raise RequestError(name, f"{value!r} is not an integer")
        if not low <= value <= limit:
            raise RequestError(name, f"{value} must be in [{low}, {limit}]")
    for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
        if not isinstance(getattr(p, name), bool):
            raise RequestError(name, f"{getattr(p, name)!r} is not true or false")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError("min_tokens", f"{p.min_tokens} exceeds max_tokens = {p.max_tokens}")
    if any(not isinstance(s, str) or not s for s in p.stop):
        raise RequestError("stop", f"{p.stop!r} must be non-empty strings")
    for token in p.stop_token_ids:
        _check_token_id("stop_token_ids", token)
    for token, bias in p.logit_bias.items():
        _check_token_id("logit_bias", token)
        _in_range("logit_bias", bias, -100.0, 100.0)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_token_id(name: str, token: object) -> None:
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= MAX_INT:
        raise RequestError(name, f"{token!r} is not a token id")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not (_is_number(value) and low <= value <= high):
        raise RequestError(name, f"{value!r} is not in [{low:g}, {high:g}]")


@dataclass(frozen=True, slots=True)
class Request:
    """A user's wish. ``priority``: lower runs first, then arrival order.

    ``cache_salt`` separates prefix caches: two requests share blocks only if it is equal.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one token: its own, its rank (0 = best) and the best few.

    ``top`` holds (token id, log-probability), best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What speculation did for one sequence, or in total.

    steps       verify steps that judged at least one draft
    drafted     drafts judged;  accepted: drafts that were right
    acceptance_histogram  [a] = steps with exactly a accepted drafts
    judged_at   judged_at[i] = steps whose draft at position i was judged (offered)
    accepted_at accepted_at[i] = steps in which drafts 0..i were all accepted
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    judged_at: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """AL = 1 + accepted / steps: tokens per verify step, the target's own included."""
        return 1.0 + self.accepted / self.steps if self.steps else 1.0

    @property
    def acceptance_rate(self) -> float:
        """accepted / drafted; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens of sequence ``index`` of a request, all final.

    ``text`` is the text they complete (it may lag behind the ids by a character or a possible
    stop string). ``num_accepted``: how many of the step's drafts the target accepted, so the
    first ``min(num_accepted, len(token_ids))`` ids were drafted.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    text: str
    num_accepted: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """Sequence ``index`` ended; the last event of that sequence.

    ``stop_reason``: the stop string or stop token id that matched, None for EOS and lengths.
    ``num_cached_tokens``: prompt tokens that came from the prefix cache.
    """

    request_id: str
    index: int
    reason: FinishReason
    stop_reason: str | int | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_cached_tokens: int
    seed: int
    speculation: SpeculationStats
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without an answer. ``message`` is fit for the client."""

    request_id: str
    message: str


Event = Tokens | Finished | Failed
