"""The server's processes under load: who dies, who leaves, who must wait, and how it ends."""

import asyncio
import json
import os
import random
import signal
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
from scripted_engine import text_of
from served import (
    Http,
    Reply,
    Server,
    drive,
    engine_of,
    get,
    metric,
    serving,
    started,
    write_checkpoint,
)

from eaglerun.config import resolve
from eaglerun.errors import ConfigError
from eaglerun.server.serve import bind, check_files

ENDLESS = 1 << 29


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def body(max_tokens: int, stream: bool = True, prompt: list[int] | None = None) -> dict[str, Any]:
    return {"prompt": prompt or [1, 2, 3], "max_tokens": max_tokens, "stream": stream}


async def complete(http: Http, *args: Any) -> Reply:
    """An answer that has begun: its status comes with its first tokens."""
    return await http.ask("/v1/completions", body(*args))


async def collect(reply: Reply) -> list[Any]:
    return [event async for event in reply.events()]


def ends_of(events: list[Any]) -> list[str]:
    """Finish reasons and errors, in order."""
    found = []
    for event in events:
        if event != "[DONE]":
            found += ["error"] if "error" in event else []
            found += [c["finish_reason"] for c in event.get("choices", ()) if c["finish_reason"]]
    return found


def text_in(events: list[Any]) -> str:
    return "".join(c["text"] for e in events if e != "[DONE]" for c in e.get("choices", ()))


async def metrics(http: Http) -> str:
    reply = await http.ask("/metrics")
    text = (await reply.body()).decode()
    reply.writer.close()
    return text


async def until(http: Http, holds: Callable[[str], bool]) -> str:
    """Ask for the metrics until they are so."""
    while not holds(text := await metrics(http)):
        pass
    return text


def test_a_killed_engine_ends_streams_and_server(checkpoint: Path):
    with serving(checkpoint) as (server, url):
        pid = engine_of(server.process.pid)

        async def load(http: Http) -> None:
            replies = await asyncio.gather(*(complete(http, ENDLESS) for _ in range(16)))
            whole = asyncio.create_task(complete(http, ENDLESS, False))
            await until(http, lambda text: metric(text, "eaglerun:num_requests_running") == 17)
            os.kill(pid, signal.SIGKILL)
            for events in await asyncio.gather(*map(collect, replies)):
                assert ends_of(events) == ["error"]
                assert "engine died" in events[-1]["error"]["message"]
            answer = await whole
            assert answer.status == 503
            assert "engine died" in (await answer.json())["error"]["message"]

        begin = time.perf_counter()
        drive(url, load)
        assert server.wait_for_end() == 1
        assert time.perf_counter() - begin < 15
        assert any("engine process ended, code -9" in line for line in server.log)


def test_a_killed_server_takes_its_engine_along_and_restarts(checkpoint: Path):
    with serving(checkpoint) as (server, url):

        async def load(http: Http) -> None:
            replies = await asyncio.gather(*(complete(http, ENDLESS) for _ in range(8)))
            server.process.kill()
            for reply in replies:
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    await collect(reply)

        drive(url, load)
        # The log's end is the engine's end.
        assert server.wait_for_end() == -signal.SIGKILL
        with serving(checkpoint, "--port", url.rpartition(":")[2]) as (_, again):
            assert again == url
            assert get(again, "/health/ready")[0] == 200


def test_sigterm_lets_streams_end_and_takes_no_more(checkpoint: Path):
    with serving(checkpoint, engine="--pause-ms 1") as (server, url):

        async def load(http: Http) -> None:
            replies = await asyncio.gather(*(complete(http, 2000) for _ in range(4)))
            server.process.terminate()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                while True:
                    (await http.ask("/health")).writer.close()
            for reply in replies:
                events = await collect(reply)
                assert ends_of(events) == ["length"] and events[-1] == "[DONE]"
                assert text_in(events) == text_of((1, 2, 3), 0, 2000)

        drive(url, load)
        assert server.wait_for_end() == 0


def told_to_end(server: Server, url: str, stop: Callable[[], None]) -> None:
    async def load(http: Http) -> None:
        reply = await complete(http, ENDLESS)
        reading = asyncio.create_task(collect(reply))
        await asyncio.to_thread(stop)
        events = await reading
        assert ends_of(events) == ["error"]
        assert "shut down" in events[-1]["error"]["message"]

    drive(url, load)
    assert server.wait_for_end() == 0


def test_what_does_not_end_in_time_is_told(checkpoint: Path):
    with serving(checkpoint, "--shutdown-timeout", "0.3") as (server, url):
        told_to_end(server, url, server.process.terminate)


def test_a_second_signal_does_not_wait(checkpoint: Path):
    with serving(checkpoint, "--shutdown-timeout", "1000") as (server, url):

        def stop() -> None:
            server.process.send_signal(signal.SIGINT)
            server.wait_for("Stopping")
            server.process.send_signal(signal.SIGINT)

        told_to_end(server, url, stop)


def test_a_client_that_leaves_is_aborted(checkpoint: Path):
    """Streaming or not, running or waiting."""

    async def load(http: Http) -> None:
        for _ in range(2):
            await complete(http, ENDLESS)
        for stream in (True, False):
            # These wait for a place and have no answer yet.
            await http.send("/v1/completions", body(ENDLESS, stream))
        leaving = list(http.writers)
        await until(http, lambda text: metric(text, "eaglerun:num_requests_waiting") == 2)
        for writer in leaving:
            writer.close()
        aborted = "eaglerun:request_success_total"
        await until(http, lambda text: metric(text, aborted, finished_reason="abort") == 4)
        assert metric(await metrics(http), "eaglerun:num_requests_running") == 0

    with serving(checkpoint, engine="--max-num-seqs 2") as (_, url):
        drive(url, load)


def test_a_full_queue_answers_at_once(checkpoint: Path):
    async def load(http: Http) -> None:
        await complete(http, ENDLESS)
        await http.send("/v1/completions", body(ENDLESS))
        await until(http, lambda text: metric(text, "eaglerun:num_requests_waiting") == 1)
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            refused = await complete(http, 5)
            times.append(time.perf_counter() - begin)
            assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
            assert "waiting" in (await refused.json())["error"]["message"]
        # The median: this machine may be busy with something else.
        assert sorted(times)[10] < 0.010
        reason = "eaglerun:requests_refused_total"
        assert metric(await metrics(http), reason, reason="queue full") == 20

    flags = ("--max-queued-requests", "1")
    with serving(checkpoint, *flags, engine="--max-num-seqs 1 --pause-ms 5") as (_, url):
        drive(url, load)


def test_several_prompts_wait_together_or_not_at_all(checkpoint: Path):
    """Nothing of a refused request is taken and aborted, which would keep others out meanwhile."""

    async def ask(http: Http, prompts: int, n: int) -> Reply:
        body = {"prompt": [[1]] * prompts, "n": n, "max_tokens": 1}
        return await http.ask("/v1/completions", body)

    async def load(http: Http) -> None:
        await complete(http, ENDLESS, True)
        impossible = await ask(http, 5, 2)
        error = (await impossible.json())["error"]
        assert impossible.status == 400 and error["param"] == "prompt"
        assert "10 answers" in error["message"] and "at most 8 may wait" in error["message"]
        asked = [asyncio.create_task(complete(http, 1)) for _ in range(4)]
        await until(http, lambda text: metric(text, "eaglerun:num_requests_waiting") == 4)
        assert (await ask(http, 3, 2)).status == 503
        text = await metrics(http)
        assert metric(text, "eaglerun:num_requests_waiting") == 4
        assert 'finished_reason="abort"' not in text
        asked.append(asyncio.create_task(ask(http, 2, 2)))
        await until(http, lambda text: metric(text, "eaglerun:num_requests_waiting") == 8)
        for task in asked:
            task.cancel()

    flags = ("--max-queued-requests", "8")
    with serving(checkpoint, *flags, engine="--max-num-seqs 1 --pause-ms 5") as (_, url):
        drive(url, load)


def test_waiting_too_long_is_a_503(checkpoint: Path):
    async def load(http: Http) -> None:
        await complete(http, ENDLESS)
        refused = await complete(http, 5)
        assert refused.status == 503 and "retry-after" in refused.headers
        assert "within 0.2 s" in (await refused.json())["error"]["message"]

    with serving(checkpoint, "--queue-timeout", "0.2", engine="--max-num-seqs 1") as (_, url):
        drive(url, load)


def test_many_streams_with_random_leavers(checkpoint: Path):
    """256 at once: what stays is whole and ends once; nothing remains of what left."""

    async def one(http: Http, chance: random.Random) -> bool:
        prompt = [chance.randrange(1, 200) for _ in range(chance.randrange(1, 20))]
        size = chance.randrange(1, 200)
        leave_after = chance.choice([None, None, 0, chance.randrange(40)])
        reply = await complete(http, size, True, prompt)
        events: list[Any] = []
        async for event in reply.events():
            if leave_after is not None and len(events) >= leave_after:
                reply.writer.close()
                return False
            events.append(event)
        reply.writer.close()
        assert ends_of(events) == ["length"] and events[-1] == "[DONE]"
        assert text_in(events) == text_of(tuple(prompt), 0, size)
        return True

    async def load(http: Http) -> None:
        chance = random.Random(7)
        files = metric(await metrics(http), "process_open_fds")
        memory = []
        for _ in range(3):
            whole = await asyncio.gather(*(one(http, chance) for _ in range(256)))
            assert 100 < sum(whole) < 256
            await until(http, lambda text: metric(text, "process_open_fds") <= files)
            text = await until(http, lambda t: metric(t, "eaglerun:num_requests_running") == 0)
            assert metric(text, "eaglerun:num_requests_waiting") == 0
            memory.append(metric(text, "process_resident_memory_bytes"))
        assert memory[2] < memory[0] + 16e6
        names = ("length", "abort")
        ended = [metric(text, "eaglerun:request_success_total", finished_reason=n) for n in names]
        assert sum(ended) == 3 * 256
        assert metric(text, "eaglerun:requests_failed_total") == 0

    with serving(checkpoint, engine="--max-num-seqs 100") as (_, url):
        drive(url, load)


def test_the_port_is_open_while_the_model_loads(checkpoint: Path, tmp_path: Path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with started(checkpoint, engine=f"--load-from {gate}") as server:
        port = server.wait_for(r"Listening on \S+:(\d+)")[1]
        url = f"http://127.0.0.1:{port}"
        assert get(url, "/health") == (200, b"")
        for path in ("/health/ready", "/v1/models", "/"):
            status, answer = get(url, path)
            assert status == 503 and json.loads(answer)["error"]["code"] == "loading"
        gate.write_bytes(b"")
        assert server.wait_until_ready() == url
        assert get(url, "/health/ready")[0] == 200


def test_stopping_while_the_model_loads(checkpoint: Path, tmp_path: Path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    with started(checkpoint, engine=f"--load-from {gate}") as server:
        server.wait_for("Listening on")
        server.process.terminate()
        assert server.wait_for_end() == 0


def test_refusals_to_start_are_one_line(checkpoint: Path, tmp_path: Path):
    with started(checkpoint, engine="--refuse 'no such model here'") as server:
        assert server.wait_for_end() == 2
        assert server.log[-1] == "eaglerun: no such model here\n"
    with started(checkpoint, engine="--die") as server:
        assert server.wait_for_end() == 1
        assert server.log[-1] == "eaglerun: the engine process ended, code 9\n"
    with started(tmp_path) as server:
        assert server.wait_for_end() == 2
        assert "the server needs a tokenizer" in server.log[-1]


def test_what_can_be_listened_on():
    def listen(**settings: object) -> socket.socket:
        return bind(resolve({"http_port": 0, **settings}, environ={}).server)

    with pytest.raises(ConfigError, match="host = 0.0.0.0: .* no api_key"):
        listen(host="0.0.0.0")
    with pytest.raises(ConfigError, match="no api_key"):
        listen(host="0.0.0.0", api_key=" , ")
    for settings in ({"api_key": "k"}, {"allow_no_api_key": True}):
        with listen(host="0.0.0.0", **settings) as socket_:
            assert socket_.getsockname()[0] == "0.0.0.0"
    with listen() as socket_:
        host, port = socket_.getsockname()
        with pytest.raises(ConfigError, match=f"cannot listen on {host}:{port}: .*in use"):
            listen(http_port=port)


def test_files_that_do_not_work(tmp_path: Path):
    def check(**settings: object) -> None:
        check_files(resolve(settings, environ={}).server)

    with pytest.raises(ConfigError, match="chat_template = none.jinja: there is no such file"):
        check(chat_template="none.jinja")
    with pytest.raises(ConfigError, match="ssl_certfile is missing"):
        check(ssl_keyfile="key.pem")
    with pytest.raises(ConfigError, match="ssl_certfile = .*none.pem: .*No such file"):
        check(ssl_certfile=str(tmp_path / "none.pem"))
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    with pytest.raises(ConfigError, match="ssl_certfile = "):
        check(ssl_certfile=str(broken))


def test_tls(checkpoint: Path, tmp_path: Path):
    authority = trustme.CA()
    served = authority.issue_cert("127.0.0.1")
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    trusted = str(tmp_path / "authority.pem")
    for pem in served.cert_chain_pems:
        pem.write_to_path(cert, append=True)
    served.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(trusted)
    with serving(checkpoint, "--ssl-certfile", cert, "--ssl-keyfile", key) as (_, url):
        assert url.startswith("https://")
        context = ssl.create_default_context(cafile=trusted)
        with urllib.request.urlopen(f"{url}/health/ready", context=context) as reply:
            assert reply.status == 200


def test_the_key_guards_all_but_health_and_the_bare_page(checkpoint: Path):
    env = os.environ | {"EAGLERUN_API_KEY": "one,two"}
    with serving(checkpoint, env=env) as (server, url):
        assert any("# api_key: set" in line for line in server.log)
        assert not any("one,two" in line for line in server.log)
        for path in ("/health", "/", "/page/page.js", "/page/uplot.css"):
            assert get(url, path)[0] == 200
        for path in ("/metrics", "/page/data", "/config", "/health/ready", "/debug/speculation"):
            assert get(url, path)[0] == 401
            assert get(url, path, {"authorization": "Bearer two"})[0] == 200
