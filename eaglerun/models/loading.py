"""Weights into the models: found, checked in full by name and shape, then streamed into place.

A rank reads of every tensor the part that it holds, and no more.

A checkpoint is read twice: its headers, so that everything missing, too much or misshapen is
said before any weight is read; then tensor by tensor into the parameters that exist already.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.fields import read_json, shown
from eaglerun.checkpoint.names import Piece, TensorNames
from eaglerun.checkpoint.table import WeightTable
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.checkpoint.weights import Share, draft_weights, target_weights
from eaglerun.errors import CheckpointError, ConfigError
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.layers import Embedding, GemmaNorm, Norm
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.progress import byte_bar

logger = logging.getLogger(__name__)

# All that serving reads of a repository; weights in other formats stay where they are.
NEEDED_FILES = ("*.json", "*.safetensors", "*.jinja")
INDEX = "model.safetensors.index.json"
# How many faults of a checkpoint one message lists.
MAX_FAULTS = 8
EMBEDDING = "embed_tokens.weight"
NOT_MOVED = "the draft's vocabulary is the target's, and its ids are used as they are"
# Which tensors go where, in the order of the files that hold them.
Plan = dict[Path, list[tuple[str, Piece]]]


def resolve_checkpoint(name_or_path: str) -> Path:
    """The directory of a checkpoint: a local one, or a hub id's, downloaded where that is needed.

    Raises CheckpointError where there is neither, which says how to get it.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) or name_or_path.startswith("."):
        raise CheckpointError(
            f"{name_or_path} is no directory here, and no hub id (owner/name) either"
        )
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(NEEDED_FILES)))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        raise CheckpointError(
            f"{name_or_path} is no directory here, and the hub does not give it "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}). On a machine that "
            f"reaches the hub: hf download {name_or_path} --local-dir DIR; then pass DIR"
        ) from error


def load_target(
    model: MiniMaxM3, path: Path, spec: TargetSpec, progress: bool | None = False
) -> None:
    """Fill every parameter of the target from the safetensors files of ``path``: all of it, or
    the model's share.

    Raises CheckpointError, before any weight is read, with the files and names of all that is
    missing, too much, misshapen or of another dtype.
    """
    share = model.share
    table = target_weights(spec, share.whole_experts)
    tensors = _tensors(model, table, share)
    plan = _plan(path, TensorNames(table, share.rank, share.size), optional=())
    _stream(plan, tensors, progress, "loading target")


def load_draft(
    model: Eagle3Llama,
    path: Path,
    spec: DraftSpec,
    target_model: MiniMaxM3,
    progress: bool | None = False,
    target_path: Path | None = None,
) -> tuple[str, ...]:
    """Fill every parameter of the draft, or the model's share; return those that are now the
    target's own.

    An embedding or head that the checkpoint lacks is the target's, and so is one that is stored
    but equal to it, which saves its memory. A rank whose draft has all of the embedding, and
    whose target has a part, reads a lacking one from ``target_path`` anew.

    Raises CheckpointError as load_target does, and where d2t points outside the vocabulary.
    """
    share = model.share
    table = draft_weights(spec, share.whole_embedding)
    tensors = _tensors(model, table, share)
    shareable = tuple(n for n in (EMBEDDING, "lm_head.weight") if n in table.weights)
    plan = _plan(path, TensorNames(table, share.rank, share.size), optional=shareable)
    if target_path is not None and share.size > 1 and share.whole_embedding:
        own = _embedding_plan(plan, tensors[EMBEDDING], target_path, target_model.spec)
        for file, pieces in own.items():
            plan.setdefault(file, []).extend(pieces)
    stored = {piece.parameter for pieces in plan.values() for _, piece in pieces}
    target_tensors = {name: target_model.get_parameter(name) for name in shareable}
    for name in shareable:
        if name not in stored and not _same_kind(tensors[name], target_tensors[name]):
            raise CheckpointError(
                f"{path}: no tensor for {name} {_kind(tensors[name])}, and the target's is "
                f"{_kind(target_tensors[name])}, so that the draft cannot share it"
            )
    _stream(plan, tensors, progress, "loading draft")
    if "d2t" in table.weights:
        _check_d2t(tensors["d2t"], spec, path)
    shared = tuple(
        name
        for name in shareable
        if name not in stored
        or (
            _same_kind(tensors[name], target_tensors[name])
            and torch.equal(tensors[name], target_tensors[name])
        )
    )
    for name in shared:
        _replace_parameter(model, name, target_tensors[name])
    if spec.tie_word_embeddings:
        _replace_parameter(model, "lm_head.weight", model.get_parameter("embed_tokens.weight"))
    logger.info("the draft shares with the target: %s", ", ".join(shared) or "nothing")
    return shared


def fill_dummy(model: nn.Module, seed: int) -> None:
    """Seeded random weights for every parameter, made where the parameter is.

    Scaled so that activations stay of order one: a matrix by its fan-in, norms near their
    identity. Each parameter has a generator of its own, seeded by (seed, name), so that the
    values of one do not hang on which others exist; they differ between kinds of device.
    """
    done: set[int] = set()
    with torch.no_grad():
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in done:  # tied
                    continue
                done.add(id(parameter))
                mean, std = _dummy_moments(module, name, parameter)
                generator = torch.Generator(device=parameter.device)
                generator.manual_seed(_seed_of(seed, f"{module_name}.{name}"))
                parameter.normal_(mean, std, generator=generator)
        for name, buffer in model.named_buffers():
            if name == "d2t":
                vocab_size = model.get_parameter("embed_tokens.weight").shape[0]
                ids = torch.arange(len(buffer), device=buffer.device)
                buffer.copy_(ids * vocab_size // len(buffer) - ids)


def _dummy_moments(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) of a parameter's dummy values."""
    if isinstance(module, GemmaNorm):
        return 0.0, 0.05
    if isinstance(module, Norm):
        return 1.0, 0.05
    if isinstance(module, Embedding):
        return 0.0, 1.0
    if name.endswith("bias"):
        return 0.0, 0.05
    return 0.0, float(parameter.shape[-1]) ** -0.5


def _seed_of(seed: int, name: str) -> int:
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _tensors(model: nn.Module, table: WeightTable, share: Share) -> dict[str, Tensor]:
    """The model's tensors by name. ValueError where the model is not the one of the table."""
    own: dict[str, Tensor] = dict(model.named_parameters())
    unknown = own.keys() - table.weights.keys()
    own |= dict(model.named_buffers())
    shapes = {name: weight.shape(share.rank, share.size) for name, weight in table.weights.items()}
    wrong = [
        f"{name}: the spec has {shape}, the model {tuple(own[name].shape) if name in own else None}"
        for name, shape in shapes.items()
        if name not in own or tuple(own[name].shape) != shape
    ]
    if unknown or wrong:
        raise ValueError(f"the model does not follow its spec: {[*sorted(unknown), *wrong]}")
    return own


def _checkpoint_files(path: Path) -> dict[Path, frozenset[str]]:
    """The safetensors files of a checkpoint, each with the tensors that an index promises in it."""
    if (path / INDEX).is_file():
        try:
            index = read_json(path / INDEX)
        except ConfigError as error:
            raise CheckpointError(f"{path / INDEX} is no index: {error}") from error
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{path / INDEX} is no index: it has no object weight_map")
        promised: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _stays_inside(file):
                raise CheckpointError(
                    f"{path / INDEX} is no index: {shown(name)} is in {shown(file)}, which names "
                    "no file of the checkpoint"
                )
            promised.setdefault(file, set()).add(name)
        missing = sorted(file for file in promised if not (path / file).is_file())
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of the {len(promised)} files in {INDEX} are missing: "
                f"{_listed(missing)}"
            )
        return {path / file: frozenset(promised[file]) for file in sorted(promised)}
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no *.safetensors; weights in other formats do not do")
    return dict.fromkeys(files, frozenset())


def _stays_inside(file: str) -> bool:
    """True if a name in an index leads to a file below the checkpoint's directory."""
    path = PurePosixPath(file)
    plain = file.isprintable() and bool(file) and not path.is_absolute()
    return plain and ".." not in path.parts


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error


def _plan(path: Path, names: TensorNames, optional: tuple[str, ...]) -> Plan:
    """Which tensor of which file fills which piece; CheckpointError unless they fit exactly."""
    faults: list[str] = []
    brought: dict[str, str] = {}
    plan: Plan = {}
    for file, promised in _checkpoint_files(path).items():
        plan[file] = []
        with _opened(file) as tensors:
            present = list(tensors.keys())
            faults += [
                f"{file}: tensor {name} is missing, which {INDEX} promises"
                for name in sorted(promised.difference(present))
            ]
            for name in present:
                if names.is_skipped(name):
                    continue
                if names.must_be_zero(name):
                    if tensors.get_tensor(name).any():
                        faults.append(f"{file}: tensor {name} is not zero: {NOT_MOVED}")
                    continue
                stored = tensors.get_slice(name)
                shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
                piece = names.find(name)
                if piece is None:
                    faults.append(f"{file}: tensor {name} {dtype} {shape} belongs to no parameter")
                    continue
                faults += _tensor_faults(f"{file}: tensor {name}", shape, dtype, piece)
                for part in piece.parts:
                    if part in brought:
                        faults.append(f"{file}: tensor {name} brings {part} again: {brought[part]}")
                    brought[part] = f"{file.name} has {name}"
                plan[file].append((name, piece))
    faults += [
        f"{path}: no tensor for parameter {parameter}"
        + ("" if part.endswith(parameter) else f": {part} is missing")
        for part, parameter in names.parts.items()
        if part not in brought and parameter not in optional
    ]
    if faults:
        raise CheckpointError(_listed(faults))
    return plan


def _embedding_plan(plan: Plan, embedding: Tensor, path: Path, spec: TargetSpec) -> Plan:
    """How the target's files fill all of the draft's embedding, where the draft's do not."""
    if any(piece.parameter == EMBEDDING for pieces in plan.values() for _, piece in pieces):
        return {}
    found = {
        file: [(name, piece) for name, piece in pieces if piece.parameter == EMBEDDING]
        for file, pieces in _plan(path, TensorNames(target_weights(spec)), optional=()).items()
    }
    shape = tuple(embedding.shape)
    return {file: p for file, p in found.items() if p and p[0][1].shape == shape}


def _tensor_faults(what: str, shape: tuple[int, ...], dtype: str, piece: Piece) -> Iterator[str]:
    if shape != piece.shape:
        yield f"{what} has shape {shape}: {piece.parameter} takes {piece.shape}"
    if dtype not in piece.stored:
        yield f"{what} has dtype {dtype}: {piece.parameter} takes {', '.join(piece.stored)}"


def _listed(faults: list[str]) -> str:
    more = len(faults) - MAX_FAULTS
    text = "; ".join(faults[:MAX_FAULTS]) + (f"; and {more} more" if more > 0 else "")
    # A tensor may have any name, and a message is one line.
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def _stream(plan: Plan, tensors: dict[str, Tensor], progress: bool | None, what: str) -> None:
    """Copy every tensor of the plan to its place; one of them at a time is held twice."""
    pieces = [piece for file in plan.values() for _, piece in file]
    size = sum(tensors[p.parameter][run.where].nbytes for p in pieces for run in p.runs)
    with torch.no_grad(), byte_bar(progress, what, size) as bar:
        for file, wanted in plan.items():
            names, flags = [], []
            with _opened(file) as stored:
                for name, piece in wanted:
                    for run in piece.runs:
                        destination = tensors[piece.parameter][run.where]
                        _copy(stored.get_slice(name), run.source, destination, bar.update)
                        names.append(name)
                        flags.append(destination.isfinite().all())
            # One wait for the device in each file.
            if flags and not all(finite := torch.stack(flags).tolist()):
                broken = [name for name, fine in zip(names, finite, strict=True) if not fine]
                broken = list(dict.fromkeys(broken))
                raise CheckpointError(
                    f"{file}: NaN or Inf, as stored or in the model's dtype, in {_listed(broken)}"
                )


def _copy(
    stored: Any,
    source: tuple[slice, ...],
    destination: Tensor,
    copied: Callable[[int], object],
) -> None:
    """Copy stored[source]; ``copied`` is told the bytes as they are there."""
    if destination.dim() < 3:
        destination.copy_(stored[source])
        copied(destination.nbytes)
        return
    # Fused experts: one matrix at a time, as all of a layer's are gigabytes.
    first, *rest = source
    for i, matrix in enumerate(destination, first.start):
        matrix.copy_(stored[(i, *rest)])
        copied(matrix.nbytes)


def _same_kind(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _replace_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, last = name.rpartition(".")
    model.get_submodule(module).register_parameter(last, parameter)


def _check_d2t(d2t: Tensor, spec: DraftSpec, path: Path) -> None:
    """Every draft id has a target id of its own: a draft's distribution must stay one."""
    ids = d2t + torch.arange(len(d2t), device=d2t.device)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.vocab_size:
        raise CheckpointError(
            f"{path}: d2t maps to target ids {low} .. {high}: must lie in [0, {spec.vocab_size})"
        )
    if len(set(ids.tolist())) < len(ids):
        raise CheckpointError(f"{path}: d2t maps two draft ids to one target id")
