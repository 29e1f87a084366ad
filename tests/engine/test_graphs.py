"""The line that a capture draws; the captures themselves need a GPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from eaglerun.run.graphs import Graphs


@pytest.mark.parametrize("progress", [True, None])
def test_a_capture_is_named_once(progress, monkeypatch, capsys: pytest.CaptureFixture[str]):
    graphs = Graphs(torch.device("cpu"), True, nullcontext, None, progress)
    graphs.enabled = True
    replayed: list[str] = []

    def capture(key: str, move: object):
        graphs._captured[key] = (SimpleNamespace(replay=lambda: replayed.append(key)), key)
        return graphs._captured[key]

    monkeypatch.setattr(graphs, "_capture", capture)
    assert [graphs.run(key, lambda: None) for key in ("target", "draft", "draft")] == [
        "target",
        "draft",
        "draft",
    ]
    drawn = capsys.readouterr().err
    assert replayed == ["target", "draft", "draft"]
    if progress is None:
        assert drawn == ""
    else:
        assert "capturing: 0 graphs [00:00], target" in drawn
        assert "capturing: 1 graphs [00:00], draft" in drawn and "2 graphs" not in drawn
