"""What is counted of requests in the HTTP process, and everything as Prometheus reads it.

Names are eaglerun's own and, where the meaning is the same, vLLM's too, so that dashboards and
benchmarks made for vLLM work.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eaglerun.messages import Finished, SpeculationStats
from eaglerun.server.http_limits import HttpCounts
from eaglerun.server.wire import Totals

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
LENGTHS = tuple(float(1 << i) for i in range(21))

Labels = Mapping[str, str]


class Histogram:
    """Counts of values by upper bounds; cheap enough for every token."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus's form: (upper bound, how many values up to it)."""
        total = 0
        found = []
        for bound, count in zip((*map(repr, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class RequestMetrics:
    """Times and sizes of requests, as the HTTP process sees them.

    Times begin when a request's token ids are handed over. A gap is the time between two arrivals
    of tokens of one answer; an arrival may hold several tokens.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.gap = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.per_output_token = Histogram(SECONDS)
        self.prompt_tokens = Histogram(LENGTHS)
        self.output_tokens = Histogram(LENGTHS)
        self.http = HttpCounts()
        self.refused = {"queue full": 0, "queue timeout": 0, "invalid": 0}
        self.failed = 0

    def on_finished(
        self, event: Finished, submitted_s: float, first_s: float, now_s: float
    ) -> None:
        """An answer ended by itself; its first tokens came at ``first_s`` (0.0: there are none)."""
        self.whole.add(now_s - submitted_s)
        self.prompt_tokens.add(event.num_prompt_tokens)
        self.output_tokens.add(event.num_output_tokens)
        if event.num_output_tokens > 1:
            self.per_output_token.add((now_s - first_s) / (event.num_output_tokens - 1))


class Exposition(Collector):
    """All metrics at the moment they are asked for."""

    def __init__(
        self, model_name: str, requests: RequestMetrics, totals: Callable[[], Totals]
    ) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._requests = requests
        self._totals = totals

    def collect(self) -> Iterator[Metric]:
        totals = self._totals()
        yield from self._state(totals)
        yield from self._tokens(totals)
        yield from self._builds(totals)
        yield from self._speculation(totals.speculation)
        yield from self._by_context(totals)
        yield from self._times()
        yield from self._http(self._requests.http)

    def _state(self, totals: Totals) -> Iterator[Metric]:
        for name, text, value in (
            ("num_requests_running", "Answers being generated.", totals.num_running),
            ("num_requests_waiting", "Answers waiting for a place.", totals.num_waiting),
            ("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", totals.kv_usage),
        ):
            yield from self._gauge(name, text, [({}, value)], vllm=True)
        counts = self._requests.refused
        yield from self._counter(
            "requests_refused",
            "Requests that never ran, by reason.",
            [({"reason": reason}, count) for reason, count in counts.items()],
        )
        yield from self._counter(
            "requests_failed", "Requests that broke off.", [({}, self._requests.failed)]
        )

    def _http(self, http: HttpCounts) -> Iterator[Metric]:
        yield from self._counter(
            "http_responses",
            "HTTP answers by status.",
            [({"code": str(status)}, n) for status, n in sorted(http.responses.items())],
        )
        yield from self._gauge(
            "http_connections_open", "Connections.", [({}, http.connections_open)]
        )
        yield from self._counter(
            "http_connections", "Connections since the start.", [({}, http.connections_total)]
        )
        yield from self._counter(
            "http_connections_closed",
            "Connections that the server ended: idle ones to make room, refused ones, clients slow "
            "to send or not reading.",
            [({"reason": reason}, n) for reason, n in http.closed.items()],
        )

    def _tokens(self, totals: Totals) -> Iterator[Metric]:
        host_s = max(0.0, totals.step_s - totals.target_s - totals.draft_s)
        for name, text, value, vllm in (
            ("prompt_tokens", "Prompt tokens of admitted answers.", totals.prompt_tokens, True),
            ("generation_tokens", "Tokens sent.", totals.emitted_tokens, True),
            ("prefix_cache_queries", "Tokens looked up.", totals.prompt_tokens, True),
            ("prefix_cache_hits", "Of those, found in the cache.", totals.cached_tokens, True),
            ("num_preemptions", "Answers put back to wait.", totals.preemptions, True),
            ("trimmed_tokens", "Computed past an end, dropped.", totals.trimmed_tokens, False),
            ("steps_discarded", "Rows of ended answers.", totals.steps_discarded, False),
            ("steps", "Engine steps.", totals.steps, False),
        ):
            yield from self._counter(name, text, [({}, value)], vllm)
        yield from self._counter(
            "request_success",
            "Answers that ended, by reason.",
            [({"finished_reason": reason}, n) for reason, n in totals.finished.items()],
            vllm=True,
        )
        yield from self._counter(
            "step_seconds",
            "Time in engine steps: in the target, in the draft, and the rest.",
            [
                ({"part": "target"}, totals.target_s),
                ({"part": "draft"}, totals.draft_s),
                ({"part": "host"}, host_s),
            ],
        )

    def _builds(self, totals: Totals) -> Iterator[Metric]:
        """``when``: start is before Ready, served in a step after it, for which users waited, and
        idle after it while nobody asked for anything."""
        times = (
            ({"when": "start"}, totals.builds_at_start),
            ({"when": "served"}, totals.builds),
            ({"when": "idle"}, totals.builds_idle),
        )
        for name, text, values in (
            ("kernels_compiled", "Kernels compiled.", [b.kernels_compiled for _, b in times]),
            ("kernel_compile_seconds", "Time in compiling them.", [b.compile_s for _, b in times]),
            (
                "kernels_loaded",
                "Kernels found in Triton's cache on disk.",
                [b.kernels_loaded for _, b in times],
            ),
            ("kernel_load_seconds", "Time in reading them there.", [b.load_s for _, b in times]),
            ("graphs_captured", "Decode graphs captured.", [b.graphs_captured for _, b in times]),
            (
                "graph_capture_seconds",
                "Time in capturing them, with the kernels made meanwhile.",
                [b.capture_s for _, b in times],
            ),
        ):
            labelled = [(labels, n) for (labels, _), n in zip(times, values, strict=True)]
            yield from self._counter(name, text, labelled)

    def _speculation(self, stats: SpeculationStats) -> Iterator[Metric]:
        for name, text, value in (
            ("spec_decode_num_drafts", "Verify steps with drafts.", stats.steps),
            ("spec_decode_num_draft_tokens", "Draft tokens judged.", stats.drafted),
            ("spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted),
        ):
            yield from self._counter(name, text, [({}, value)], vllm=True)
        for name, text, values, vllm in (
            ("accepted", "Accepted draft tokens, by position.", stats.accepted_at, True),
            ("draft", "Judged draft tokens, by position.", stats.judged_at, False),
        ):
            yield from self._counter(
                f"spec_decode_num_{name}_tokens_per_pos",
                text,
                [({"position": str(i)}, count) for i, count in enumerate(values)],
                vllm,
            )

    def _by_context(self, totals: Totals) -> Iterator[Metric]:
        """``context_below`` is the upper end of a bucket of context lengths; +Inf is all."""
        by_context = sorted(totals.by_context.items())
        buckets = [({"context_below": str(end)}, stats) for end, stats in by_context]
        for name, text, counts in (
            ("drafts", "Verify steps with drafts", [s.steps for _, s in buckets]),
            ("draft_tokens", "Draft tokens judged", [s.drafted for _, s in buckets]),
            ("accepted_tokens", "Draft tokens accepted", [s.accepted for _, s in buckets]),
        ):
            yield from self._counter(
                f"spec_decode_num_{name}_by_context",
                f"{text}, by context length.",
                [(labels, n) for (labels, _), n in zip(buckets, counts, strict=True)],
            )
        buckets.append(({"context_below": "+Inf"}, totals.speculation))
        yield from self._gauge(
            "spec_decode_acceptance_length",
            "Tokens per verify step since the start.",
            [(labels, stats.mean_acceptance_length) for labels, stats in buckets],
        )
        yield from self._gauge(
            "spec_decode_acceptance_rate",
            "Share of drafts accepted since the start.",
            [(labels, stats.acceptance_rate) for labels, stats in buckets],
        )

    def _times(self) -> Iterator[Metric]:
        requests = self._requests
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Until the first token.", requests.first_token),
            ("inter_token_latency_seconds", "Between arrivals of tokens.", requests.gap),
            ("request_time_per_output_token_seconds", "Mean.", requests.per_output_token),
            ("e2e_request_latency_seconds", "Until the end.", requests.whole),
            ("request_prompt_tokens", "Prompt tokens of an answer.", requests.prompt_tokens),
            ("request_generation_tokens", "Tokens of an answer.", requests.output_tokens),
        ):
            for prefix in ("eaglerun", "vllm"):
                family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=list(self._labels))
                family.add_metric(list(self._labels.values()), histogram.buckets(), histogram.sum)
                yield family

    def _counter(
        self, name: str, text: str, values: list[tuple[dict[str, str], float]], vllm: bool = False
    ) -> Iterator[Metric]:
        for prefix in ("eaglerun", "vllm") if vllm else ("eaglerun",):
            counter = CounterMetricFamily(f"{prefix}:{name}", text, labels=self._names(values))
            for labels, value in values:
                counter.add_metric([*self._labels.values(), *labels.values()], value)
            yield counter

    def _gauge(
        self, name: str, text: str, values: list[tuple[dict[str, str], float]], vllm: bool = False
    ) -> Iterator[Metric]:
        for prefix in ("eaglerun", "vllm") if vllm else ("eaglerun",):
            gauge = GaugeMetricFamily(f"{prefix}:{name}", text, labels=self._names(values))
            for labels, value in values:
                gauge.add_metric([*self._labels.values(), *labels.values()], value)
            yield gauge

    def _names(self, values: list[tuple[dict[str, str], float]]) -> list[str]:
        return [*self._labels, *(values[0][0] if values else ())]


def metrics_route(exposition: Exposition) -> Route:
    """GET /metrics, with the HTTP process's own CPU, memory and files."""
    registry = CollectorRegistry()
    registry.register(exposition)
    ProcessCollector(registry=registry)

    def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", metrics)
