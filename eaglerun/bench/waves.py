"""Waves of requests against a server, over HTTP: what its users wait for, from Ready on.

For each concurrency c three waves of c requests, all sent at once, then one of 4c, each as soon as
the one before has ended. The server is a fresh one, and nothing warms it up: the first wave of the
first concurrency is the first work after Ready. Wave by wave, /metrics tells what was compiled and
captured in served steps.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from eaglerun.bench.drive import random_prompts
from eaglerun.bench.http_load import PATIENCE_S, Answer, Client
from eaglerun.bench.served import local_only, served
from eaglerun.bench.table import Columns, Table, machine, number, say
from eaglerun.bench.throughput import percentiles
from eaglerun.bench.workbench import Options
from eaglerun.config import Config
from eaglerun.errors import ConfigError
from eaglerun.loader import read_checkpoints
from eaglerun.server.http_partner import ServerError
from eaglerun.stats import Builds

CONCURRENCY = (1, 4, 16, 64)
NUM_WAVES = 3
# How much larger the last wave of a concurrency is.
LAST_FACTOR = 4
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Row:
    """One wave. Times in milliseconds at the percentiles 50, 90 and 99; None: nothing to measure.

    wave     "1", "2", "3", then "4c"
    ttft     from a request's sending to its first text
    itl      between two arrivals of a request's text
    out_tok_s  output tokens from the first sending to the last arrival, prefill included
    builds   kernels and graphs made in served steps meanwhile; None where the server does not tell,
             and so for the acceptance length
    """

    concurrency: int
    wave: str
    num_requests: int
    elapsed_s: float
    output_tokens: int
    out_tok_s: float
    ttft_ms: tuple[float, ...]
    itl_ms: tuple[float, ...] | None
    mean_acceptance_length: float | None
    builds: Builds | None


@dataclass(frozen=True, slots=True)
class StartRow:
    """``ready_s``: from the start of the server's process to Ready; None: it ran before.
    ``builds``: made before Ready."""

    ready_s: float | None
    builds: Builds | None


def _built(builds: Builds | None) -> list[str]:
    if builds is None:
        return ["-"] * 5
    return [
        str(builds.kernels_compiled),
        number(builds.compile_s, 1),
        str(builds.kernels_loaded),
        str(builds.graphs_captured),
        number(builds.capture_s, 1),
    ]


COLUMNS: Columns[Row] = {
    "conc": lambda r, _: str(r.concurrency),
    "wave": lambda r, _: r.wave,
    "requests": lambda r, _: str(r.num_requests),
    "TTFT p50 ms": lambda r, _: number(r.ttft_ms[0], 1),
    "TTFT p99": lambda r, _: number(r.ttft_ms[-1], 1),
    "ITL p50 ms": lambda r, _: number(r.itl_ms[0] if r.itl_ms else None),
    "ITL p99": lambda r, _: number(r.itl_ms[-1] if r.itl_ms else None),
    "out tok/s": lambda r, _: number(r.out_tok_s, 0),
    "AL": lambda r, _: number(r.mean_acceptance_length),
    "compiled": lambda r, _: _built(r.builds)[0],
    "compile s": lambda r, _: _built(r.builds)[1],
    "from cache": lambda r, _: _built(r.builds)[2],
    "captured": lambda r, _: _built(r.builds)[3],
    "capture s": lambda r, _: _built(r.builds)[4],
}
START_COLUMNS: Columns[StartRow] = {
    "ready s": lambda r, _: number(r.ready_s, 1),
    "compiled": lambda r, _: _built(r.builds)[0],
    "compile s": lambda r, _: _built(r.builds)[1],
    "from cache": lambda r, _: _built(r.builds)[2],
    "captured": lambda r, _: _built(r.builds)[3],
    "capture s": lambda r, _: _built(r.builds)[4],
}


@dataclass(frozen=True, slots=True)
class Told:
    """A reading of /metrics. ``served`` and ``at_start`` are None where it does not tell
    of kernels and graphs, which other servers do not."""

    answers: float
    verified: float
    accepted: float
    served: Builds | None
    at_start: Builds | None


def read_metrics(text: str) -> Told:
    """A Prometheus page."""

    def total(name: str, labels: str = "") -> float | None:
        found = re.findall(rf"^{name}_total{{[^}}]*{labels}[^}}]*}} (\S+)", text, re.MULTILINE)
        return sum(map(float, found)) if found else None

    def builds(when: str) -> Builds | None:
        names = (
            *("kernels_compiled", "kernel_compile_seconds"),
            *("kernels_loaded", "kernel_load_seconds"),
            *("graphs_captured", "graph_capture_seconds"),
        )
        values = [total(f"eaglerun:{name}", f'when="{when}"') for name in names]
        compiled, compile_s, loaded, load_s, captured, capture_s = [v or 0.0 for v in values]
        if None in values:
            return None
        return Builds(int(compiled), compile_s, int(loaded), load_s, int(captured), capture_s)

    return Told(
        answers=total("eaglerun:request_success") or 0.0,
        verified=total("eaglerun:spec_decode_num_drafts") or 0.0,
        accepted=total("eaglerun:spec_decode_num_accepted_tokens") or 0.0,
        served=builds("served"),
        at_start=builds("start"),
    )


class Waves:
    """Drives one server through all waves, and adds a row for each."""

    _client: Client

    def __init__(self, config: Config, options: Options) -> None:
        settings = config.to_toml() if options.url is None else f"# measured at {options.url}\n"
        about = _machine()
        self.table = Table("waves", COLUMNS, options.out, settings, about)
        self.start = Table("waves_start", START_COLUMNS, options.out, settings, about)
        self._options = options
        self._vocab_size = options.vocab_size or read_checkpoints(config).target.vocab_size
        self._seed = config.model.seed
        limit = config.scheduling.max_num_seqs
        fitting = tuple(n for n in CONCURRENCY if options.url is not None or n <= limit)
        self._concurrencies = options.concurrency or fitting
        self._begun = time.perf_counter()

    async def run(self, client: Client, ready_s: float | None) -> None:
        self._client = client
        told = read_metrics(await self._client.get("/metrics"))
        self.start.add(StartRow(ready_s, told.at_start))
        model = await self._model()
        for concurrency in self._concurrencies:
            counts = [(str(i + 1), concurrency) for i in range(NUM_WAVES)]
            for wave, count in (*counts, (f"{LAST_FACTOR}c", LAST_FACTOR * concurrency)):
                budget = self._options.budget_s
                if budget is not None and time.perf_counter() - self._begun >= budget:
                    say(f"left out, for --budget-s {budget:g} is spent: wave {wave} at {count}")
                    continue
                answers = await self._client.wave(self._bodies(model, count))
                now = await self._told_after(told, count)
                self.table.add(self._row(concurrency, wave, answers, told, now))
                told = now

    async def _model(self) -> str:
        """The name of the served model. ConfigError where it is too short for the waves."""
        try:
            card = json.loads(await self._client.get("/v1/models"))["data"][0]
            name, longest = str(card["id"]), card.get("max_model_len")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ServerError(
                f"{self._client.where} is no OpenAI server: /v1/models lists no model"
            ) from None
        input_len, output_len = self._options.input_len, self._options.output_len
        if isinstance(longest, int) and input_len + output_len > longest:
            raise ConfigError(
                f"--input-len {input_len} and --output-len {output_len}: {name}'s longest sequence "
                f"is {longest}"
            )
        return name

    def _bodies(self, model: str, count: int) -> list[dict[str, Any]]:
        """Prompts that no wave has had: the prefix cache knows none of them."""
        self._seed += 1
        prompts = random_prompts(count, self._options.input_len, self._vocab_size, self._seed)
        return [
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": self._options.output_len,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            for prompt in prompts
        ]

    async def _told_after(self, before: Told, count: int) -> Told:
        """/metrics once it has counted ``count`` more answers; its engine tells now and then."""
        begun = time.perf_counter()
        while True:
            now = read_metrics(await self._client.get("/metrics"))
            if now.served is None or now.answers >= before.answers + count:
                return now
            if time.perf_counter() - begun > PATIENCE_S:
                raise ServerError(
                    f"{self._client.where}/metrics counts {now.answers - before.answers:g} answers "
                    f"of {count} that have ended"
                )
            await asyncio.sleep(POLL_S)

    def _row(
        self, concurrency: int, wave: str, answers: list[Answer], then: Told, now: Told
    ) -> Row:
        output_len = self._options.output_len
        for answer in answers:
            if answer.num_tokens != output_len:
                raise ServerError(
                    f"an answer has {answer.num_tokens} tokens of --output-len {output_len}"
                )
        elapsed = max(a.arrivals[-1] for a in answers) - min(a.sent for a in answers)
        gaps = [gap for answer in answers for gap in answer.gaps_ms]
        verified = now.verified - then.verified
        builds = acceptance = None
        if now.served is not None and then.served is not None:
            builds = now.served.since(then.served)
            acceptance = 1 + (now.accepted - then.accepted) / verified if verified else 1.0
        return Row(
            concurrency=concurrency,
            wave=wave,
            num_requests=len(answers),
            elapsed_s=elapsed,
            output_tokens=output_len * len(answers),
            out_tok_s=output_len * len(answers) / elapsed,
            ttft_ms=percentiles([answer.ttft_ms for answer in answers]),
            itl_ms=percentiles(gaps) if gaps else None,
            mean_acceptance_length=acceptance,
            builds=builds,
        )


def _machine() -> dict[str, Any]:
    """machine(); of a GPU by another process, for who asks keeps some of its memory."""
    if not torch.cuda.is_available():
        return machine()
    code = "import json; from eaglerun.bench.table import machine; print(json.dumps(machine()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(config: Config, options: Options) -> None:
    """Against --url, or else a fresh server with ``config``."""
    if options.num_drafts:
        raise ConfigError("--num-drafts: a server is measured as it is set up: --num-draft-tokens")
    if options.url is None:
        config = local_only(config)
    # All that takes time is done before the server is there, so that its first work is a wave.
    waves = Waves(config, options)
    if options.url is not None:
        asyncio.run(waves.run(Client(options.url, config.server.api_key), None))
    else:
        log = None
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            log = options.out / "waves_server.log"
        say("starting the server")
        with served(config, options.start_timeout_s, log) as server:
            say(f"ready after {server.ready_s:.1f} s at {server.url}")
            try:
                asyncio.run(waves.run(Client(server.url), server.ready_s))
            except ServerError as error:
                raise ServerError(f"{error}{server.last_words()}") from error
    print(waves.start.to_text() + "\n")
    print(waves.table.to_text())
