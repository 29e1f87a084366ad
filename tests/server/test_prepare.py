"""Bodies and prompts that are prepared by other processes: the same answers, bounded, never in the
way of others."""

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import get, make_app, post
from served import Http, Server, children, drive, is_fork_of, metric, serving, write_checkpoint

from eaglerun.server.bodies import SMALL_BYTES, check_nodes, count_nodes
from eaglerun.server.failures import MAX_MESSAGE, ApiError
from eaglerun.server.prepare_jobs import Body, Load, Refusal
from eaglerun.server.prepare_process import Preparer
from eaglerun.server.settings import Limits, Settings

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
LARGE_TOOL = TOOL | {"function": {"name": "f", "description": "x" * (1 << 20)}}
HI = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def shared(checkpoint: Path) -> Iterator[tuple[Server, str]]:
    """One server for the tests that leave it as it was."""
    with serving(checkpoint) as found:
        yield found


def preparer(checkpoint: Path, max_model_len: int = 1 << 20, **limits: Any) -> Preparer:
    settings = Settings(("scripted",), 1, "0", limits=Limits(**limits))
    return Preparer.load(Load(str(checkpoint), None, settings, max_model_len, 3))


def refused(one: Preparer, path: str, body: object) -> Refusal:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = one.do(Body(path, content))
    assert isinstance(found, Refusal)
    return found


BODIES = [
    ("/v1/chat/completions", HI),
    ("/v1/chat/completions", HI | {"tools": [TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", HI | {"tools": [TOOL, OTHER_TOOL], "tool_choice": "required"}),
    (
        "/v1/chat/completions",
        {
            "messages": [*HI["messages"], {"role": "assistant", "content": "Once upon"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ),
    ("/v1/chat/completions", HI | {"truncate_prompt_tokens": 5, "return_token_ids": True}),
    ("/v1/chat/completions", HI | {"chat_template_kwargs": {"thinking_mode": "disabled"}}),
    ("/v1/completions", {"prompt": "hello", "echo": True}),
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2}),
    ("/v1/completions", {"prompt": [[70, 71], [72]], "echo": True}),
    ("/v1/completions", {"prompt": [[70, 71], [72]], "echo": True, "truncate_prompt_tokens": 1}),
    ("/v1/completions", {"prompt": ["abc", "d"], "echo": True, "truncate_prompt_tokens": 1}),
    ("/v1/responses", {"input": "hi", "instructions": "be brief", "metadata": {"a": "b"}}),
    ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("/tokenize", HI),
    ("/detokenize", {"tokens": [70, 71]}),
    # Refusals too.
    ("/v1/chat/completions", HI | {"tool": 1}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": 5}]}),
    ("/v1/chat/completions", HI | {"temperature": -1}),
    ("/v1/chat/completions", HI | {"tool_choice": "required"}),
    ("/v1/completions", {"prompt": [1 << 20]}),
    ("/v1/completions", {"prompt": [], "n": 99}),
    ("/v1/completions", {"prompt": "x", "model": "other"}),
    ("/v1/responses", {"input": "hi", "metadata": {"a": []}}),
    ("/tokenize", {}),
    ("/detokenize", {"tokens": [1 << 20]}),
    ("/v1/completions", {"prompt": "x", "metadata": float("nan")}),
]


def test_a_large_body_is_answered_as_a_small_one(shared: tuple[Server, str]):
    """Blanks make a body large."""

    def settled(answer: bytes) -> str:
        value = json.loads(answer)
        for name in ("id", "created", "created_at"):
            value.pop(name, None)
        (value.get("error") or {}).pop("request_id", None)
        for item in value.get("output", ()):
            item.pop("id", None)
        return re.sub(r"call_[0-9a-f]+", "call_1", json.dumps(value))

    async def load(http: Http) -> None:
        for path, body in BODIES:
            found = []
            for blanks in (b"", b" " * SMALL_BYTES):
                content = json.dumps(body | {"max_tokens": 4} if "v1/c" in path else body).encode()
                reply = await http.ask(path, content + blanks)
                found.append((reply.status, settled(await reply.body())))
                reply.writer.close()
            assert found[0] == found[1], path

    drive(shared[1], load)


def test_nodes():
    assert count_nodes(b'{"a": [1, 2, {}]}') == (6, 3)
    limits = Limits(max_values=10, max_containers=3)
    check_nodes(b"[" + b"1," * 7 + b"1]", limits)
    check_nodes(b'["' + b"[,{" * 100 + b'"]', limits)
    for body, word in (
        (b"[" + b"1," * 20 + b"1]", "10 values"),
        (b"[[],[],[]]", "3 lists and objects"),
        (b'["' + b'\\"[' * 50 + b'", [[[]]]]', "3 lists and objects"),
    ):
        with pytest.raises(ApiError, match=f"more than {word}"):
            check_nodes(body, limits)


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (
            "/v1/chat/completions",
            HI
            | {"tools": [TOOL | {"function": {"name": "f", "parameters": {"a": [[]] * 70_000}}}]},
            "more than 65536 lists and objects",
        ),
        ("/v1/chat/completions", HI | {"tools": [TOOL] * 300}, "300 given, allowed 256"),
        ("/v1/chat/completions", HI | {"user": "x" * (1 << 20)}, "at most 512 characters"),
        ("/v1/chat/completions", HI | {"stop": ["x"] * 100_000}, "100000 given, allowed 16"),
        ("/v1/completions", {"prompt": "x", "stop_token_ids": [7] * 100_000}, "20000 values"),
        ("/v1/chat/completions", HI | {"tools": [LARGE_TOOL]}, "tools: larger than 1048576 bytes"),
        (
            "/v1/responses",
            {"input": "x", "metadata": {str(i): 1 for i in range(100_000)}},
            "100000 pairs given, allowed 16",
        ),
        ("/v1/completions", {"prompt": "x" * 20_000}, "exceed the model's length of 128 tokens"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "y" * 20_000}]}, "128"),
        ("/detokenize", {"tokens": [70] * 129}, "129 given, the model's length is 128"),
        ("/detokenize", b'{"tokens": [' + b"7," * (1 << 21) + b"7]}", "more than 2097152 values"),
        ("/detokenize", b'{"tokens": [', "not valid JSON"),
        ("/detokenize", b"[" * 65, "nested deeper than 64"),
        ("/detokenize", b"[1]", "must be a JSON object"),
    ],
)
def test_what_a_large_body_may_hold(checkpoint: Path, path: str, body: object, words: str):
    limit = 1 << 22 if "larger than" in words else 128
    found = refused(preparer(checkpoint, max_model_len=limit), path, body)
    assert found.status == 400 and words in found.message
    assert len(found.message) <= MAX_MESSAGE


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "x", "metadata": {"k" * 1_000_000: 1}}),
        ("/v1/responses", {"input": "x", "metadata": {"k" * 1_000_000: "v"}}),
        ("/v1/chat/completions", HI | {"x" * 1_000_000: 1}),
        ("/v1/chat/completions", HI | {"chat_template_kwargs": {"x" * 1_000_000: 1}}),
        ("/v1/chat/completions", HI | {"tool_choice": "x" * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "x" * 1_000_000}]}),
        ("/v1/chat/completions", HI | {"logit_bias": {"x" * 1_000_000: 1}}),
        ("/v1/completions", {"prompt": "x", "cache_salt": "x" * 1_000_000}),
        ("/v1/models/" + "x" * 10_000, None),
    ],
)
def test_an_error_repeats_little(path: str, body: object):
    reply = get(make_app(), path) if body is None else post(make_app(), path, body)
    assert 400 <= reply.status < 500 and len(reply.body) < 2_000


def write_template(checkpoint: Path, tmp_path: Path, text: str) -> tuple[str, str]:
    file = tmp_path / "template.jinja"
    file.write_text(text)
    return ("--chat-template", str(file))


LOOPS = "{% set x=range(99999) %}{% for a in x %}{% for b in x %}{% for c in x %}{% endfor %}"
LOOPS += "{% endfor %}{% endfor %}"
COSTLY = [
    LOOPS,
    "{{ messages[0].content | indent(3000000000) }}",
    "{% set n = namespace(s=[1]) %}{% for i in range(9999) %}{% set n.s = n.s + n.s %}{% endfor %}",
]


def test_a_template_that_takes_too_much_costs_its_request_only(checkpoint: Path, tmp_path: Path):
    """One template that does each of COSTLY, as the message says."""
    text = "{% if messages[0].content == 'hi' %}hi{% endif %}"
    for i, costly in enumerate(COSTLY):
        text += f"{{% if messages[0].content.startswith('{i}\n') %}}{costly}{{% endif %}}"
    flags = write_template(checkpoint, tmp_path, text)

    async def load(http: Http) -> None:
        neighbour = await http.ask(
            "/v1/completions", {"prompt": [1], "max_tokens": 1 << 29} | STREAM
        )
        reading = asyncio.create_task(worst_gap(neighbour, asyncio.Event()))
        for i in range(len(COSTLY)):
            message = {"role": "user", "content": f"{i}\nx"}
            begin = time.perf_counter()
            reply = await http.ask("/v1/chat/completions", {"messages": [message]})
            error = (await reply.json())["error"]
            assert reply.status == 400, error
            assert (
                "too much" in error["message"]
                or "too long" in error["message"]
                or ("cannot render" in error["message"])
            )
            assert time.perf_counter() - begin < 10
            assert (await http.ask("/v1/chat/completions", HI | {"max_tokens": 1})).status == 200
        reading.cancel()

    with serving(checkpoint, *flags, "--shutdown-timeout", "0") as (server, url):
        drive(url, load)

        async def leave(http: Http) -> None:
            message = {"role": "user", "content": "0\nx"}
            await http.send("/v1/chat/completions", {"messages": [message]})
            await asyncio.sleep(0.1)
            server.process.send_signal(signal.SIGTERM)

        begin = time.perf_counter()
        drive(url, leave)
        # The template that runs is not waited for.
        assert server.wait_for_end() == 0
        assert time.perf_counter() - begin < 10


def test_a_template_whose_constants_take_too_much(checkpoint: Path, tmp_path: Path):
    """They are computed when the template is compiled; it must not be in this process."""
    flags = write_template(checkpoint, tmp_path, "{{ 'x' | indent(3000000000, true) }}")

    async def load(http: Http) -> None:
        reply = await http.ask("/v1/chat/completions", HI)
        assert reply.status == 400
        text = (await (await http.ask("/metrics")).body()).decode()
        assert metric(text, "process_virtual_memory_bytes") < 3e9

    with serving(checkpoint, *flags) as (_, url):
        drive(url, load)


STREAM = {"stream": True}


async def worst_gap(reply: Any, done: asyncio.Event) -> float:
    """The longest time between two events of a stream, until ``done`` or its end."""
    worst, last = 0.0, time.perf_counter()
    async for _ in reply.events():
        now = time.perf_counter()
        worst, last = max(worst, now - last), now
        if done.is_set():
            break
    return worst


def test_a_large_body_is_in_nobodys_way(checkpoint: Path):
    """The figure is in recipes/server.md; here only that nothing stands still for seconds."""
    size = 8 << 20
    tool = b'{"type":"function","function":{"name":"f","parameters":{"a":[%s[]]}}}'
    hostile = [
        ("/v1/chat/completions", b'"tools":[' + tool % (b"[]," * (size // 3)) + b"]"),
        ("/v1/chat/completions", b'"messages":[' + b"{}," * (size // 3) + b"{}]"),
        ("/v1/responses", b'"metadata":{' + b'"a":1,' * (size // 6) + b'"a":1}'),
        ("/detokenize", b'"tokens":[' + b"7," * (size // 2) + b"7]"),
        ("/v1/completions", b'"prompt":"' + b"ab " * (size // 3 // 2) + b'"'),
    ]

    async def load(http: Http) -> None:
        neighbour = await http.ask(
            "/v1/completions", {"prompt": [1], "max_tokens": 1 << 29} | STREAM
        )
        done = asyncio.Event()
        gap = asyncio.create_task(worst_gap(neighbour, done))
        for path, field in hostile:
            begin = time.perf_counter()
            attack = asyncio.create_task(http.ask(path, b'{"x":0,' + field + b"}"))
            while not attack.done():
                assert (await http.ask("/health")).status == 200
            reply = await attack
            assert reply.status in (400, 503)
            assert time.perf_counter() - begin < 30
        done.set()
        assert await gap < 3

    with serving(checkpoint, engine="--pause-ms 10 --num-accepted 0") as (_, url):
        drive(url, load)


def test_a_short_prompt_does_not_wait_for_long_ones(shared: tuple[Server, str]):
    """And what was given up does not run on."""
    text = "word and more " * 300_000

    async def load(http: Http) -> None:
        attacks = [
            asyncio.create_task(http.ask("/v1/completions", {"prompt": text, "max_tokens": 1}))
            for _ in range(4)
        ]
        await asyncio.sleep(0.3)
        begin = time.perf_counter()
        reply = await http.ask("/v1/chat/completions", HI | {"max_tokens": 1})
        took = time.perf_counter() - begin
        assert reply.status == 200 and not all(attack.done() for attack in attacks)
        assert took < 2
        for attack in attacks:
            attack.cancel()
        for writer in http.writers:
            writer.close()
        # All four are gone; a long one is next.
        begin = time.perf_counter()
        long = {"prompt": "w" * (64 << 10), "max_tokens": 1}
        assert (await http.ask("/v1/completions", long)).status == 200
        assert time.perf_counter() - begin < 3

    drive(shared[1], load)


def test_the_work_of_a_killed_worker_goes_on_in_another(shared: tuple[Server, str]):
    async def load(http: Http) -> None:
        assert (await http.ask("/v1/chat/completions", HI | {"max_tokens": 1})).status == 200
        for pid in workers(shared[0].process.pid):
            os.kill(pid, signal.SIGKILL)
        assert (await http.ask("/v1/chat/completions", HI | {"max_tokens": 1})).status == 200

    drive(shared[1], load)


def test_the_server_ends_with_its_preparation_process(checkpoint: Path):
    with serving(checkpoint) as (server, _):
        pid = server.process.pid
        [source] = [p for p in children(pid) if is_fork_of(p, pid)]
        os.kill(source, signal.SIGKILL)
        assert server.wait_for_end() == 1
        assert any("the preparation process ended" in line for line in server.log)


def test_a_client_that_leaves_inside_its_body_is_no_error(checkpoint: Path):
    async def load(http: Http) -> None:
        for content in (b"", b'{"prompt": '):
            _, writer = await asyncio.open_connection(http.host, http.port)
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {http.host}\r\n"
            head += "content-type: application/json\r\ncontent-length: 100\r\n\r\n"
            writer.write(head.encode() + content)
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
        while True:
            text = (await (await http.ask("/metrics")).body()).decode()
            if metric(text, "eaglerun:http_responses_total", code="499") == 2:
                break

    with serving(checkpoint) as (server, url):
        drive(url, load)
        server.process.terminate()
        assert server.wait_for_end() == 0
        assert not any("Traceback" in line or "ERROR" in line for line in server.log)


def test_a_large_body_where_none_is_read(shared: tuple[Server, str]):
    async def load(http: Http) -> None:
        reader, writer = await asyncio.open_connection(http.host, http.port)
        content = b"[" + b"1," * (1 << 20) + b"1]"
        head = f"GET /v1/models HTTP/1.1\r\nhost: {http.host}\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        writer.close()

    drive(shared[1], load)


def workers(server_pid: int) -> list[int]:
    """Processes that the source has forked; the source has no other children."""
    sources = [child for child in children(server_pid) if is_fork_of(child, server_pid)]
    return [worker for source in sources for worker in children(source)]
