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
            eager, output = move(), move()
        # Nothing runs while it is captured: what it returns is as yet whatever lay there.
        poison(output, eager)
        replay = SimpleNamespace(replay=lambda: overwrite(output, move()))
        self._captured[key] = (replay, output)
        return self._captured[key]


def poison(value: object, other: object) -> None:
    """Make what is new in ``value`` mean nothing: what two runs return alike was there before."""
    if isinstance(value, Tensor):
        assert isinstance(other, Tensor)
        if value.data_ptr() != other.data_ptr():
            value.fill_(torch.nan if value.is_floating_point() else 2**30)
    elif isinstance(value, tuple):
        assert isinstance(other, tuple)
        for part, another in zip(value, other, strict=True):
            poison(part, another)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            poison(getattr(value, field.name), getattr(other, field.name))


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
