"""Typed reading of the keys of a checkpoint's config.json. A value that will not do is refused.

Every refusal names the key with its path, the value that stands there and what is allowed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eaglerun.checkpoint.formats import STORED
from eaglerun.errors import CheckpointError, ConfigError

# No size of a model is larger; the largest known vocabulary has 20 bits.
MAX_SIZE = 1 << 28
# Far beyond any model: what is larger would fill the memory before it is found to be wrong.
MAX_LAYERS, MAX_POSITIONS = 1 << 12, 1 << 24
# The largest JSON file of a checkpoint: an index of a million tensors is smaller.
MAX_JSON_BYTES = 256 << 20
# At most the whole head is rotated; the exact bound stands where the head's size is known.
MAX_ROTARY_FACTOR = 1024
# How much of a value a message shows.
MAX_SHOWN = 200


def shown(value: object) -> str:
    """A value of a config as a message shows it."""
    if isinstance(value, str | list | tuple | Mapping) and len(value) > MAX_SHOWN:
        return f"a {type(value).__name__} of {len(value)} items"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def read_json(path: Path) -> object:
    """The value in a JSON file of a checkpoint. ConfigError where it is too large or no JSON."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} has {size} bytes, allowed {MAX_JSON_BYTES}")
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    return value


def read_checkpoint_config(path: Path) -> dict[str, Any]:
    """config.json of a checkpoint; its generation_config.json, if any, under that key.

    Raises CheckpointError without a config.json, ConfigError where a file is no JSON object.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path / 'config.json'} is missing, so {path} is no checkpoint")
    config = _read_object(path / "config.json")
    if (path / "generation_config.json").is_file():
        config["generation_config"] = _read_object(path / "generation_config.json")
    return config


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


class Fields:
    """One JSON object of a config, and which of its keys were asked for.

    ``path`` is what messages put before a key ("target text_config."). A key whose value is null
    counts as absent, as transformers writes its configs; ``states`` tells the two apart.
    """

    def __init__(self, values: Mapping[str, object], path: str) -> None:
        self.values = values
        self.path = path
        self._read: set[str] = set()
        self._sections: dict[str, Fields] = {}

    def name(self, key: str) -> str:
        return f"{self.path}{key}"

    def states(self, key: str) -> bool:
        """Whether the key is there, be it with null."""
        self._read.add(key)
        return key in self.values

    def raw(self, key: str) -> object:
        self._read.add(key)
        return self.values.get(key)

    def refusal(self, key: str, allowed: str) -> ConfigError:
        return ConfigError(f"{self.name(key)} = {shown(self.raw(key))}: {allowed}")

    def integer(
        self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE
    ) -> int:
        """The integer at ``key``; without a default the key must be there."""
        value = self.raw(key)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.name(key)} is missing; it must be an integer")
            return default
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.refusal(key, f"must be an integer of at least {minimum}")
        if value > maximum:
            raise self.refusal(key, f"must be at most {maximum}")
        return value

    def number(self, key: str, default: float) -> float:
        """The positive number at ``key``."""
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
            raise self.refusal(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(key, "must be true or false")
        return value

    def text(self, key: str) -> str | None:
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.refusal(key, "must be a string")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refusal(key, "must be a list of strings")
        items = [item for item in value if isinstance(item, str)]
        if len(items) != len(value):
            raise self.refusal(key, "must be a list of strings")
        return tuple(items)

    def integers(self, key: str) -> tuple[int, ...] | None:
        """The list of integers at ``key``; true and false count as 1 and 0."""
        value = self.raw(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.refusal(key, "must be a list of integers")
        items = [int(item) for item in value if isinstance(item, int)]
        if len(items) != len(value):
            raise self.refusal(key, "must be a list of integers")
        return tuple(items)

    def section(self, key: str) -> "Fields":
        """The object at ``key``; an empty one if the key is absent."""
        value = self.raw(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.refusal(key, "must be an object")
        if key not in self._sections:
            self._sections[key] = Fields(value or {}, f"{self.path}{key}.")
        return self._sections[key]

    def only(self, key: str, *allowed: object) -> None:
        """Refuse a value at ``key`` that is not allowed; an absent key is taken for allowed."""
        if self.raw(key) is not None and self.raw(key) not in allowed:
            known = " or ".join(repr(value) for value in allowed)
            raise self.refusal(key, f"this build knows only {known}")

    def unread(self, keys: Mapping[str, object]) -> list[str]:
        """Those of ``keys``, with the keys of objects inside, that nobody asked for."""
        unread = []
        for key, value in keys.items():
            if key not in self._read:
                unread.append(key)
            elif key in self._sections and isinstance(value, Mapping):
                unread += [f"{key}.{name}" for name in self._sections[key].unread(value)]
        return unread


def agree(first: Fields, first_key: str, second: Fields, second_key: str) -> tuple[Fields, str]:
    """Which of two spellings of one fact to read; both are fine as long as they say the same."""
    one, other = first.raw(first_key), second.raw(second_key)
    if one is not None and other is not None and one != other:
        raise ConfigError(
            f"{first.name(first_key)} = {shown(one)} and {second.name(second_key)} = "
            f"{shown(other)}: "
            "these mean the same and must be equal"
        )
    return (second, second_key) if one is None and other is not None else (first, first_key)


def check_kind(
    fields: Fields, what: str, architectures: tuple[str, ...], model_types: tuple[str, ...]
) -> None:
    """Refuse a config of another model. One of the two keys may be absent."""
    names = fields.texts("architectures") or ()
    model_type = fields.text("model_type")
    if names and not set(names) & set(architectures):
        raise fields.refusal("architectures", f"{what} is {' or '.join(architectures)}")
    if model_type is not None and model_type not in model_types:
        raise fields.refusal("model_type", f"{what} is {' or '.join(model_types)}")
    if not names and model_type is None:
        raise ConfigError(
            f"{fields.name('architectures')} and model_type are missing; {what} has "
            f"architectures {' or '.join(architectures)}"
        )


def refuse_quantized(fields: Fields) -> None:
    for key in ("quantization_config", "compression_config"):
        section = fields.section(key)
        if section.values:
            raise section.refusal("quant_method", f"this build loads {', '.join(STORED)} only")


def stored_dtype(*levels: Fields) -> str:
    """The dtype of the stored weights, from the first level that states it."""
    for fields in levels:
        # transformers wrote torch_dtype before version 4.56.
        for key in ("dtype", "torch_dtype"):
            value = fields.text(key)
            if value is not None:
                fields.only(key, *STORED)
                return value
    return "bfloat16"  # of every published checkpoint


def rope(fields: Fields, default_theta: float) -> tuple[float, float | None]:
    """(theta, partial rotary factor or None if unstated) of plain RoPE; any scaling is refused."""
    parameters = fields.section("rope_parameters")
    plain = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for section in (parameters, fields.section("rope_scaling")):
        section.only("rope_type", "default")
        section.only("type", "default")
        for key, value in section.values.items():
            if key not in plain and value is not None:
                raise section.refusal(key, "this build knows only RoPE without scaling")
    where, key = agree(parameters, "rope_theta", fields, "rope_theta")
    theta = where.number(key, default_theta)
    where, key = agree(parameters, "partial_rotary_factor", fields, "partial_rotary_factor")
    factor = None if where.raw(key) is None else where.number(key, 1.0)
    if factor is not None and factor > MAX_ROTARY_FACTOR:
        raise where.refusal(key, f"must be at most {MAX_ROTARY_FACTOR}")
    return theta, factor


def refuse_unless(relations: tuple[tuple[bool, str], ...], prefix: str) -> None:
    """Raise ConfigError with the first message whose relation does not hold."""
    for holds, message in relations:
        if not holds:
            raise ConfigError(f"{prefix}{message}")
