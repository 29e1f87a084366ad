"""The live page at /: what speculation is doing, and a chat that shows it token by token.

The page itself is public and holds nothing; its data and the chat behind it want the API key,
which the page asks for. It loads nothing from anywhere else.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eaglerun.messages import SpeculationStats
from eaglerun.server.client import EngineStatus
from eaglerun.server.monitor import Monitor, Sample
from eaglerun.server.wire import Totals

# uplot.js and uplot.css are uPlot 1.6.32 as its authors built it; uplot.LICENSE is theirs.
FILES = {
    "/": ("page.html", "text/html"),
    "/page/page.js": ("page.js", "text/javascript"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/page.css": ("page.css", "text/css"),
    "/page/uplot.js": ("uplot.js", "text/javascript"),
    "/page/uplot.css": ("uplot.css", "text/css"),
}
OPEN_PATHS = frozenset(FILES)
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes(
    monitor: Monitor, status: Callable[[], EngineStatus], totals: Callable[[], Totals]
) -> list[Route]:
    """GET / with its files, and GET /page/data?after=N, samples with greater numbers only."""

    def data(request: Request) -> Response:
        after = request.query_params.get("after", "-1")
        number = int(after) if after.isdecimal() and len(after) < 10 else -1
        samples = [_sample(sample) for sample in monitor.samples if sample.number > number]
        body = {
            "began": monitor.began,
            "status": _status(status()),
            "totals": _totals(totals()),
            "samples": samples,
        }
        return Response(orjson.dumps(body), media_type="application/json")

    routes = [Route(path, _file(*named)) for path, named in FILES.items()]
    return [*routes, Route("/page/data", data)]


def _file(name: str, media_type: str) -> Callable[[Request], Response]:
    content = (Path(__file__).parent / name).read_bytes()

    def send(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    return send


def _status(status: EngineStatus) -> dict[str, Any]:
    return {
        "ready": status.ready,
        "alive": status.alive,
        "hung": status.hung,
        "model": status.model_name,
        "max_model_len": status.max_model_len,
        "num_draft_tokens": status.num_draft_tokens,
        "num_running": status.num_running,
        "num_waiting": status.num_waiting,
        "kv_usage": status.kv_usage,
    }


def _totals(totals: Totals) -> dict[str, Any]:
    return {
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens,
        "output_tokens": totals.emitted_tokens,
        "answers": sum(totals.finished.values()),
        "preemptions": totals.preemptions,
        "speculation": _speculation(totals.speculation),
        "by_context": _by_context(totals.by_context),
    }


def _by_context(by_context: Mapping[int, SpeculationStats]) -> list[dict[str, Any]]:
    return [{"below": end} | _speculation(stats) for end, stats in sorted(by_context.items())]


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "number": sample.number,
        "time": sample.time_s,
        "num_running": sample.num_running,
        "num_waiting": sample.num_waiting,
        "kv_usage": sample.kv_usage,
        "output_rate": sample.output_rate,
        "steps": sample.speculation.steps,
        "length": sample.speculation.mean_acceptance_length,
    }


def _speculation(stats: SpeculationStats) -> dict[str, Any]:
    return {
        "steps": stats.steps,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "length": stats.mean_acceptance_length,
        "rate": stats.acceptance_rate,
        "judged_at": stats.judged_at,
        "accepted_at": stats.accepted_at,
    }
