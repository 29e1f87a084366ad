"""Which hosts a server answers to, and whose word on a client's address it takes."""

import asyncio
import json
import os
from pathlib import Path

import pytest
from fake_engine import call, get, make_app
from served import Http, drive, metric, serving, write_checkpoint
from served import get as fetch

from eaglerun.config import resolve
from eaglerun.errors import ConfigError
from eaglerun.server.auth import WRONG_KEYS
from eaglerun.server.hosts import AllowedHosts, allowed_hosts, host_of, trusted_proxies
from eaglerun.server.serve import hosts_of

LOCAL = ("localhost", "localhost:8000", "127.0.0.1", "127.8.9.1:80", "[::1]:8000", "a.localhost")
OTHERS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "10.0.0.1",
    "localhost.a",
    "",
)


def test_hosts():
    assert [host_of(h) for h in ("A.b:80", "[::1]:1", "[::1]", "::1", "a.b.")] == [
        *("a.b", "::1", "::1", ":", "a.b")
    ]
    local = allowed_hosts((), loopback_only=True, has_keys=False)
    assert all(host in local for host in LOCAL) and not any(host in local for host in OTHERS)
    for loopback_only, has_keys in ((True, True), (False, True), (False, False)):
        assert all(host in allowed_hosts((), loopback_only, has_keys) for host in (*LOCAL, *OTHERS))
    named = allowed_hosts(("API.example", "*.apis.example", "10.0.0.1"), False, True)
    for host in (*LOCAL, "api.example:8", "x.apis.example", "a.b.apis.example", "10.0.0.1"):
        assert host in named
    for host in ("apis.example", "evilapis.example", "evil.example", "10.0.0.2"):
        assert host not in named
    assert "evil.example" in allowed_hosts(("*",), True, False)
    for bad in ("http://a.example", "a.example:80", "a b"):
        with pytest.raises(ConfigError, match="allowed_hosts = "):
            allowed_hosts((bad,), True, False)


@pytest.mark.parametrize(
    ("settings", "answers"),
    [
        ({}, False),
        ({"host": "localhost"}, False),
        ({"api_key": "k"}, True),
        ({"host": "0.0.0.0", "allow_no_api_key": True}, True),
        ({"allowed_hosts": "evil.example"}, True),
        ({"host": "0.0.0.0", "allowed_hosts": "a.example"}, False),
    ],
)
def test_what_settings_mean(settings: dict[str, object], answers: bool):
    assert ("evil.example" in hosts_of(resolve(settings, environ={}).server)) == answers


def test_another_host_is_refused_everywhere():
    app = make_app(hosts=AllowedHosts(()))
    for path in ("/health", "/v1/models", "/", "/nothing"):
        reply = get(app, path, headers={"host": "evil.example"})
        assert reply.status == 403 and reply.error["code"] == "host_not_allowed"
        assert "evil" not in reply.error["message"]
    assert get(app, "/health", headers={"host": "localhost:8000"}).status == 200


def test_no_redirect_to_the_host_that_was_sent():
    reply = get(make_app(), "/health/", headers={"host": "evil.example"})
    assert reply.status == 404 and "location" not in reply.headers


def test_proxies():
    trusts = trusted_proxies(("10.0.0.0/8", "::1"))
    assert trusts("10.1.2.3") and trusts("::1")
    assert not trusts("127.0.0.1") and not trusts("a unix socket")
    assert trusted_proxies(("*",))("1.2.3.4") and not trusted_proxies(())("127.0.0.1")
    with pytest.raises(ConfigError, match="forwarded_allow_ips = proxy: expected addresses"):
        trusted_proxies(("proxy",))


def forwarded(address: str) -> dict[str, str]:
    return {"x-forwarded-for": address}


@pytest.mark.parametrize("flags", [(), ("--forwarded-allow-ips", "127.0.0.1")], ids=["no", "yes"])
def test_a_forwarded_address_counts_where_its_proxy_is_trusted(tmp_path: Path, flags: tuple[str]):
    rate = ("--rate-limit", "0.001", "--rate-limit-burst", "1")
    body = {"prompt": [1], "max_tokens": 1}

    async def load(http: Http) -> None:
        found = []
        for address in ("1.1.1.1", "2.2.2.2", "2.2.2.2"):
            reply = await http.ask("/v1/completions", body, forwarded(address))
            found.append(reply.status)
        assert found == ([200, 200, 429] if flags else [200, 429, 429])
        # Only the last address of the chain is the proxy's word; what came before is the client's.
        reply = await http.ask("/v1/completions", body, forwarded("3.3.3.3, 1.1.1.1"))
        assert reply.status == 429

    # uvicorn's own variable does not matter.
    env = os.environ | {"FORWARDED_ALLOW_IPS": "*"}
    with serving(write_checkpoint(tmp_path), *rate, *flags, env=env) as (_, url):
        drive(url, load)
        text = fetch(url, "/metrics")[1].decode()
        refused = metric(text, "eaglerun:http_responses_total", code="429")
        assert refused == (2 if flags else 3)
        assert metric(text, "eaglerun:http_connections_open") == 1
        status, answer = fetch(url, "/health", {"host": "evil.example"})
        # The client of these tests sends a Host of its own too.
        assert status == 400 and "2 came" in json.loads(answer)["error"]["message"]


def test_wrong_keys_from_an_address_are_limited():
    app = make_app(api_keys=("right", "late"))

    def ask(key: str, address: str = "1.1.1.1") -> int:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.run(call(app, "GET", "/v1/models", None, headers, client=address)).status

    assert ask("right") == 200
    tried = [ask(f"wrong-{i}") for i in range(WRONG_KEYS.burst + 20)]
    assert tried[: WRONG_KEYS.burst] == [401] * WRONG_KEYS.burst
    assert tried[WRONG_KEYS.burst + 1 :] == [429] * 19
    # A key that was right there before still is; another is not looked at, right or wrong.
    assert ask("right") == 200
    assert ask("late") == 429
    assert ask("late", "2.2.2.2") == 200
