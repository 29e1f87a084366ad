"""The real engine behind the real server: what others do changes nobody's answer."""

import asyncio
import random
from pathlib import Path
from typing import Any

from served import Http, drive, metric, serving, started, write_checkpoint

NUM_STREAMS = 256
NUM_ALONE = 8
RUNNING = "eaglerun:num_requests_running"
ENDED = "eaglerun:request_success_total"


def greedy(chance: random.Random) -> dict[str, Any]:
    """A random request; beginnings are shared, so that prefixes are too."""
    prompt = [*([7] * chance.choice([0, 20])), *(chance.randrange(1, 256) for _ in range(5))]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": chance.randrange(1, 50), "stream": True}
    if chance.random() < 0.3:
        body["stop"] = [chr(chance.randrange(33, 127))]
    if chance.random() < 0.2:
        body["speculation"] = {"num_draft_tokens": chance.randrange(3)}
    return body | {"temperature": 0}


async def answer(http: Http, body: dict[str, Any], leave_after: int | None = None) -> Any:
    """(text, finish reason); None for a client that left after so many events."""
    reply = await http.ask("/v1/completions", body)
    assert reply.status == 200
    text, reasons, count = "", [], 0
    async for event in reply.events():
        count += 1
        if leave_after is not None and count > leave_after:
            reply.writer.close()
            return None
        for choice in [] if event == "[DONE]" else event["choices"]:
            text += choice["text"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
    reply.writer.close()
    [reason] = reasons
    return text, reason


def test_256_streams_with_leavers_equal_the_same_alone(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path)
    flags = ["--max-num-seqs", "48", "--num-kv-blocks", "200", "--max-num-batched-tokens", "512"]

    async def load(http: Http) -> None:
        chance = random.Random(11)
        bodies = [greedy(chance) for _ in range(NUM_STREAMS)]
        leaving = [chance.choice([None, None, 0, 1, 3]) for _ in bodies]
        got = await asyncio.gather(*map(answer, [http] * NUM_STREAMS, bodies, leaving))
        stayed = [i for i, found in enumerate(got) if found is not None]
        assert 100 < len(stayed) < NUM_STREAMS
        assert {got[i][1] for i in stayed} == {"length", "stop"}
        for i in chance.sample(stayed, NUM_ALONE):
            assert await answer(http, bodies[i]) == got[i]

        text = ""
        while metric(text, "eaglerun:steps_total") == 0 or metric(text, RUNNING) > 0:
            text = (await (await http.ask("/metrics")).body()).decode()
        assert metric(text, "eaglerun:kv_cache_usage_perc") == 0
        assert metric(text, "eaglerun:num_requests_waiting") == 0
        reasons = ("stop", "length", "abort")
        ends = [metric(text, ENDED, finished_reason=reason) for reason in reasons]
        # Each of them and nothing else: the warm-up is nobody's.
        assert sum(ends) == NUM_STREAMS + NUM_ALONE and all(ends)
        # The schedule was not an easy one.
        assert metric(text, "eaglerun:num_preemptions_total") > 0
        assert metric(text, "eaglerun:prefix_cache_hits_total") > 0
        assert metric(text, "eaglerun:spec_decode_num_accepted_tokens_total") > 0

    with serving(checkpoint, *flags, script="tiny_engine.py") as (server, url):
        drive(url, load)
        server.process.terminate()
        assert server.wait_for_end() == 0


def test_answers_that_are_not_finite_are_errors(tmp_path: Path):
    """And the server is not ready while they repeat; others are not touched."""
    checkpoint = write_checkpoint(tmp_path)
    bad, poison = {"prompt": [5, 9, 6], "max_tokens": 4, "temperature": 0}, 9
    good = {"prompt": [5, 6], "max_tokens": 4, "temperature": 0, "logit_bias": {str(poison): -100}}

    async def load(http: Http) -> None:
        for i in range(3):
            assert (await http.ask("/health/ready")).status == 200
            reply = await http.ask("/v1/completions", bad | {"stream": i == 1})
            assert reply.status == 500
            error = (await reply.json())["error"]
            assert error["code"] == "not_finite" and "NaN" in error["message"]
        ready = await http.ask("/health/ready")
        assert ready.status == 503
        assert (await ready.json())["status"] == "broken"
        assert (await http.ask("/v1/completions", good)).status == 200
        assert (await http.ask("/health/ready")).status == 200
        text = (await (await http.ask("/metrics")).body()).decode()
        assert metric(text, ENDED, finished_reason="error") == 3
        assert metric(text, "eaglerun:requests_failed_total") == 3

    script, flags = "tiny_engine.py", ("--num-kv-blocks", "100")
    with serving(checkpoint, *flags, script=script, engine=f"--poison {poison}") as (_, url):
        drive(url, load)


def test_a_model_that_computes_nan_does_not_start(tmp_path: Path):
    checkpoint = write_checkpoint(tmp_path)
    with started(checkpoint, script="tiny_engine.py", engine="--broken-layer 2") as server:
        assert server.wait_for_end() == 2
        assert "computes NaN or Inf, first in layer 2" in server.log[-1]
        assert not any("Traceback" in line for line in server.log)
