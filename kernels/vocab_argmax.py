# mypy: allow-untyped-defs, allow-incomplete-defs
"""Greedy choice over the vocabulary."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import FLOATS, begin, cdiv, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import vocab_argmax as reference
from eaglerun.kernels.rows import Best


@jit
def ordered_key(x, index):
    """An int64 that orders like (x, -index): larger x first, lower index among equals.

    A NaN is above all, as in torch; the two zeros are equal.
    """
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF)


@jit
def value_of(key):
    """The x of ordered_key: a NaN for a NaN, 0.0 for either zero."""
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@jit
def _argmax_chunk_kernel(
    logits_ptr, best_ptr, logits_row, V, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr
):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * logits_row + v, mask=v < V, other=0.0).to(tl.float32)
    key = tl.where(v < V, ordered_key(x, v), -0x7FFFFFFFFFFFFFFF)
    tl.store(best_ptr + row * chunks + chunk, tl.max(key, axis=0))


@jit
def _argmax_merge_kernel(best_ptr, pairs_ptr, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    key = tl.load(best_ptr + row * chunks + c, mask=c < chunks, other=-0x7FFFFFFFFFFFFFFF)
    best = tl.max(key, axis=0)
    value = value_of(best).to(tl.float64).to(tl.int64, bitcast=True)
    tl.store(pairs_ptr + 2 * row, value)
    tl.store(pairs_ptr + 2 * row + 1, index_of(best))


@paired(reference.vocab_argmax)
def vocab_argmax(logits: Tensor) -> Best:
    """The largest logit of each row and its id; the lowest id among equals.

    Shapes  logits [N, V], last dim contiguous; returns pairs [N, 2]. N may be 0; 0 < V < 2^31.
    Dtypes  bf16, fp16 or fp32, compared in fp32; the value is exact.
    Error   none: equal to the reference, NaN (the largest) and signed zeros (equal) included.
    Raises  ValueError on another shape, stride or dtype.
    """
    require(
        logits.ndim == 2
        and logits.shape[1] > 0
        and logits.stride(1) == 1
        and logits.dtype in FLOATS,
        "vocab_argmax",
        logits=logits,
    )
    rows, vocab = logits.shape
    pairs = torch.empty(rows, 2, dtype=torch.int64, device=logits.device)
    if rows:
        launch = settings("vocab_argmax", logits)
        chunks = cdiv(vocab, launch["BLOCK"])
        best = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
        _argmax_chunk_kernel[(rows, chunks)](
            logits, best, logits.stride(0), vocab, chunks, **launch
        )
        _argmax_merge_kernel[(rows,)](
            best, pairs, chunks, BLOCK=power_of_2(chunks), **settings("one_warp", logits)
        )
    return Best(pairs)
