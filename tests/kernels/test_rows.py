"""The words for tensors: what they derive, and how an error tells them."""

import pytest
import torch

from eaglerun.kernels.language import require
from eaglerun.kernels.rows import LayerKV, Rows

INT = torch.int32


def uniform(rows: int, sequences: int) -> Rows:
    tables, lens = torch.zeros(sequences, 2, dtype=INT), torch.zeros(sequences, dtype=INT)
    return Rows(torch.zeros(rows).long(), torch.zeros(rows).long(), tables, lens, 8)


def chunks(*q_lens: int) -> Rows:
    sums = torch.tensor([0, *q_lens]).cumsum(0).int()
    return uniform(sum(q_lens), len(q_lens))._replace(cu_seqlens=sums, q_lens=q_lens)


def test_the_longest_sequence():
    assert uniform(6, 2).longest == 3
    assert uniform(0, 0).longest == 0
    assert chunks(2, 5, 0).longest == 5
    assert chunks().longest == 0


def test_a_form_that_contradicts_itself():
    assert not uniform(6, 2).misfit() and not uniform(0, 0).misfit()
    assert uniform(7, 2).misfit()
    good = chunks(2, 5)
    assert not good.misfit()
    assert good._replace(q_lens=(7,)).misfit()
    assert good._replace(cu_seqlens=good.cu_seqlens[:2]).misfit()
    assert good._replace(cu_seqlens=good.cu_seqlens.repeat_interleave(2)[::2]).misfit()


def test_a_layer_without_index_keys():
    keys = torch.zeros(3, 4, 2, 8)
    index_k = torch.zeros(3, 4, 8)
    assert LayerKV(keys, keys).block_size == 4
    assert LayerKV(keys, keys, index_k).index_keys("op") is index_k
    with pytest.raises(ValueError, match="index_topk: this layer has no index keys"):
        LayerKV(keys, keys).index_keys("index_topk")


def test_an_error_tells_every_part():
    with pytest.raises(ValueError) as told:
        require(False, "op", q=torch.zeros(2), rows=chunks(1, 2), scale=0.5)
    text = str(told.value)
    assert text.startswith(
        "op: no kernel for q (2,) strides (1,) torch.float32, rows.positions (3,)"
    )
    assert "rows.cu_seqlens (3,) strides (1,) torch.int32, rows.q_lens (1, 2), scale 0.5" in text
