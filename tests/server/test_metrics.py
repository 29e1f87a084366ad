"""What Prometheus reads, the history behind the page, and the log lines, against plain counts."""

import json
import logging
import re
from pathlib import Path

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from eaglerun.messages import Finished, FinishReason, SpeculationStats
from eaglerun.server.metrics import LENGTHS, SECONDS, Exposition, Histogram, RequestMetrics
from eaglerun.server.monitor import NUM_SAMPLES, Monitor
from eaglerun.server.wire import Totals, less
from eaglerun.stats import AcceptanceCounter, Builds

ROOT = Path(__file__).resolve().parents[2]


def counted(*steps: tuple[int, int]) -> SpeculationStats:
    counter = AcceptanceCounter()
    for drafts, accepted in steps:
        counter.add(drafts, accepted)
    return counter.stats()


TOTALS = Totals(
    steps=10,
    step_s=2.0,
    target_s=1.25,
    draft_s=0.5,
    prompt_tokens=100,
    cached_tokens=32,
    emitted_tokens=40,
    preemptions=1,
    finished={"stop": 3, "abort": 1},
    speculation=counted((3, 3), (3, 1), (2, 0)),
    by_context={1024: counted((3, 3)), 2048: counted((3, 1), (2, 0))},
    builds=Builds(1, 0.5, 2, 0.25, 3, 1.5),
    builds_at_start=Builds(40, 8.0, 50, 2.0, 6, 4.0),
    builds_idle=Builds(0, 0.0, 0, 0.0, 7, 3.5),
    num_running=2,
    num_waiting=5,
    kv_usage=0.25,
)


def exposed(totals: Totals, requests: RequestMetrics) -> dict[tuple[str, frozenset[str]], float]:
    """Values by name and by those labels that are not always there."""
    registry = CollectorRegistry()
    registry.register(Exposition("m", requests, lambda: totals))
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "m" and labels.pop("engine") == "0"
            key = (sample.name, frozenset(f"{k}={v}" for k, v in labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def test_counts_are_exposed_under_both_names():
    found = exposed(TOTALS, RequestMetrics())

    def value(name: str, *labels: str) -> float:
        return found[name, frozenset(labels)]

    for prefix in ("eaglerun", "vllm"):
        assert value(f"{prefix}:num_requests_running") == 2
        assert value(f"{prefix}:num_requests_waiting") == 5
        assert value(f"{prefix}:kv_cache_usage_perc") == 0.25
        assert value(f"{prefix}:prompt_tokens_total") == 100
        assert value(f"{prefix}:generation_tokens_total") == 40
        assert value(f"{prefix}:prefix_cache_queries_total") == 100
        assert value(f"{prefix}:prefix_cache_hits_total") == 32
        assert value(f"{prefix}:num_preemptions_total") == 1
        assert value(f"{prefix}:request_success_total", "finished_reason=stop") == 3
        assert value(f"{prefix}:spec_decode_num_drafts_total") == 3
        assert value(f"{prefix}:spec_decode_num_draft_tokens_total") == 8
        assert value(f"{prefix}:spec_decode_num_accepted_tokens_total") == 4
        per_position = [
            value(f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total", f"position={i}")
            for i in range(3)
        ]
        assert per_position == [2, 1, 1]
    parts = {p: value("eaglerun:step_seconds_total", f"part={p}") for p in ("target", "draft")}
    assert parts == {"target": 1.25, "draft": 0.5}
    assert value("eaglerun:step_seconds_total", "part=host") == 0.25
    length = "eaglerun:spec_decode_acceptance_length"
    assert value(length, "context_below=+Inf") == pytest.approx(1 + 4 / 3)
    assert value(length, "context_below=2048") == 1.5
    assert value("eaglerun:spec_decode_acceptance_rate", "context_below=1024") == 1.0
    assert value("eaglerun:spec_decode_num_drafts_by_context_total", "context_below=2048") == 2


def test_what_was_compiled_and_captured_is_told_for_the_start_and_for_served_steps():
    found = exposed(TOTALS, RequestMetrics())
    values = {
        name: [
            found[f"eaglerun:{name}_total", frozenset([f"when={w}"])]
            for w in ("start", "served", "idle")
        ]
        for name in (
            *("kernels_compiled", "kernel_compile_seconds"),
            *("kernels_loaded", "kernel_load_seconds"),
            *("graphs_captured", "graph_capture_seconds"),
        )
    }
    assert list(values.values()) == [
        *([40, 1, 0], [8, 0.5, 0], [50, 2, 0], [2, 0.25, 0], [6, 3, 7], [4, 1.5, 3.5])
    ]


def test_connections_and_statuses_are_exposed():
    requests = RequestMetrics()
    for status in (200, 200, 431):
        requests.http.responded(status)
    requests.http.connections_open, requests.http.connections_total = 3, 5
    requests.http.closed["slow"] = 2
    found = exposed(Totals(), requests)
    assert found["eaglerun:http_responses_total", frozenset(["code=200"])] == 2
    assert found["eaglerun:http_responses_total", frozenset(["code=431"])] == 1
    assert found["eaglerun:http_connections_open", frozenset()] == 3
    assert found["eaglerun:http_connections_total", frozenset()] == 5
    assert found["eaglerun:http_connections_closed_total", frozenset(["reason=slow"])] == 2


def test_an_engine_that_did_nothing_is_exposed():
    found = exposed(Totals(), RequestMetrics())
    assert found["eaglerun:generation_tokens_total", frozenset()] == 0


def finished(num_output_tokens: int) -> Finished:
    reason = FinishReason.STOP
    return Finished("r", 0, reason, None, 700, num_output_tokens, 0, 0, SpeculationStats())


def test_times_of_requests():
    requests = RequestMetrics()
    requests.first_token.add(0.05)
    requests.on_finished(finished(11), submitted_s=10.0, first_s=10.5, now_s=11.5)
    requests.on_finished(finished(1), submitted_s=10.0, first_s=10.5, now_s=10.5)
    found = exposed(Totals(), requests)
    for prefix in ("eaglerun", "vllm"):
        name = f"{prefix}:e2e_request_latency_seconds"
        assert found[f"{name}_count", frozenset()] == 2
        assert found[f"{name}_sum", frozenset()] == 2.0
        assert found[f"{name}_bucket", frozenset(["le=0.5"])] == 1
        assert found[f"{name}_bucket", frozenset(["le=+Inf"])] == 2
        per_token = f"{prefix}:request_time_per_output_token_seconds"
        assert found[f"{per_token}_sum", frozenset()] == pytest.approx(0.1)
        assert found[f"{prefix}:request_prompt_tokens_bucket", frozenset(["le=1024.0"])] == 2
        assert found[f"{prefix}:request_prompt_tokens_bucket", frozenset(["le=512.0"])] == 0


def test_a_histogram_counts_a_bound_into_its_bucket():
    for bounds in (SECONDS, LENGTHS):
        assert list(bounds) == sorted(set(bounds))
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.add(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert (histogram.count, histogram.sum) == (5, 14.0)


def test_the_difference_of_two_counts():
    then, now = counted((3, 2)), counted((3, 2), (4, 4), (1, 0))
    assert less(now, then) == counted((4, 4), (1, 0))
    assert less(now, SpeculationStats()) == now
    assert less(now, now).steps == 0
    then = Totals(steps=4, finished={"stop": 1}, by_context={2048: counted((2, 0))})
    then = replace(then, builds=Builds(kernels_compiled=1, capture_s=0.5))
    new = TOTALS.since(then)
    assert new.builds == Builds(0, 0.5, 2, 0.25, 3, 1.0)
    assert new.builds_at_start == TOTALS.builds_at_start and new.builds_idle == TOTALS.builds_idle
    assert new.steps == 6 and new.finished == {"stop": 2, "abort": 1}
    assert new.by_context[2048] == counted((3, 1)) and new.num_waiting == 5


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_monitor_keeps_rates_of_each_interval():
    clock, totals = Clock(), [Totals()]
    monitor = Monitor(lambda: totals[-1], 0.0, clock)
    clock.now += 2.0
    totals.append(TOTALS)
    monitor.tick()
    clock.now += 1.0
    monitor.tick()
    first, second = monitor.samples
    assert (first.number, first.time_s, first.output_rate, first.prompt_rate) == (0, 2.0, 20, 50)
    assert first.speculation == TOTALS.speculation and first.cached_share == 0.32
    assert (second.number, second.output_rate, second.speculation.steps) == (1, 0, 0)
    assert second.num_waiting == 5
    for _ in range(NUM_SAMPLES):
        monitor.tick()
    assert len(monitor.samples) == NUM_SAMPLES and monitor.samples[-1].number == NUM_SAMPLES + 1


THROUGHPUT = (
    r"Engine 000: Avg prompt throughput: ([\d.]+) tokens/s, "
    r"Avg generation throughput: ([\d.]+) tokens/s, Running: (\d+) reqs, Waiting: (\d+) reqs, "
    r"GPU KV cache usage: ([\d.]+)%, Prefix cache hit rate: ([\d.]+)%"
)
ACCEPTANCE = (
    r"SpecDecoding metrics: Mean acceptance length: ([\d.]+), "
    r"Accepted throughput: ([\d.]+) tokens/s, Drafted throughput: ([\d.]+) tokens/s, "
    r"Accepted: (\d+) tokens, Drafted: (\d+) tokens, "
    r"Per-position acceptance rate: ([\d., ]+), Avg Draft acceptance rate: ([\d.]+)%"
)


def test_the_log_has_the_words_that_tools_look_for(caplog: pytest.LogCaptureFixture):
    clock, totals = Clock(), [Totals()]
    monitor = Monitor(lambda: totals[-1], 10.0, clock)

    def lines() -> list[str]:
        caplog.clear()
        for _ in range(10):
            clock.now += 1.0
            monitor.tick()
        return [record.getMessage() for record in caplog.records]

    with caplog.at_level(logging.INFO, "eaglerun"):
        assert lines() == []
        totals.append(TOTALS)
        throughput, acceptance = lines()
        found = re.fullmatch(THROUGHPUT, throughput)
        assert found and found.groups() == ("10.0", "4.0", "2", "5", "25.0", "32.0")
        found = re.match(ACCEPTANCE, acceptance)
        assert found and found.groups()[:5] == ("2.33", "0.40", "0.80", "4", "8")
        # Running, but no new tokens; then idle: one more line; then silence.
        assert len(lines()) == 1
        totals.append(Totals(steps=10, emitted_tokens=40, prompt_tokens=100))
        assert len(lines()) == 1
        assert lines() == []


def test_the_dashboard_asks_only_for_what_is_exposed():
    dashboard = json.loads((ROOT / "recipes/grafana/eaglerun.json").read_text())
    expressions = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    asked = {name for text in expressions for name in re.findall(r"eaglerun:\w+", text)}
    exposed_names = {name for name, _ in exposed(TOTALS, RequestMetrics())}
    assert len(asked) > 20 and asked <= exposed_names
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
