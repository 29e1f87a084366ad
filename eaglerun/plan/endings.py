"""When a sequence ends, and why: EOS, stop tokens and strings, max_tokens, max_model_len."""

from dataclasses import dataclass
from typing import NamedTuple

from eaglerun.messages import Finished, FinishReason, TokenLogprobs, Tokens
from eaglerun.plan.limits import SchedulerLimits
from eaglerun.plan.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a sequence ends; ``stop_reason``: the stop token or stop string that it met."""

    reason: FinishReason
    stop_reason: str | int | None = None


class Taken(NamedTuple):
    """The part of a step that a sequence took: ``num_tokens`` tokens, and their text. A tuple,
    because one is made for every row of every step."""

    num_tokens: int
    text: str
    ending: Ending | None


def tokens_left(seq: Sequence, limits: SchedulerLimits) -> int:
    """Tokens that max_tokens still allows, by the lower bound of the length."""
    if seq.sampling.max_tokens is None:
        return limits.max_model_len
    return seq.num_prompt_tokens + seq.sampling.max_tokens - seq.min_len


def may_have_ended(seq: Sequence, limits: SchedulerLimits) -> bool:
    """True where a step in flight may bring, or surely brings, the sequence to its end."""
    return (
        seq.abort_requested
        or seq.preempt_requested
        or tokens_left(seq, limits) <= 0
        or seq.max_len >= limits.max_model_len
    )


def take(seq: Sequence, tokens: tuple[int, ...], limits: SchedulerLimits) -> Taken:
    """Append a step's tokens to the sequence, up to the earliest end among them.

    The tokens after that end are dropped: the sequence never had them.
    """
    ending: Ending | None = None
    text = []
    num_tokens = 0
    for token in tokens:
        seq.token_ids.append(token)
        num_tokens += 1
        ending, piece = _at_newest(seq, token, limits)
        text.append(piece)
        if ending is not None:
            break
    if ending is None and seq.abort_requested:
        ending = Ending(FinishReason.ABORT)
    if ending is not None and seq.text is not None:
        text.append(seq.text.finish())
    return Taken(num_tokens, "".join(text), ending)


def _at_newest(seq: Sequence, token: int, limits: SchedulerLimits) -> tuple[Ending | None, str]:
    """Tells if the sequence ends with its newest token, and gives that token's text."""
    sampling = seq.sampling
    may_stop = seq.num_output_tokens > sampling.min_tokens
    eos = not sampling.ignore_eos and token in limits.eos_token_ids
    if may_stop and (eos or token in sampling.stop_token_ids):
        named = token if token in sampling.stop_token_ids else None
        shown = ""
        if named is not None and sampling.include_stop_str_in_output and seq.text is not None:
            shown = seq.text.push(token, may_stop=False).text
        return Ending(FinishReason.STOP, named), shown
    text = ""
    if seq.text is not None:
        delta = seq.text.push(token, may_stop)
        text = delta.text
        if delta.stop is not None:
            return Ending(FinishReason.STOP, delta.stop), text
    limit = sampling.max_tokens
    if limit is not None and seq.num_output_tokens >= limit:
        return Ending(FinishReason.LENGTH), text
    if len(seq.token_ids) >= limits.max_model_len:
        return Ending(FinishReason.LENGTH), text
    return None, text


def tokens_event(
    seq: Sequence,
    tokens: tuple[int, ...],
    text: str,
    num_accepted: int,
    logprobs: tuple[TokenLogprobs, ...],
) -> Tokens:
    """Tell of a sequence's new tokens, with as many log-probabilities as it asked for."""
    wanted = seq.sampling.logprobs
    told = () if wanted is None else tuple(_best(lp, wanted) for lp in logprobs[: len(tokens)])
    return Tokens(seq.request.request_id, seq.index, tokens, text, num_accepted, told)


def _best(logprobs: TokenLogprobs, count: int) -> TokenLogprobs:
    if len(logprobs.top) <= count:
        return logprobs
    top = logprobs.top[:count]
    return TokenLogprobs(logprobs.token_id, logprobs.logprob, logprobs.rank, top)


def finished(seq: Sequence, ending: Ending) -> Finished:
    """The last event of a sequence."""
    asked = seq.sampling.prompt_logprobs is not None
    return Finished(
        request_id=seq.request.request_id,
        index=seq.index,
        reason=ending.reason,
        stop_reason=ending.stop_reason,
        num_prompt_tokens=seq.num_prompt_tokens,
        num_output_tokens=seq.num_output_tokens,
        num_cached_tokens=seq.num_cached_tokens or 0,
        seed=seq.seed,
        speculation=seq.acceptance.stats(),
        prompt_logprobs=(None, *seq.prompt_logprobs) if asked else None,
    )
