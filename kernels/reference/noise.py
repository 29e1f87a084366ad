"""Counter-based random numbers: a function of (seed, position, stream, token), nothing else.

The same draw whatever the batch, the number of drafts, the rank or the device, which is what
makes sampled output independent of speculation.
"""

import torch
from torch import Tensor

from eaglerun.kernels.reference import best_of
from eaglerun.kernels.rows import Best

# Streams: one kind of draw each, so that no draw is used twice for different ends.
TOKEN, ACCEPT, RECOVER, DRAFT, SYNTHETIC = range(5)

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
# Half a step: with 52 bits both ends of (0, 1) stay exact in float64.
_HALF = 2.0**-53


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of a signed 64-bit integer."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, fig. 14), modulo 2**64."""
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _key(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    step = (_GOLDEN * (stream + 1) + 2**63) % 2**64 - 2**63  # modulo 2**64, signed
    return _mix(_mix(seed + step) + _GOLDEN * (position + 1))


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """See eaglerun.kernels.noise.uniform."""
    return _shift(_mix(_key(seed, position, stream)), 12).double() * 2.0**-52 + _HALF


def gumbel(seed: Tensor, position: Tensor, stream: int, size: int) -> Tensor:
    """See eaglerun.kernels.noise.gumbel."""
    token = torch.arange(1, size + 1, device=seed.device, dtype=torch.int64) * _GOLDEN
    bits = _mix(_key(seed, position, stream)[:, None] + token)
    u = _shift(bits, 12).double() * 2.0**-52 + _HALF
    return -torch.log(-torch.log(u))


def gumbel_argmax(scores: Tensor, seed: Tensor, position: Tensor, stream: int) -> Best:
    """See eaglerun.kernels.noise.gumbel_argmax."""
    return best_of(scores + gumbel(seed, position, stream, scores.shape[1]))
