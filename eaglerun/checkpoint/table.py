"""The words of a table of weights: a weight, the parts that a checkpoint stores, their split.

A table describes every weight of a model once. Loader, allocation, budget and the bench's floor
derive what they need from it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from eaglerun.checkpoint.formats import PLAIN, WeightFormat

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """How the ranks of a group divide a part: into equal runs along ``axis``, rank by rank.

    units   how many things that are never cut lie along the axis: heads, experts, plain rows
    copies  more ranks than units: neighbours hold the same unit; without it that is refused
    """

    axis: int
    units: int
    copies: bool = False

    def share(self, extent: int, rank: int, size: int) -> slice:
        """The run of rank ``rank`` of ``size`` along an axis of ``extent``."""
        runs = min(size, self.units) if self.copies else size
        if self.units % runs or size % runs:
            raise ValueError(f"{self.units} cannot be divided among {size} ranks")
        run, length = rank * runs // size, extent // runs
        return slice(run * length, (run + 1) * length)


@dataclass(frozen=True, slots=True)
class Part:
    """A block of a weight that a checkpoint stores by itself.

    name       "q", "gate" and the like; empty where the weight has one part
    component  the line of the budget that counts it; None: it is no parameter
    spellings  names of its tensor, the hub's first. A "{}" counts the first dimension: each index
               of it is a tensor of its own
    split      None: every rank holds all of it
    """

    name: str
    shape: Shape
    component: str | None
    spellings: tuple[str, ...]
    split: Split | None = None

    @property
    def num_tensors(self) -> int | None:
        """How many tensors hold it, one an index; None: one tensor of its shape."""
        return self.shape[0] if "{}" in self.spellings[0] else None

    def share(self, rank: int, size: int) -> tuple[slice, ...]:
        """The region that rank ``rank`` of ``size`` holds."""
        region = [slice(0, extent) for extent in self.shape]
        if self.split is not None:
            axis = self.split.axis
            region[axis] = self.split.share(self.shape[axis], rank, size)
        return tuple(region)


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, or buffer, of a model: parts that follow one another along ``axis``.

    fused  names of a tensor that holds all of it, where a checkpoint may store it so
    """

    name: str
    parts: tuple[Part, ...]
    axis: int = 0
    format: WeightFormat = PLAIN
    fused: tuple[str, ...] = ()

    def shape(self, rank: int = 0, size: int = 1) -> Shape:
        """The shape that rank ``rank`` of ``size`` holds; the whole by default.

        Raises  ValueError where the weight cannot be divided among so many ranks.
        """
        first = self._region(self.parts[0], rank, size)
        rows = self.rows(*(part.name for part in self.parts), rank=rank, size=size)
        return (*first[: self.axis], rows, *first[self.axis + 1 :])

    def rows(self, *names: str, rank: int = 0, size: int = 1) -> int:
        """The extent along the axis of the parts of these names."""
        return sum(
            self._region(part, rank, size)[self.axis] for part in self.parts if part.name in names
        )

    def _region(self, part: Part, rank: int, size: int) -> Shape:
        try:
            return tuple(run.stop - run.start for run in part.share(rank, size))
        except ValueError as error:
            raise ValueError(f"{' '.join((self.name, part.name)).strip()}: {error}") from None


@dataclass(frozen=True, slots=True)
class WeightTable:
    """The weights of a model, and what else its checkpoints hold.

    components  lines of the budget, in the order to show them
    prefixes    what may stand before the name of a tensor
    skipped     beginnings of full names that belong to parts this build does not have
    zeros       tensors that say something only where they are not zero, without prefix
    """

    components: tuple[str, ...]
    prefixes: tuple[str, ...]
    skipped: tuple[str, ...]
    zeros: frozenset[str] = frozenset()
    weights: dict[str, Weight] = field(default_factory=dict)

    def add(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            assert weight.name not in self.weights, weight.name
            self.weights[weight.name] = weight

    def num_parameters(self, weight: str, *parts: str) -> int:
        """Numbers in the named parts of a weight."""
        return sum(math.prod(p.shape) for p in self.weights[weight].parts if p.name in parts)


def single(
    name: str,
    shape: Shape,
    component: str | None,
    split: Split | None = None,
    spellings: tuple[str, ...] = (),
    format: WeightFormat = PLAIN,
) -> Weight:
    """A weight of one part, spelled like the parameter unless there are ``spellings``."""
    return Weight(name, (Part("", shape, component, spellings or (name,), split),), format=format)


def spelled(modules: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The spellings of a tensor that lies in a module of several names."""
    return tuple(module + name for module in modules)
