"""What a loader asks of safetensors files, counted."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor


class Reads:
    """Stands in for safe_open.

    num_bytes  tensor name -> bytes that were asked for
    largest    tensor name -> the most that one call asked for
    shapes     of all that was read, in order
    """

    def __init__(self) -> None:
        self.num_bytes: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.shapes: list[tuple[int, ...]] = []

    @contextmanager
    def __call__(self, file: Path, framework: str) -> Iterator["_File"]:
        with safe_open(file, framework=framework) as inner:
            yield _File(inner, self)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        self.num_bytes[name] += tensor.nbytes
        self.largest[name] = max(self.largest[name], tensor.nbytes)
        self.shapes.append(tuple(tensor.shape))
        return tensor


class _File:
    def __init__(self, inner: Any, reads: Reads) -> None:
        self._inner = inner
        self._reads = reads

    def keys(self) -> list[str]:
        return list(self._inner.keys())

    def get_tensor(self, name: str) -> Tensor:
        return self._reads.keep(name, self._inner.get_tensor(name))

    def get_slice(self, name: str) -> "_Slice":
        return _Slice(name, self._inner.get_slice(name), self._reads)


class _Slice:
    def __init__(self, name: str, inner: Any, reads: Reads) -> None:
        self._name = name
        self._inner = inner
        self._reads = reads

    def get_shape(self) -> list[int]:
        return list(self._inner.get_shape())

    def get_dtype(self) -> str:
        return str(self._inner.get_dtype())

    def __getitem__(self, region: Any) -> Tensor:
        return self._reads.keep(self._name, self._inner[region])
