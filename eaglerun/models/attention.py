"""The paged memory of attention: TargetKV and DraftKV, a LayerKV for each layer."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from eaglerun.checkpoint.draft import DraftSpec
from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels.rows import LayerKV


@dataclass(frozen=True, slots=True)
class KVRegion:
    """One per-block memory: tensor [num_blocks, ...]; layout names the dims after the block."""

    name: str
    tensor: Tensor
    layout: str

    @property
    def bytes_per_block(self) -> int:
        return self.tensor[:1].numel() * self.tensor.element_size()


@dataclass(frozen=True, slots=True)
class TargetKV:
    """The target's paged memory, one entry a layer."""

    layers: tuple[LayerKV, ...]

    @classmethod
    def allocate(
        cls,
        spec: TargetSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        index_dtype: torch.dtype | None = None,
    ) -> Self:
        """Uninitialised memory: a cell is read only after it was written. ``index_dtype`` is of
        the index keys, None: ``dtype`` too.

        Raises  ValueError when a layer is sparse and block_size is not the sparse block.
        """
        if any(spec.sparse_layers) and block_size != spec.sparse_block_size:
            raise ValueError(
                f"block_size {block_size}: a sparse layer selects blocks of "
                f"{spec.sparse_block_size} keys, and a page must be one"
            )
        pages = (num_blocks, block_size)
        heads = (*pages, spec.num_key_value_heads, spec.head_dim)
        index = (*pages, spec.index_head_dim)

        def layer(i: int) -> LayerKV:
            k, v = (torch.empty(heads, device=device, dtype=dtype) for _ in range(2))
            if not spec.sparse_layers[i] or spec.index_shared[i]:
                return LayerKV(k, v)
            return LayerKV(k, v, torch.empty(index, device=device, dtype=index_dtype or dtype))

        return cls(tuple(layer(i) for i in range(spec.num_hidden_layers)))

    def regions(self) -> tuple[KVRegion, ...]:
        found = []
        for i, (k, v, index_k) in enumerate(self.layers):
            found.append(KVRegion(f"target.{i}.k", k, "token,group,dim"))
            found.append(KVRegion(f"target.{i}.v", v, "token,group,dim"))
            if index_k is not None:
                found.append(KVRegion(f"target.{i}.index_k", index_k, "token,dim"))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class DraftKV:
    """The draft's paged memory on the target's block tables.

    The draft row that pairs the token of position p with the hidden state of p - 1 lies at p;
    position 0 stays empty and is never read.
    """

    layer: LayerKV

    @classmethod
    def allocate(
        cls,
        spec: DraftSpec,
        num_blocks: int,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Self:
        """Uninitialised memory: a cell is read only after it was written."""
        shape = (num_blocks, block_size, spec.num_key_value_heads, spec.head_dim)
        k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        return cls(LayerKV(k, v))

    def regions(self) -> tuple[KVRegion, ...]:
        layout = "token,group,dim"
        k, v, _ = self.layer
        return KVRegion("draft.k", k, layout), KVRegion("draft.v", v, layout)
