"""The engine's end of the socket between the two processes."""

import socket

import pytest

from eaglerun.messages import Tokens
from eaglerun.server import link, wire
from eaglerun.server.link import Hangup, HttpLink


def test_an_http_process_that_hangs_does_not_hold_the_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(link, "SEND_TIMEOUT_S", 0.05)
    http, engine = socket.socketpair()
    with http:
        end = HttpLink(engine.detach())
        report = wire.Step(tokens=(Tokens("a", 0, (1,), "x" * 100_000),))
        with pytest.raises(Hangup, match="it took nothing for 0.05 s"):
            for _ in range(1000):
                end.send(report)
        assert end.receive(0) is None
        end.close()


def test_an_http_process_that_ended_is_noticed():
    http, engine = socket.socketpair()
    end = HttpLink(engine.detach())
    http.close()
    with pytest.raises(Hangup, match="^$"):
        end.send(wire.Loading("x"))
    with pytest.raises(Hangup, match="^$"):
        end.receive(None)
    end.close()
