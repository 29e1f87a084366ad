"""The words of a table of weights: a weight, the parts that a checkpoint stores, their split.

A table describes every weight of a model once. Loader, allocation, budget and the bench's floor
derive what they need from it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from eaglerun.checkpoint.formats import PLAIN, WeightFormat
from eaglerun.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """How the ranks of a group divide a part: into equal runs along ``axis``, rank by rank.

    units   how many things that are never cut lie along the axis: heads, experts, plain rows
    key     the key of config.json that counts them, for a refusal
    copies  more ranks than units: neighbours hold the same unit; without it that is refused
    uneven  units that do not divide: the last run is shorter; without it that is refused
    """

    axis: int
    units: int
    key: str
    copies: bool = False
    uneven: bool = False

    def divides(self, size: int) -> bool:
        """True where each of ``size`` ranks has something to hold, as much as the rules allow."""
        if self.uneven:
            return (size - 1) * -(-self.units // size) < self.units
        runs = self._runs(size)
        return self.units % runs == 0 and size % runs == 0

    def share(self, extent: int, rank: int, size: int) -> slice:
        """The run of rank ``rank`` of ``size`` along an axis of ``extent``."""
        if not self.divides(size):
            raise ValueError(f"{self.units} cannot be divided among {size} ranks")
        runs, unit = self._runs(size), extent // self.units
        length = -(-self.units // runs) * unit
        start = rank * runs // size * length
        return slice(start, min(start + length, extent))

    def _runs(self, size: int) -> int:
        return min(size, self.units) if self.copies else size


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

    model       "target" or "draft", for a refusal
    components  lines of the budget, in the order to show them
    prefixes    what may stand before the name of a tensor
    skipped     beginnings of full names that belong to parts this build does not have
    zeros       tensors that say something only where they are not zero, without prefix
    """

    model: str
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

    def splits(self) -> tuple[Split, ...]:
        """The ways in which ranks divide its parts, each once."""
        parts = (part for weight in self.weights.values() for part in weight.parts)
        return tuple(dict.fromkeys(part.split for part in parts if part.split is not None))


def check_ranks(size: int, *tables: WeightTable) -> None:
    """ConfigError where ``size`` ranks cannot divide the weights of these tables among them."""
    splits = [(table.model, split) for table in tables for split in table.splits()]
    wrong = next(((model, split) for model, split in splits if not split.divides(size)), None)
    if wrong is None:
        return
    model, split = wrong
    most = min(split.units for _, split in splits if not split.copies)
    allowed = (n for n in range(1, most + 1) if all(split.divides(n) for _, split in splits))
    raise ConfigError(
        f"tensor_parallel_size = {size}: {model} {split.key} = {split.units} cannot be divided "
        f"among {size} ranks; allowed {', '.join(map(str, allowed))}"
    )


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
