"""Counting an answer: OpenAI's usage object, and what speculation did for it."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from eaglerun.messages import Finished, SpeculationStats


def usage(finished: Iterable[Finished], num_reasoning_tokens: int) -> dict[str, Any]:
    """Tokens of all choices; each prompt counts once, however many answers it had."""
    first = {}
    num_output = 0
    for event in finished:
        num_output += event.num_output_tokens
        if event.request_id not in first or event.index == 0:
            first[event.request_id] = event
    num_prompt = sum(event.num_prompt_tokens for event in first.values())
    num_cached = sum(event.num_cached_tokens for event in first.values())
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning_tokens},
    }


def usage_so_far(num_prompt: int, num_output: int, num_reasoning: int | None) -> dict[str, Any]:
    """The usage of an answer that goes on; what came from a cache is known at its end."""
    found: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
    }
    if num_reasoning is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": num_reasoning}
    return found


def speculation_metrics(
    per_choice: Sequence[SpeculationStats], num_draft_tokens: int
) -> dict[str, Any]:
    """The ``metrics`` object: vLLM's numbers over all choices, and for each of several."""
    report = _report(sum_stats(per_choice), num_draft_tokens)
    if len(per_choice) > 1:
        report["per_choice"] = [_report(stats, num_draft_tokens) for stats in per_choice]
    return {"speculative_decoding": report}


def _report(stats: SpeculationStats, num_draft_tokens: int) -> dict[str, Any]:
    judged = zip(stats.accepted_at, stats.judged_at, strict=True)
    return {
        "mean_acceptance_length": round(stats.mean_acceptance_length, 4),
        "draft_acceptance_rate": round(stats.acceptance_rate, 4),
        "acceptance_histogram": list(stats.acceptance_histogram),
        "num_spec_steps": stats.steps,
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.drafted,
        "num_spec_tokens": num_draft_tokens,
        "num_draft_tokens_per_pos": list(stats.judged_at),
        "num_accepted_tokens_per_pos": list(stats.accepted_at),
        "acceptance_rate_per_pos": [round(a / j, 4) if j else 0.0 for a, j in judged],
    }


def sum_stats(several: Sequence[SpeculationStats]) -> SpeculationStats:
    """Counts of several sequences as one."""

    def add(columns: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
        return tuple(sum(column) for column in zip_longest(*columns, fillvalue=0))

    return SpeculationStats(
        steps=sum(stats.steps for stats in several),
        drafted=sum(stats.drafted for stats in several),
        accepted=sum(stats.accepted for stats in several),
        acceptance_histogram=add(stats.acceptance_histogram for stats in several),
        judged_at=add(stats.judged_at for stats in several),
        accepted_at=add(stats.accepted_at for stats in several),
    )


def debug_speculation(stats: SpeculationStats, enabled: bool) -> dict[str, Any]:
    """Totals since start, in the shape of ATOM's /debug/mtp_stats."""
    counts = dict(enumerate(stats.acceptance_histogram))
    total = sum(counts.values())
    return {
        "enabled": enabled,
        "total_draft_tokens": stats.drafted,
        "total_accepted_tokens": stats.accepted,
        "acceptance_rate": stats.acceptance_rate,
        "average_tokens_per_forward": stats.mean_acceptance_length,
        "distribution": {str(n): count for n, count in counts.items()},
        "distribution_percent": {str(n): count / total for n, count in counts.items() if total},
    }
