"""Rotary position embedding in NeoX halves, over the first dims of a head."""

import torch
from torch import Tensor

from eaglerun.kernels.reference import cast, remember_last, wide


def rope_table(
    max_positions: int, rotary_dim: int, theta: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines of every position.

    inv_freq[j] = theta ** (-2 j / rotary_dim), j = 0 .. rotary_dim / 2 - 1
    table[p] = [cos(p * inv_freq) | sin(p * inv_freq)]

    Shapes  returns [max_positions, rotary_dim].
    Dtypes  float64 when dtype is float64, else float32, angles in the same precision: the angle
            of a float32 table is the float32 product the checkpoints were trained with.
    Raises  ValueError on an odd rotary_dim.
    Source  Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    if rotary_dim % 2:
        raise ValueError(f"rope_table: rotary_dim = {rotary_dim} is odd")
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, rotary_dim, 2, device=device, dtype=dtype) / rotary_dim
    # 1 / theta^x and not theta^-x: at a far position one bit of a frequency is a visible angle.
    inv_freq = 1.0 / theta**exponents
    angles = torch.arange(max_positions, device=device, dtype=dtype)[:, None] * inv_freq
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotate the first rotary_dim of every head, pass the others through.

    c, s = table[clamp(positions[n], 0, max_positions - 1)], r = rotary_dim / 2, for j < r:
    y[n, h, j] = x[n, h, j] c[j] - x[n, h, j + r] s[j]
    y[n, h, j + r] = x[n, h, j + r] c[j] + x[n, h, j] s[j]

    Shapes  x [N, H, D], last dim contiguous; positions [N]; table [max_positions, rotary_dim],
            rotary_dim <= D; returns [N, H, D] contiguous.
    Dtypes  fp32 inside (fp64 for fp64), one cast to x.dtype.
    Raises  ValueError when rotary_dim > D.
    Source  Su et al. 2021, arXiv:2104.09864, eq. 34, in the half layout of GPT-NeoX.
    """
    rotary_dim = table.shape[1]
    if rotary_dim > x.shape[-1]:
        raise ValueError(f"rope: x {tuple(x.shape)}, rotary_dim {rotary_dim}")
    partner, cos, sin = _rotation(positions, table, x.shape[-1])
    full = wide(x)
    turned = torch.addcmul(full * cos, full.index_select(-1, partner), sin)
    return cast(turned, x.dtype)


@remember_last
def _rotation(positions: Tensor, table: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """What turns a head: y = x * cos + x[partner] * sin.

    Returns partner [dim] (j + r for j < r, j - r after it, then itself) and, for each row,
    cos = [c | c | 1 ..] and sin = [-s | s | 0 ..], both [N, 1, dim].
    """
    c, s = table[positions.clamp(0, table.shape[0] - 1), None].chunk(2, dim=-1)
    half = c.shape[-1]
    rest = (*c.shape[:-1], dim - 2 * half)
    partner = torch.arange(dim, device=table.device)
    partner[: 2 * half] = partner[: 2 * half].roll(half)
    cos = torch.cat((c, c, c.new_ones(rest)), dim=-1)
    return partner, cos, torch.cat((-s, s, s.new_zeros(rest)), dim=-1)
