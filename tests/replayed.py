"""Graphs as a GPU has them, on a CPU."""

import dataclasses
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from eaglerun.run.graphs import Graphs


class Replayed(Graphs):
    """The first run of a key fixes which tensors its move reads and returns; a replay reads what
    lies there now and overwrites what was returned."""

    def __init__(
        self,
        device: torch.device,
        enabled: bool,
        blank: Callable[[], AbstractContextManager[None]],
        max_bytes: int | None,
        progress: bool | None,
        in_steps: bool,
    ) -> None:
        super().__init__(device, enabled, blank, max_bytes, progress, in_steps)
        self.enabled = True

    @property
    def keys(self) -> list[Any]:
        return list(self._captured)

    def run(self, key: Hashable, move: Callable[[], Any], capture: bool = True) -> Any:
        assert capture
        return super().run(key, move, capture)

    def _capture(self, key: Hashable, move: Callable[[], Any]) -> Any:
        with self._blank():
            move()
            output = move()
        replay = SimpleNamespace(replay=lambda: overwrite(output, move()))
        self._captured[key] = (replay, output)
        return self._captured[key]


def overwrite(old: object, new: object) -> None:
    if isinstance(old, Tensor):
        assert isinstance(new, Tensor)
        old.copy_(new)
    elif isinstance(old, tuple):
        assert isinstance(new, tuple)
        for a, b in zip(old, new, strict=True):
            overwrite(a, b)
    elif dataclasses.is_dataclass(old):
        for field in dataclasses.fields(old):
            overwrite(getattr(old, field.name), getattr(new, field.name))
    else:
        assert old is None and new is None
