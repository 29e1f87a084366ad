"""How each kernel is launched on each kind of device: the one place that knows architectures.

A row holds tile sizes and switches (upper case, as the kernel names them), num_warps, num_stages
and, where a kernel needs one, a limit of registers a thread (maxnreg). A name with "/4" is for
elements of four bytes, where tiles of the two-byte row would not fit. One with "/invariant" holds
what a batch-invariant engine takes otherwise, where the plain row would add in another order for
another number of rows. The table was measured on an H200 (recipes/kernels-h200.md); the AMD rows
are compiled and fit, not timed.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from eaglerun.kernels.language import interpreting

Settings = dict[str, int]

_EVERYWHERE: dict[str, Settings] = {
    "one_warp": {"num_warps": 1},
    "copy": {"BLOCK": 1024, "num_warps": 4},
    "rmsnorm": {"num_warps": 8},
    "swiglu": {"BLOCK": 1024, "num_warps": 4},
    "kv_store": {"BLOCK_H": 16, "num_warps": 4},
    "vocab_argmax": {"BLOCK": 4096, "num_warps": 8},
    "gumbel": {"BLOCK": 2048, "num_warps": 8},
    "attention_merge": {"num_warps": 1},
    "union": {"num_warps": 4},
    "topk_short": {"BLOCK": 128, "num_warps": 1},
    "topk_middle": {"BLOCK": 1024, "num_warps": 4},
    "topk_long": {"BLOCK": 4096, "num_warps": 4},
    "route_choose": {"num_warps": 1},
    "route_count": {"BLOCK": 1024, "num_warps": 4},
    "moe_sort": {"BLOCK": 2048, "num_warps": 8},
    "moe_combine": {"BLOCK": 512, "num_warps": 4},
}

_SM_90: dict[str, Settings] = _EVERYWHERE | {
    "attention_decode": {
        "SPLITS": 64, "CHUNK": 128, "MIN_M": 16, "MAX_M": 16, "BLOCK_N": 128,
        "num_warps": 4, "num_stages": 2,
    },
    "attention_verify": {
        "SPLITS": 32, "CHUNK": 256, "MIN_M": 16, "MAX_M": 64, "BLOCK_N": 64,
        "num_warps": 4, "num_stages": 2,
    },
    "attention_verify_wide": {
        "SPLITS": 32, "CHUNK": 256, "MIN_M": 16, "MAX_M": 128, "BLOCK_N": 64,
        "num_warps": 8, "num_stages": 2, "maxnreg": 128,
    },
    # At 128 registers a thread two programs of 8 warps share a multiprocessor.
    "attention_prefill": {
        "BLOCK_M": 128, "BLOCK_N": 64, "DESCRIBED": 1,
        "num_warps": 8, "num_stages": 2, "maxnreg": 128,
    },
    "attention_sparse_decode": {
        "MERGED": 1, "CHUNK": 256, "MIN_M": 16, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2,
    },
    "attention_sparse_prefill": {
        "SHARE": 0, "BLOCK_N": 32, "DESCRIBED": 1, "num_warps": 1, "num_stages": 2,
    },
    "attention_sparse_union": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    "index_scores_decode": {
        "MIN_M": 16, "MAX_M": 64, "PAGES": 1, "num_warps": 4, "num_stages": 2,
    },
    "index_scores_prefill": {
        "MIN_M": 16, "MAX_M": 128, "PAGES": 16, "num_warps": 8, "num_stages": 2, "maxnreg": 128,
    },
    "route_logits_few": {
        "SPLITS": 24, "BLOCK_T": 16, "BLOCK_E": 32, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_some": {
        "SPLITS": 24, "BLOCK_T": 64, "BLOCK_E": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_many": {
        "SPLITS": 8, "BLOCK_T": 128, "BLOCK_E": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3,
    },
    "linear_narrow": {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 6},
    "linear_few": {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    "linear_several": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 6},
    "linear_broad": {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    "linear_parts": {
        "PROGRAMS": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 5,
    },
    "moe_up_few": {
        "BLOCK_T": 16, "EXTRA": 0, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 1,
        "SHARED_TILE": 1, "num_warps": 4, "num_stages": 3,
    },
    "moe_down_few": {"BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 1, "num_warps": 4, "num_stages": 3},
    "moe_up_several": {
        "BLOCK_T": 32, "EXTRA": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2,
        "num_warps": 4, "num_stages": 4,
    },
    "moe_down_several": {
        "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 2, "num_warps": 4, "num_stages": 4,
    },
    "moe_up_some": {
        "BLOCK_T": 64, "EXTRA": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 4,
        "num_warps": 4, "num_stages": 3,
    },
    "moe_down_some": {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 4, "num_warps": 4, "num_stages": 4},
    "moe_up_many": {
        "BLOCK_T": 128, "EXTRA": 32, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 4,
        "DESCRIBED": 1, "num_warps": 8, "num_stages": 4,
    },
    "moe_down_many": {
        "ROUNDED": 1, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP": 4,
        "DESCRIBED": 1, "num_warps": 8, "num_stages": 3,
    },
}  # fmt: skip

_ROUTE_INVARIANT: Settings = {
    "SPLITS": 24, "BLOCK_T": 32, "BLOCK_E": 64, "BLOCK_K": 256, "num_warps": 4, "num_stages": 1,
}  # fmt: skip
# Attention: the tensor cores' 64-row instructions for any number of rows (attention_verify_wide
# takes two of them), chunks of the same keys dense and selected. Routing: the same splits. MoE:
# products that no regime rounds.
_SM_90_INVARIANT: dict[str, Settings] = {
    "attention_decode/invariant": {
        "SPLITS": 32, "CHUNK": 256, "MIN_M": 64, "MAX_M": 64, "BLOCK_N": 64,
    },
    "attention_verify/invariant": {"MIN_M": 64},
    "attention_sparse_decode/invariant": {"MERGED": 32, "MIN_M": 64, "BLOCK_N": 64},
    "attention_sparse_prefill/invariant": {"SHARE": 1},
    "index_scores_decode/invariant": {"MAX_M": 32},
    "index_scores_prefill/invariant": {"MIN_M": 128},
    "route_logits_some/invariant": _ROUTE_INVARIANT,
    "route_logits_many/invariant": _ROUTE_INVARIANT,
    "moe_down_many/invariant": {"ROUNDED": 0},
}  # fmt: skip

# Four-byte elements: tests and small models, where being right is all that counts.
_WIDE: dict[str, Settings] = {
    "attention_decode/4": {
        "SPLITS": 64, "CHUNK": 128, "MIN_M": 16, "MAX_M": 16, "BLOCK_N": 32,
        "num_warps": 4, "num_stages": 1,
    },
    **{
        f"attention_{regime}/4": {
            "SPLITS": 32, "CHUNK": 256, "MIN_M": 16, "MAX_M": 64, "BLOCK_N": 32,
            "num_warps": 4, "num_stages": 1,
        }
        for regime in ("verify", "verify_wide")
    },
    "attention_prefill/4": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    "attention_sparse_decode/4": {
        "MERGED": 1, "CHUNK": 256, "MIN_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1,
    },
    "attention_sparse_prefill/4": {"SHARE": 0, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    "attention_sparse_union/4": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
    "index_scores_decode/4": {
        "MIN_M": 16, "MAX_M": 32, "PAGES": 2, "num_warps": 4, "num_stages": 1,
    },
    "index_scores_prefill/4": {
        "MIN_M": 16, "MAX_M": 32, "PAGES": 8, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_few/4": {
        "SPLITS": 16, "BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_some/4": {
        "SPLITS": 4, "BLOCK_T": 32, "BLOCK_E": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_many/4": {
        "SPLITS": 4, "BLOCK_T": 32, "BLOCK_E": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1,
    },
    **{
        f"moe_{product}_{regime}/4": {
            **({"BLOCK_T": 16 if regime == "few" else 32, "EXTRA": 0} if product == "up" else {}),
            **({"SHARED_TILE": 1} if product == "up" and regime == "few" else {}),
            "BLOCK_N": 32, "BLOCK_K": 32, "GROUP": 1, "num_warps": 4, "num_stages": 1,
        }
        for product in ("up", "down")
        for regime in ("few", "several", "some", "many")
    },
}  # fmt: skip

_AMD: dict[str, Settings] = _EVERYWHERE | {
    "attention_decode": {
        "SPLITS": 64, "CHUNK": 128, "MIN_M": 16, "MAX_M": 16, "BLOCK_N": 64,
        "num_warps": 4, "num_stages": 1,
    },
    **{
        f"attention_{regime}": {
            "SPLITS": 32, "CHUNK": 256, "MIN_M": 16, "MAX_M": 64, "BLOCK_N": 64,
            "num_warps": 4, "num_stages": 1,
        }
        for regime in ("verify", "verify_wide")
    },
    "attention_prefill": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    "attention_sparse_decode": {
        "MERGED": 1, "CHUNK": 256, "MIN_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1,
    },
    "attention_sparse_prefill": {"SHARE": 0, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    "attention_sparse_union": {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1},
    "index_scores_decode": {
        "MIN_M": 16, "MAX_M": 64, "PAGES": 2, "num_warps": 4, "num_stages": 1,
    },
    "index_scores_prefill": {
        "MIN_M": 16, "MAX_M": 64, "PAGES": 8, "num_warps": 4, "num_stages": 1,
    },
    "route_logits_few": {
        "SPLITS": 16, "BLOCK_T": 16, "BLOCK_E": 16, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2,
    },
    "route_logits_some": {
        "SPLITS": 4, "BLOCK_T": 64, "BLOCK_E": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2,
    },
    "route_logits_many": {
        "SPLITS": 4, "BLOCK_T": 64, "BLOCK_E": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2,
    },
    **{
        f"linear_{regime}": {"BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2}
        for regime in ("narrow", "few", "several", "broad")
    },
    "linear_parts": {
        "PROGRAMS": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 2,
    },
    "moe_up_few": {
        "BLOCK_T": 16, "EXTRA": 0, "BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 1,
        "SHARED_TILE": 1, "num_warps": 4, "num_stages": 2,
    },
    "moe_down_few": {"BLOCK_N": 64, "BLOCK_K": 128, "GROUP": 1, "num_warps": 4, "num_stages": 2},
    "moe_up_several": {
        "BLOCK_T": 32, "EXTRA": 0, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2,
        "num_warps": 4, "num_stages": 2,
    },
    "moe_down_several": {
        "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 2, "num_warps": 4, "num_stages": 2,
    },
    "moe_up_some": {
        "BLOCK_T": 64, "EXTRA": 0, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 4,
        "num_warps": 4, "num_stages": 2,
    },
    "moe_down_some": {"BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 4, "num_warps": 4, "num_stages": 2},
    "moe_up_many": {
        "BLOCK_T": 128, "EXTRA": 32, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 4,
        "num_warps": 8, "num_stages": 2,
    },
    "moe_down_many": {
        "ROUNDED": 1, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP": 4, "num_warps": 8, "num_stages": 2,
    },
}  # fmt: skip

TABLE: dict[str, dict[str, Settings]] = {
    "sm_90": _SM_90 | _SM_90_INVARIANT | _WIDE,
    "gfx942": _AMD | _WIDE,
    "gfx950": _AMD | _WIDE,
}

# Where a kernel may start before the one ahead of it has ended (programmatic dependent launch).
_CAN_OVERLAP = ("sm_90",)
# Where the rows for a batch-invariant engine are, and enough (tests/gpu/test_invariant.py).
_CAN_BE_INVARIANT = ("sm_90",)

_forced: str | None = None
_overlap = False
_invariant = False
_changed: dict[str, Settings] = {}


def settings(name: str, x: Tensor, tile: int = 0) -> Settings:
    """The launch settings of ``name`` for the device and element size of x: a new dict.

    tile: columns or keys of a tile. A row's limit of registers (maxnreg) is for at most 128; with
    more the kernel would not compile, and goes without.
    OVERLAP is among them always; launch_pdl, which asks the driver for it, where it is on.
    Raises  ValueError on a device that is not in the table.
    """
    arch = _arch_of(x)
    table = TABLE[arch]
    found = dict(table[name])
    if x.element_size() == 4:
        found = dict(table.get(f"{name}/4", found))
    elif _invariant:
        found |= table.get(f"{name}/invariant", {})
    found |= _changed.get(name, {})
    if tile > 128:
        found.pop("maxnreg", None)
    found["OVERLAP"] = overlaps(x)
    if found["OVERLAP"]:
        found["launch_pdl"] = True
    return found


def overlaps(x: Tensor) -> bool:
    """Whether kernels on the device of x overlap the ends of those before them."""
    return _overlap and not interpreting() and _arch_of(x) in _CAN_OVERLAP


@contextlib.contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Start kernels before the ones ahead of them have ended, where the device can."""
    global _overlap
    before, _overlap = _overlap, on
    try:
        yield
    finally:
        _overlap = before


def has_kernels(device: torch.device) -> bool:
    """Whether the table knows the device."""
    return device.type == "cuda" and arch_of(device) in TABLE


def can_be_invariant(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `invariant` makes rows of ``dtype`` there independent of their number."""
    known = device.type == "cuda" and arch_of(device) in _CAN_BE_INVARIANT
    return known and dtype == torch.bfloat16


@contextlib.contextmanager
def invariant(on: bool) -> Iterator[None]:
    """Where on: give a row the same bits however many rows are beside it; in the kernels here by
    their launch settings, in torch's products by keeping each sum in one piece."""
    global _invariant
    if not on:
        yield
        return
    before, _invariant = _invariant, True
    try:
        with _whole_sums() if torch.cuda.is_available() else contextlib.nullcontext():
            yield
    finally:
        _invariant = before


@contextlib.contextmanager
def _whole_sums() -> Iterator[None]:
    """Let cuBLAS split no product's sum over programs, as it does for few rows and wide sums."""
    cuda = torch.backends.cuda
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = {n: (getattr(cuda.matmul, n), getattr(cuda.matmul, f"{n}_split_k")) for n in names}
    library = cuda.preferred_blas_library()
    try:
        cuda.preferred_blas_library("cublaslt")  # the one that can be told
        for name in names:
            setattr(cuda.matmul, name, (False, False))
        yield
    finally:
        for name, value in before.items():
            setattr(cuda.matmul, name, value)
        cuda.preferred_blas_library(library)


@contextlib.contextmanager
def changed(name: str, **values: int) -> Iterator[None]:
    """Other values for some settings of ``name``: trying them out."""
    before = _changed.get(name)
    _changed[name] = (before or {}) | values
    try:
        yield
    finally:
        _changed.pop(name)
        if before is not None:
            _changed[name] = before


# Which row of the table a kernel takes, where several are for it.


def attention_regime(pairs: int) -> str:
    """decode: as many (row, query head) pairs of a KV group as one 16-row instruction holds;
    verify: as the tensor cores' 64-row ones; verify_wide: more."""
    if pairs <= 16:
        return "decode"
    return "verify" if pairs <= 64 else "verify_wide"


def moe_regime(pairs: int, experts: int) -> str:
    """few or several (what reads weights), some or many (what computes) rows an expert."""
    if pairs <= 2 * experts:
        return "few"
    if pairs <= 8 * experts:
        return "several"
    return "some" if pairs <= 96 * experts else "many"


def linear_regime(rows: int, columns: int) -> str:
    """narrow: one tile of 64 columns or none for each of an H200's 132 multiprocessors; otherwise
    few or several rows, and broad: several of more columns than two tiles for each."""
    if columns <= 132 * 64:
        return "narrow"
    if rows <= 32:
        return "few"
    return "several" if columns <= 2 * 132 * 64 else "broad"


def route_regime(rows: int) -> str:
    """few rows in tiles of 16, some in tiles of 64 and many splits, many in fewer splits."""
    if rows <= 64:
        return "few"
    return "some" if rows <= 512 else "many"


@contextlib.contextmanager
def for_arch(arch: str) -> Iterator[None]:
    """Take the settings of ``arch`` whatever the device: compiling ahead of time."""
    global _forced
    before, _forced = _forced, arch
    try:
        yield
    finally:
        _forced = before


def _arch_of(x: Tensor) -> str:
    if _forced is not None:
        return _forced
    if not x.is_cuda and interpreting():
        return "sm_90"
    return _arch(x.device)


@functools.cache
def _arch(device: torch.device) -> str:
    if device.type != "cuda":
        raise ValueError(f"no kernels for {device}: a CPU tensor takes the reference")
    arch = arch_of(device)
    if arch not in TABLE:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"no launch settings for {arch} ({name}); have {', '.join(TABLE)}")
    return arch


@functools.cache
def arch_of(device: torch.device) -> str:
    """The name of a GPU's architecture, as the table has it: sm_90, gfx942."""
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(found.gcnArchName.split(":")[0])
    return f"sm_{found.major}{found.minor}"
