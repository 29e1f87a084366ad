"""Paths, methods and bodies as clients, browsers and probes send them."""

import asyncio
import gzip
import json
import zlib

import pytest
from fake_engine import MODEL, FakeEngine, Reply, call, get, make_app, post

from eaglerun.server.settings import Limits

APP = make_app()
CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def head(path: str) -> Reply:
    return asyncio.run(call(APP, "HEAD", path))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/"])
def test_the_list_of_models_with_and_without_its_last_slash(path):
    assert [model["id"] for model in get(APP, path).json()["data"]] == [MODEL]
    assert get(APP, f"/v1/models/{MODEL}").json()["id"] == MODEL


@pytest.mark.parametrize(
    "path", ["/health", "/health/ready", "/version", "/config", "/v1/models", f"/v1/models/{MODEL}"]
)
def test_head_answers_as_get_does(path):
    asked, found = head(path), get(APP, path)
    assert asked.status == found.status == 200
    names = ("content-type", "content-length")
    assert [asked.headers.get(n) for n in names] == [found.headers.get(n) for n in names]


def test_head_says_what_is_wrong_too():
    assert head("/v1/models/other").status == 404
    assert head(CHAT).status == 405
    dead = make_app(FakeEngine(alive=False))
    assert asyncio.run(call(dead, "HEAD", "/health")).status == 503


def sent(body: bytes, encoding: str, **limits: int) -> Reply:
    app = make_app(limits=Limits(**limits)) if limits else APP
    return post(app, CHAT, None, chunks=[body], headers={"content-encoding": encoding})


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", " GZIP ", "identity"])
def test_bodies_may_be_compressed(encoding):
    body = json.dumps(BODY).encode()
    assert sent(gzip.compress(body) if "ip" in encoding.lower() else body, encoding).status == 200


@pytest.mark.parametrize(
    ("body", "encoding", "status", "words"),
    [
        (b"{}", "br", 415, "only gzip and identity are supported"),
        (b"{}", "gzip, gzip", 415, "only gzip and identity are supported"),
        (b"{}", "gzip", 400, "not what gzip makes"),
        (gzip.compress(b"{}", mtime=0)[:-4], "gzip", 400, "not what gzip makes"),
        (gzip.compress(b"{}", mtime=0) + b"x", "gzip", 400, "not what gzip makes"),
        (zlib.compress(b"{}"), "gzip", 400, "not what gzip makes"),
        (gzip.compress(b"{", mtime=0), "gzip", 400, "not valid JSON"),
    ],
)
def test_compressed_bodies_that_are_refused(body, encoding, status, words):
    reply = sent(body, encoding)
    assert reply.status == status and words in reply.error["message"]


def test_a_compressed_body_has_the_limit_of_a_plain_one():
    body = json.dumps(BODY).encode() + b" " * 100_000
    packed = gzip.compress(body)
    assert sent(packed, "gzip", max_body_bytes=len(body)).status == 200
    reply = sent(packed, "gzip", max_body_bytes=len(body) - 1)
    assert reply.status == 413 and "unpacks to more than" in reply.error["message"]


STAINLESS = ("lang", "package-version", "os", "arch", "runtime", "runtime-version", "retry-count")


def test_a_browser_may_send_the_headers_of_its_client():
    app = make_app(cors_origins=("https://chat.example",), api_keys=("sk-1",))
    names = ["authorization", "content-type", *(f"x-stainless-{name}" for name in STAINLESS)]
    names += ["x-stainless-timeout", "openai-organization", "user-agent"]
    headers = {
        "origin": "https://chat.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": ", ".join(names),
    }
    reply = asyncio.run(call(app, "OPTIONS", CHAT, headers=headers))
    assert reply.status == 200
    allowed = reply.headers["access-control-allow-headers"].lower()
    assert all(name in allowed for name in names)
    headers["origin"] = "https://other.example"
    assert asyncio.run(call(app, "OPTIONS", CHAT, headers=headers)).status == 400
