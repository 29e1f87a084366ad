"""The engine's process while nobody asks for anything."""

import socket
import threading

import pytest
from scripted_engine import ScriptedEngine

from eaglerun.messages import Request, SamplingParams
from eaglerun.server import engine_process, wire
from eaglerun.server.engine_process import EngineLoop
from eaglerun.server.link import Frames, HttpLink, frame
from eaglerun.stats import Builds


class Missing(ScriptedEngine):
    """An engine whose steps missed two things."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.missed = 2

    @property
    def has_missed(self) -> bool:
        return self.missed > 0

    @has_missed.setter
    def has_missed(self, value: bool) -> None: ...

    def make_missed(self) -> None:
        assert not self.has_work
        self.order.append("made")
        self.missed -= 1
        self.idle_builds = Builds(graphs_captured=2 - self.missed)
        self.builds = self.idle_builds

    def step(self):
        self.order.append("step")
        return super().step()


def test_what_steps_missed_is_made_once_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_process, "QUIET_S", 0.01)
    http, end = socket.socketpair()
    http.settimeout(30)
    engine = Missing()
    link = HttpLink(end.detach())
    loop = EngineLoop(engine, link)
    request = Request("a", (1, 2), SamplingParams(max_tokens=2))
    http.sendall(frame(wire.encode(wire.Submit(request))))
    thread = threading.Thread(target=loop.run, daemon=True)
    thread.start()
    frames, seen = Frames(), []
    while not (seen and seen[-1].graphs_captured == 2):
        frames.add(http.recv(65536))
        while (content := frames.take()) is not None:
            report = wire.decode_report(content)
            if report.totals is not None:
                seen.append(report.totals.builds_idle)
                assert report.totals.builds == Builds()
    http.sendall(frame(wire.encode(wire.Stop("done"))))
    thread.join(30)
    assert not thread.is_alive()
    link.close()
    http.close()
    # First the request, to its end.
    assert engine.order[-2:] == ["made", "made"] and "made" not in engine.order[:-2]
    assert [b.graphs_captured for b in seen[-2:]] == [1, 2]
