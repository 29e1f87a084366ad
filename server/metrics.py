"""What is counted of requests in the HTTP process, and everything as Prometheus reads it.

Names are eaglerun's own and, where the meaning is the same, vLLM's, so that dashboards and
benchmarks made for vLLM work.
"""

from bisect import bisect_left

from eaglerun.messages import Finished

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
LENGTHS = tuple(float(1 << i) for i in range(21))


class Histogram:
    """Counts of values by upper bounds; cheap enough for every token."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """Prometheus's cumulative form."""
        total = 0
        found = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            found.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return found


class RequestMetrics:
    """Times and sizes of requests, as the HTTP process sees them.

    Times begin when a request is handed over with its token ids. A gap is the time between two
    arrivals of tokens of one sequence; an arrival may hold several tokens.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(SECONDS)
        self.gap = Histogram(SECONDS)
        self.whole = Histogram(SECONDS)
        self.per_output_token = Histogram(SECONDS)
        self.prompt_tokens = Histogram(LENGTHS)
        self.output_tokens = Histogram(LENGTHS)
        self.refused = {"queue full": 0, "queue timeout": 0, "invalid": 0}
        self.failed = 0

    def on_finished(
        self, event: Finished, submitted_s: float, first_s: float, now_s: float
    ) -> None:
        """A sequence ended; ``first_s`` is when its first token came (0.0: none did)."""
        self.whole.add(now_s - submitted_s)
        self.prompt_tokens.add(event.num_prompt_tokens)
        self.output_tokens.add(event.num_output_tokens)
        if event.num_output_tokens > 1:
            self.per_output_token.add((now_s - first_s) / (event.num_output_tokens - 1))
