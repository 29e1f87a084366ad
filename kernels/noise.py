# mypy: allow-untyped-defs, allow-incomplete-defs
"""Counter-based random numbers, and the draw that needs them without storing them."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import begin, cdiv, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import noise as reference
from eaglerun.kernels.rows import Best

TOKEN, ACCEPT, RECOVER, DRAFT, SYNTHETIC = (
    reference.TOKEN,
    reference.ACCEPT,
    reference.RECOVER,
    reference.DRAFT,
    reference.SYNTHETIC,
)

GOLDEN = 0x9E3779B97F4A7C15


@jit
def _shift(x, bits: tl.constexpr):
    """Logical right shift of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@jit
def _mix(x):
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, fig. 14), modulo 2**64."""
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


@jit
def _key(seed, position, STEP: tl.constexpr):
    return _mix(_mix(seed + STEP) + (position + 1) * -7046029254386353131)


@jit
def _unit(bits):
    """The top 52 bits as a number in (0, 1), both ends exact in float64."""
    return _shift(bits, 12).to(tl.float64) * 2.220446049250313e-16 + 1.1102230246251565e-16


@jit
def _gumbel(key, v):
    u = _unit(_mix(key + (v + 1).to(tl.int64) * -7046029254386353131))
    return -tl.log(-tl.log(u))


@jit(varying=("seed_step", "position_step", "rows"))
def _uniform_kernel(
    seed_ptr, position_ptr, out_ptr, seed_step, position_step, rows,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr + n * seed_step, mask=n < rows, other=0)
    position = tl.load(position_ptr + n * position_step, mask=n < rows, other=0)
    tl.store(out_ptr + n, _unit(_mix(_key(seed, position, STEP))), mask=n < rows)


@jit(varying=("seed_step", "position_step"))
def _gumbel_kernel(
    seed_ptr, position_ptr, out_ptr, seed_step, position_step, size,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = _key(
        tl.load(seed_ptr + row * seed_step), tl.load(position_ptr + row * position_step), STEP
    )
    tl.store(out_ptr + row * size + v, _gumbel(key, v), mask=v < size)


@jit(varying=("seed_step", "position_step"))
def _draw_chunk_kernel(
    scores_ptr,
    seed_ptr,
    position_ptr,
    best_ptr,
    id_ptr,
    seed_step,
    position_step,
    scores_row,
    V,
    chunks,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + row * scores_row + v, mask=v < V, other=float("-inf"))
    key = _key(
        tl.load(seed_ptr + row * seed_step), tl.load(position_ptr + row * position_step), STEP
    )
    z = score.to(tl.float64) + _gumbel(key, v)
    # Above all, as in torch, so that an id comes out and its value is not finite.
    z = tl.where(z != z, float("inf"), z)
    best = tl.max(z, axis=0)
    tl.store(best_ptr + row * chunks + chunk, best)
    tl.store(id_ptr + row * chunks + chunk, tl.min(tl.where(z == best, v, 0x7FFFFFFF), axis=0))


@jit
def _draw_merge_kernel(
    best_ptr, id_ptr, pairs_ptr, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    z = tl.load(best_ptr + row * chunks + c, mask=c < chunks, other=float("-inf"))
    v = tl.load(id_ptr + row * chunks + c, mask=c < chunks, other=0x7FFFFFFF)
    best = tl.max(z, axis=0)
    tl.store(pairs_ptr + 2 * row, best.to(tl.int64, bitcast=True))
    found = tl.min(tl.where(z == best, v, 0x7FFFFFFF), axis=0)
    tl.store(pairs_ptr + 2 * row + 1, found.to(tl.int64))


@paired(reference.uniform)
def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """One number in (0, 1) per row: u = (h + 1/2) / 2^52 with h the top 52 bits of the hash.

    Shapes  seed, position [N] int64 of any stride; returns [N] float64. N may be 0.
    Error   none: integers until one exact multiply-add.
    Raises  ValueError on another shape, stride or dtype.
    """
    steps = _steps("uniform", seed, position)
    out = torch.empty(seed.shape, dtype=torch.float64, device=seed.device)
    if out.numel():
        _uniform_kernel[(cdiv(out.numel(), 128),)](
            seed, position, out, *steps, out.numel(), STEP=_step(stream), BLOCK=128
        )
    return out


@paired(reference.gumbel)
def gumbel(seed: Tensor, position: Tensor, stream: int, size: int) -> Tensor:
    """Standard Gumbel noise g = -log(-log u) for each of ``size`` tokens.

    u(n, v) hashes (seed[n], position[n], stream, v); see uniform.

    Shapes  seed, position [N] int64 of any stride; returns [N, size] float64. N may be 0.
    Error   a few ulp of float64: the device's logarithm.
    Raises  ValueError on another shape, stride or dtype.
    """
    steps = _steps("gumbel", seed, position)
    rows = seed.shape[0]
    out = torch.empty(rows, size, dtype=torch.float64, device=seed.device)
    if out.numel():
        launch = settings("gumbel", out)
        _gumbel_kernel[(rows, cdiv(size, launch["BLOCK"]))](
            seed, position, out, *steps, size, STEP=_step(stream), **launch
        )
    return out


@paired(reference.gumbel_argmax)
def gumbel_argmax(scores: Tensor, seed: Tensor, position: Tensor, stream: int) -> Best:
    """The largest scores[n, v] + gumbel(seed[n], position[n], stream)[v], and its v: the lowest of
    equals. A NaN is above all, and its value is not finite.

    The draw of one token per row from softmax(scores), without the noise in memory.

    Shapes  scores [N, V], last dim contiguous, -inf allowed; seed, position [N] int64 of any
            stride; returns pairs [N, 2]. N may be 0.
    Dtypes  scores fp32 or fp64; noise and sum in fp64.
    Error   of the value a few ulp of float64; the id is the reference's but where two sums differ
            by no more.
    Raises  ValueError on another shape, stride or dtype.
    Source  Gumbel-max: Maddison et al. 2014, arXiv:1411.0030, section 2.
    """
    steps = _steps("gumbel_argmax", seed, position)
    require(
        scores.ndim == 2
        and scores.shape[:1] == seed.shape
        and scores.shape[1] > 0
        and scores.stride(1) == 1
        and scores.dtype in (torch.float32, torch.float64),
        "gumbel_argmax",
        scores=scores,
        seed=seed,
    )
    rows, vocab = scores.shape
    pairs = torch.empty(rows, 2, dtype=torch.int64, device=scores.device)
    if rows:
        launch = settings("gumbel", scores)
        chunks = cdiv(vocab, launch["BLOCK"])
        best = torch.empty(rows, chunks, dtype=torch.float64, device=scores.device)
        best_ids = torch.empty(rows, chunks, dtype=torch.int32, device=scores.device)
        _draw_chunk_kernel[(rows, chunks)](
            scores,
            seed,
            position,
            best,
            best_ids,
            *steps,
            scores.stride(0),
            vocab,
            chunks,
            STEP=_step(stream),
            **launch,
        )
        _draw_merge_kernel[(rows,)](
            best,
            best_ids,
            pairs,
            chunks,
            BLOCK=power_of_2(chunks),
            **settings("one_warp", scores),
        )
    return Best(pairs)


def _step(stream: int) -> int:
    """(stream + 1) * GOLDEN modulo 2**64, as a signed integer."""
    step = (stream + 1) * GOLDEN % 2**64
    return step - 2**64 if step >= 2**63 else step


def _steps(name: str, seed: Tensor, position: Tensor) -> tuple[int, int]:
    """Strides of the two, checked: one seed of several rows has a stride of 0."""
    require(
        seed.ndim == 1
        and seed.shape == position.shape
        and seed.dtype == position.dtype == torch.int64,
        name,
        seed=seed,
        position=position,
    )
    return seed.stride(0), position.stride(0)
