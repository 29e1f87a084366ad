"""Every tensor name a checkpoint may use, and the place in which parameter it fills.

Derived from a table of weights, so that a loader can tell exactly what is missing and what is
too much.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from eaglerun.checkpoint.table import Shape, Weight, WeightTable

# Tables of rotary embeddings, which older libraries saved beside the weights.
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


@dataclass(frozen=True, slots=True)
class Piece:
    """The place of a tensor of ``shape``: it is copied to parameter[where].

    parts   what it brings, as names of the hub's layout: its own, or those that it fuses
    stored  the dtypes it may have, as safetensors names them
    """

    parameter: str
    where: tuple[int | slice, ...]
    shape: Shape
    parts: tuple[str, ...]
    stored: tuple[str, ...]


class TensorNames:
    """The tensors that fill the weights of a table.

    pieces  tensor name without prefix -> its piece, all spellings
    parts   part -> parameter: each has to be brought by exactly one tensor
    """

    def __init__(self, table: WeightTable) -> None:
        self.table = table
        self.pieces: dict[str, Piece] = {}
        self.parts: dict[str, str] = {}
        for weight in table.weights.values():
            brought = []
            for names, piece in _pieces(weight):
                brought.append(names[0])
                self.parts[names[0]] = weight.name
                self.pieces |= dict.fromkeys(names, piece)
            whole = Piece(weight.name, (), weight.shape(), tuple(brought), weight.format.stored)
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


def _pieces(weight: Weight) -> Iterator[tuple[tuple[str, ...], Piece]]:
    """(spellings, piece) of every tensor that holds a part, or one index of a part."""
    starts, start = [], 0
    for part in weight.parts:
        starts.append(start)
        start += part.shape[weight.axis]
    for i in range(weight.parts[0].num_tensors or 1):
        for part, start in zip(weight.parts, starts, strict=True):
            where: list[int | slice] = []
            names, shape = part.spellings, part.shape
            if len(weight.parts) > 1:
                run = slice(start, start + part.shape[weight.axis])
                where = [*(slice(None) for _ in range(weight.axis)), run]
            if part.num_tensors is not None:
                names, shape = tuple(name.format(i) for name in names), shape[1:]
                where = [i, *where[1:]]
            yield names, Piece(weight.name, tuple(where), shape, (names[0],), weight.format.stored)
