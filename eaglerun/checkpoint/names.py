"""Every tensor name a checkpoint may use, and which places of which parameter it fills.

Derived from a table of weights, so that a loader can tell exactly what is missing and what is
too much.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from eaglerun.checkpoint.table import Part, Shape, Weight, WeightTable

# Tables of rotary embeddings, which older libraries saved beside the weights.
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True)
class Run:
    """A block of a tensor that is copied: tensor[source] to parameter[where]."""

    source: tuple[slice, ...]
    where: tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor of ``shape`` that a rank takes, and where it puts it.

    runs    a block for each part that the tensor holds; none where other ranks take all of it
    parts   what it brings, as names of the hub's layout: its own, or those that it fuses
    stored  the dtypes it may have, as safetensors names them
    """

    parameter: str
    runs: tuple[Run, ...]
    shape: Shape
    parts: tuple[str, ...]
    stored: tuple[str, ...]


class TensorNames:
    """The tensors that fill the weights of a table, as rank ``rank`` of ``size`` holds them.

    pieces  tensor name without prefix -> its piece, all spellings
    parts   part -> parameter: each has to be brought by exactly one tensor
    """

    def __init__(self, table: WeightTable, rank: int = 0, size: int = 1) -> None:
        self.table = table
        self.pieces: dict[str, Piece] = {}
        self.parts: dict[str, str] = {}
        for weight in table.weights.values():
            brought = []
            places = _places(weight, rank, size)
            for names, piece in _pieces(weight, places):
                brought.append(names[0])
                self.parts[names[0]] = weight.name
                self.pieces |= dict.fromkeys(names, piece)
            runs = tuple(Run(place.in_weight, place.where) for place in places)
            whole = Piece(weight.name, runs, weight.shape(), tuple(brought), weight.format.stored)
            self.pieces |= dict.fromkeys(weight.fused, whole)

    def is_skipped(self, name: str) -> bool:
        """A tensor without a place here: another part's, or a table that is computed."""
        return name.startswith(self.table.skipped) or name.endswith(COMPUTED)

    def must_be_zero(self, name: str) -> bool:
        zeros, prefixes = self.table.zeros, self.table.prefixes
        return any(name == prefix + zero for prefix in prefixes for zero in zeros)

    def find(self, name: str) -> Piece | None:
        """The piece of a tensor by its full name."""
        for prefix in self.table.prefixes:
            if name.startswith(prefix) and (piece := self.pieces.get(name[len(prefix) :])):
                return piece
        return None


@dataclass(frozen=True, slots=True)
class _Place:
    """A part of a weight on a rank.

    share      what the rank holds of the part, and in_weight of the whole weight
    where      where that lies in the rank's parameter
    """

    part: Part
    share: tuple[slice, ...]
    in_weight: tuple[slice, ...]
    where: tuple[slice, ...]


def _places(weight: Weight, rank: int, size: int) -> list[_Place]:
    """The parts of a weight, which follow one another along its axis, whole and on a rank."""
    found, axis = [], weight.axis
    start = held = 0
    for part in weight.parts:
        share = part.share(rank, size)
        where = [slice(0, run.stop - run.start) for run in share]
        in_weight, length = list(share), where[axis].stop
        in_weight[axis] = slice(start + share[axis].start, start + share[axis].stop)
        where[axis] = slice(held, held + length)
        found.append(_Place(part, share, tuple(in_weight), tuple(where)))
        start, held = start + part.shape[axis], held + length
    return found


def _pieces(weight: Weight, places: list[_Place]) -> Iterator[tuple[tuple[str, ...], Piece]]:
    """(spellings, piece) of every tensor that holds a part, or one index of a part."""
    stored = weight.format.stored
    for i in range(weight.parts[0].num_tensors or 1):
        for place in places:
            part, share, where = place.part, place.share, place.where
            names, shape = part.spellings, part.shape
            runs: tuple[Run, ...] = (Run(share, where),)
            if part.num_tensors is not None:
                names, shape = tuple(name.format(i) for name in names), shape[1:]
                first, *rest = share
                is_held = first.start <= i < first.stop
                runs = (Run(tuple(rest), (i - first.start, *where[1:])),) if is_held else ()
            yield names, Piece(weight.name, runs, shape, (names[0],), stored)
