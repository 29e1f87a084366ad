"""The guard: keys, rates, sizes, ids."""

import asyncio
import json

import pytest
from fake_engine import MODEL, TOKENIZER, FakeEngine, call, get, make_app, post
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from eaglerun.server.app import create_app
from eaglerun.server.auth import MAX_BUCKETS, Buckets
from eaglerun.server.bodies import is_nested
from eaglerun.server.chat import Chat
from eaglerun.server.settings import Limits, RateLimit, Settings
from eaglerun.server.vocabulary import Vocabulary

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
KEYS = ("sk-one", "sk-two")


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", f"/v1/models/{MODEL}"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/completions"),
        ("POST", "/v1/responses"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/health/ready"),
        ("GET", "/version"),
        ("GET", "/config"),
        ("GET", "/debug/speculation"),
        ("GET", "/openapi.json"),
        ("GET", "/metrics"),
        ("GET", "/nothing"),
        ("DELETE", "/health/"),
    ],
)
def test_every_route_but_health_wants_a_key(method, path):
    app = make_app(api_keys=KEYS)
    for headers in ({}, bearer("sk-"), bearer("sk-one "[:-2]), {"authorization": "Basic sk-one"}):
        reply = asyncio.run(call(app, method, path, headers=headers))
        assert reply.status == 401 and reply.error["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert get(app, "/health").status == 200


def test_any_of_the_keys_will_do():
    app = make_app(api_keys=KEYS)
    for key in KEYS:
        assert get(app, "/v1/models", headers=bearer(key)).status == 200
    assert get(make_app(), "/v1/models").status == 200


def test_paths_may_be_opened():
    settings = Settings((MODEL,), 0, "0", api_keys=KEYS, open_paths=frozenset({"/health", "/"}))
    page = Route("/", lambda request: PlainTextResponse("page"))
    metrics = Route("/metrics", lambda request: PlainTextResponse("metrics"))
    chat = Chat(Vocabulary(TOKENIZER), None, settings.limits)
    app = create_app(FakeEngine(), settings, chat, [metrics, page])
    assert get(app, "/").body == b"page"
    assert get(app, "/metrics").status == 401
    assert get(app, "/metrics", headers=bearer("sk-one")).body == b"metrics"
    reply = post(app, "/v1/chat/completions", CHAT, headers=bearer("sk-one"))
    assert reply.error["message"] == "messages: the model has no chat template"


def test_ids():
    app = make_app()
    assert (
        get(app, "/health", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    )
    for odd in ("", "a b", "x" * 65, "é"):
        given = get(app, "/health", headers={"x-request-id": odd}).headers["x-request-id"]
        assert given != odd and len(given) == 32
    reply = get(app, "/nothing", headers={"x-request-id": "mine-2"})
    assert reply.error["request_id"] == "mine-2"


def test_the_rate_of_a_key():
    now = 0.0
    buckets = Buckets(RateLimit(requests_per_second=2, burst=3), lambda: now)
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b") == 0
    now = 0.5
    assert [buckets.take("a") for _ in range(2)] == [0, 0.5]
    now = 100.0
    assert [buckets.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    for i in range(MAX_BUCKETS + 10):
        buckets.take(str(i))
    assert len(buckets._buckets) == MAX_BUCKETS


def test_too_many_requests():
    rate = RateLimit(requests_per_second=0.01, burst=1)
    app = make_app(api_keys=KEYS, rate_limit=rate)
    one, two = (bearer(key) for key in KEYS)
    assert post(app, "/v1/chat/completions", CHAT, headers=one).status == 200
    reply = post(app, "/v1/chat/completions", CHAT, headers=one)
    assert reply.status == 429 and reply.error["type"] == "rate_limit_error"
    assert int(reply.headers["retry-after"]) in (100, 101)
    assert post(app, "/v1/chat/completions", CHAT, headers=two).status == 200
    assert get(app, "/v1/models", headers=one).status == 200


def test_bodies_have_a_size():
    app = make_app(limits=Limits(max_body_bytes=100))
    body = json.dumps(CHAT).encode()
    assert post(app, "/v1/chat/completions", None, chunks=[body]).status == 200
    reply = post(
        app, "/v1/chat/completions", None, chunks=[body], headers={"content-length": "101"}
    )
    assert reply.status == 413 and reply.headers["connection"] == "close"
    reply = post(app, "/v1/chat/completions", None, chunks=[b" " * 60, b" " * 60, body])
    assert reply.status == 413 and reply.error["message"] == "the body exceeds 100 bytes"


def test_bodies_have_a_time():
    async def run() -> None:
        app = make_app(limits=Limits(max_body_seconds=0.0))
        never = asyncio.Event()

        async def receive():
            await never.wait()

        sent = []

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
            "root_path": "",
        }
        await app(scope, receive, send)
        assert sent[0]["status"] == 408
        assert b"did not arrive in time" in sent[1]["body"]

    asyncio.run(run())


def test_bodies_have_a_size_together():
    """While one arrives there is no room for another; once it is done there is."""
    app = make_app(limits=Limits(max_held_bytes=1000))
    body = json.dumps({"prompt": "x" * 600}).encode()

    async def run() -> list[int]:
        arrived, rest, sent = asyncio.Event(), asyncio.Event(), []
        parts = [body[:500], body[500:]]

        async def receive():
            if len(parts) < 2:
                await rest.wait()
            if not parts:
                await asyncio.Event().wait()
            arrived.set()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/tokenize", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")], "root_path": ""}
        slow = asyncio.create_task(app(scope, receive, send))
        await arrived.wait()
        found = [(await call(app, "POST", "/tokenize", None, chunks=[body])).status]
        rest.set()
        await slow
        found.append(sent[0]["status"])
        found.append((await call(app, "POST", "/tokenize", None, chunks=[body])).status)
        return found

    assert asyncio.run(run()) == [503, 200, 200]


def test_headers_have_a_size():
    app = make_app(limits=Limits(max_header_bytes=1000))
    reply = get(app, "/health", headers={"x-long": "x" * 1000})
    assert reply.status == 431 and "exceed 1000 bytes" in reply.error["message"]


@pytest.mark.parametrize(
    ("body", "nested"),
    [
        (b"[[1]]", False),
        (b"[[[1]]]", True),
        (b'{"a": {"b": {}}}', True),
        (b"[[], [], [], []]", False),
        (b'["[[[[", "]]]]", "\\"[[["]', False),
        (b'["\\\\", [[1]]]', True),
        (b'["unterminated [[[[', False),
        (b'"' + b'\\"' * 100_000 + b"[" * 5, False),
    ],
)
def test_nesting(body, nested):
    assert is_nested(body, 2) == nested


def test_bodies_are_not_nested_deeply():
    app = make_app()
    reply = post(app, "/v1/completions", None, chunks=[b'{"prompt": ' + b"[" * 1_000_000])
    assert reply.status == 400 and reply.error["message"] == "the body is nested deeper than 64"
    deep = {"type": "object"}
    for _ in range(20):
        deep = {"type": "object", "properties": {"x": deep}}
    tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
    assert post(app, "/v1/chat/completions", CHAT | {"tools": [tool]}).status == 200


def test_other_origins():
    app = make_app(api_keys=KEYS, cors_origins=("https://chat.example",))
    asks = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    reply = asyncio.run(call(app, "OPTIONS", "/v1/chat/completions", headers=asks))
    assert reply.status == 200
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    reply = get(app, "/v1/models", headers=bearer("sk-one") | {"origin": "https://chat.example"})
    assert reply.headers["access-control-allow-origin"] == "https://chat.example"
    asks["origin"] = "https://other.example"
    reply = asyncio.run(call(app, "OPTIONS", "/v1/chat/completions", headers=asks))
    assert reply.status == 400
    reply = asyncio.run(call(make_app(api_keys=KEYS), "OPTIONS", "/v1/models", headers=asks))
    assert reply.status == 401


def test_health():
    engine = FakeEngine()
    app = make_app(engine)
    assert (get(app, "/health").status, get(app, "/health").body) == (200, b"")
    reply = get(app, "/health/ready")
    assert (reply.status, reply.json()["status"]) == (200, "ready")
    for fields, word, alive in (
        ({"ready": False}, "loading", 200),
        ({"hung": True}, "hung", 200),
        ({"alive": False, "ready": False}, "dead", 503),
    ):
        app = make_app(FakeEngine(**fields))
        reply = get(app, "/health/ready")
        assert (reply.status, reply.json()["status"]) == (503, word)
        assert get(app, "/health").status == alive


def test_what_is_told_of_the_server():
    app = make_app(model_names=(MODEL, "alias"), version="1.2")
    models = get(app, "/v1/models").json()
    assert [card["id"] for card in models["data"]] == [MODEL, "alias"]
    assert get(app, f"/v1/models/{MODEL}").json()["id"] == MODEL
    assert get(app, "/v1/models/other").error["code"] == "model_not_found"
    assert get(app, "/version").json() == {"version": "1.2"}
    assert get(app, "/config").body.startswith(b"[model]")
    assert get(app, "/debug/speculation").json() == {
        "enabled": True,
        "total_draft_tokens": 6,
        "total_accepted_tokens": 4,
        "acceptance_rate": 4 / 6,
        "average_tokens_per_forward": 3.0,
        "distribution": {"0": 0, "1": 1, "2": 0, "3": 1},
        "distribution_percent": {"0": 0.0, "1": 0.5, "2": 0.0, "3": 0.5},
    }
    assert get(app, "/v1/completions").status == 405
    answer = post(app, "/v1/completions", {"prompt": "x", "model": "alias"}).json()
    assert answer["model"] == MODEL


def test_priority_is_for_those_the_operator_named():
    body = CHAT | {"priority": -5}

    def ask(app: object, key: str | None) -> int:
        headers = None if key is None else bearer(key)
        return post(app, "/v1/chat/completions", body, headers=headers).status

    assert ask(make_app(), None) == 400
    assert ask(make_app(priority_keys=("all",)), None) == 200
    for named, found in (((), (400, 400)), (("sk-two",), (400, 200)), (("all",), (200, 200))):
        app = make_app(api_keys=KEYS, priority_keys=named)
        assert tuple(ask(app, key) for key in KEYS) == found
    reply = post(make_app(), "/v1/chat/completions", body)
    assert reply.error["param"] == "priority" and "--allow-priority" in reply.error["message"]
    assert post(make_app(), "/v1/chat/completions", CHAT | {"priority": 0}).status == 200


def test_cached_prompts_are_shared_by_key():
    def salts(*keys: str | None, **settings: object) -> list[str]:
        engine = FakeEngine()
        app = make_app(engine, api_keys=KEYS if keys[0] else (), **settings)
        for key in keys:
            for body in (CHAT, CHAT | {"cache_salt": "s"}):
                headers = None if key is None else bearer(key)
                assert post(app, "/v1/chat/completions", body, headers=headers).status == 200
        return [request.cache_salt for request in engine.requests]

    one, own, other, others = salts(*KEYS)
    assert len({one, own, other, others}) == 4
    assert salts("sk-one", "sk-one")[2:] == [one, own]
    assert not any("sk-" in salt for salt in (one, other))
    assert salts(*KEYS, prefix_cache_by_key=False) == ["", "s", "", "s"]
    assert salts(None) == ["", "s"]


def test_why_it_is_not_ready():
    for fields, status, reason in (
        ({"ready": False, "stage": "Warming up"}, "loading", "the model is loading: warming up"),
        ({"ready": False, "draining": True}, "draining", "the server is shutting down"),
        ({"hung": True}, "hung", "requests are open and no step came for 0.0 s"),
        ({"alive": False}, "dead", "the engine's process has ended"),
        ({}, "ready", None),
    ):
        found = get(make_app(FakeEngine(**fields)), "/health/ready").json()
        assert (found["status"], found["reason"]) == (status, reason)


def test_a_full_queue_refuses_before_it_reads():
    app = make_app(FakeEngine(is_full=True))
    reply = post(app, "/v1/chat/completions", None, chunks=[b"not read"])
    assert reply.status == 503 and reply.error["code"] == "overloaded"
    assert reply.headers["retry-after"] == "1"
    assert post(app, "/tokenize", {"prompt": "x"}).status == 200
