"""Counts of acceptance, and the lines that report them."""

import pytest

from eaglerun.errors import EngineError
from eaglerun.stats import (
    AcceptanceCounter,
    AcceptanceLog,
    EngineStats,
    context_bucket,
)


def counter(*pairs: tuple[int, int]) -> AcceptanceCounter:
    made = AcceptanceCounter()
    for drafts, accepted in pairs:
        made.add(drafts, accepted)
    return made


def test_positions_and_histogram():
    stats = counter((3, 3), (3, 0), (3, 1), (2, 2)).stats()
    assert stats.steps == 4 and stats.drafted == 11 and stats.accepted == 6
    assert stats.acceptance_histogram == (1, 1, 1, 1)
    assert stats.judged_at == (4, 4, 3)
    assert stats.accepted_at == (3, 2, 1)
    assert stats.accepted == sum(stats.accepted_at)
    assert stats.mean_acceptance_length == 2.5


def test_nothing_drafted():
    stats = AcceptanceCounter().stats()
    assert stats.acceptance_histogram == () and stats.mean_acceptance_length == 1.0


def test_identity_is_checked():
    stats = EngineStats(prefill_samples=1, emitted_tokens=1)
    stats.add_decode_row(100, 3, 2)
    stats.emitted_tokens += 3
    stats.check_identity()
    stats.emitted_tokens += 1
    with pytest.raises(EngineError, match="5 tokens emitted, but 1 prefill samples"):
        stats.check_identity()


def test_context_buckets():
    assert [context_bucket(n) for n in (1, 1023, 1024, 2047, 2048, 5000)] == [
        1024, 1024, 2048, 2048, 4096, 8192,
    ]  # fmt: skip
    stats = EngineStats()
    stats.add_decode_row(10, 3, 1)
    stats.add_decode_row(3000, 3, 3)
    stats.add_decode_row(3000, 0, 0)
    assert {k: c.accepted for k, c in stats.by_context.items()} == {1024: 1, 4096: 3}
    assert stats.decode_rows == 3 and stats.acceptance.steps == 2


def test_log_lines_are_intervals_and_totals():
    log = AcceptanceLog(every=6, now_s=0.0)
    made = counter((3, 3))
    assert log.line(made.stats(), 1.0) is None
    made.add(3, 0)
    line = log.line(made.stats(), 2.0)
    assert line is not None
    assert "SpecDecoding metrics: Mean acceptance length: 2.50, " in line
    assert "Accepted: 3 tokens, Drafted: 6 tokens" in line
    assert "Accepted throughput: 1.50 tokens/s" in line
    assert "Per-position acceptance rate: 0.500, 0.500, 0.500" in line
    assert "Avg Draft acceptance rate: 50.0%" in line
    made.add(3, 3)
    made.add(3, 3)
    line = log.line(made.stats(), 3.0)
    assert line is not None
    assert "Mean acceptance length: 4.00" in line
    assert "Average toks/fwd: 3.25, Accepted/Total Draft tokens: 9/12" in line
    assert AcceptanceLog(every=0, now_s=0.0).line(made.stats(), 1.0) is None
