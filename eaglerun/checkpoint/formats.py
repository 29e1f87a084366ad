"""How the numbers of a weight are held in memory, and what a checkpoint may store for them."""

from collections.abc import Mapping
from dataclasses import dataclass

DTYPE_BYTES = {
    "float8_e4m3fn": 1,
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float64": 8,
    "int64": 8,
}
# The dtypes that weights may be stored in: config.json's name -> safetensors' name.
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The format of a weight.

    stored  dtypes of the tensors that may fill it, as safetensors names them
    held    dtype of the model -> dtype of the weight in memory
    """

    stored: tuple[str, ...]
    held: Mapping[str, str]

    def num_bytes(self, count: int, dtype: str) -> int:
        """Bytes of ``count`` numbers in a model of ``dtype``."""
        return count * DTYPE_BYTES[self.held[dtype]]


_MODELS = ("bfloat16", "float16", "float32", "float64")
PLAIN = WeightFormat(tuple(STORED.values()), {dtype: dtype for dtype in _MODELS})
# Never narrower than float32.
WIDE = WeightFormat(
    tuple(STORED.values()), {**PLAIN.held, "bfloat16": "float32", "float16": "float32"}
)
IDS = WeightFormat(("I64",), dict.fromkeys(_MODELS, "int64"))
