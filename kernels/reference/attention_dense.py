"""Full attention over the paged cache: uniform rows (decode, verify) and ragged ones (prefill)."""

from itertools import accumulate

import torch
from torch import Tensor

from eaglerun.kernels.reference import remember_last, wide


def attention_dense(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """Attention of the same number of rows Q = N / B for every sequence.

    Row n belongs to sequence b = n // Q and sees the keys
        t in [max(first_key, positions[n] - window + 1), positions[n]], t < seq_lens[b];
    o[n, h] = sum_t softmax_t(q[n, h] . k[t, g] * scale) v[t, g] with g = h // (H / G).
    A row that sees no key (padding: position -1) is zero. Cells at t >= seq_lens[b] and
    t < first_key are never used, whatever they hold; nor are the rows of padding.

    Shapes  q [N, H, D], last dim contiguous; caches [num_blocks, block_size, G, D] contiguous;
            positions [N]; block_tables [B, max_blocks], entries past a sequence arbitrary;
            seq_lens [B], at most max_seq_len <= max_blocks * block_size; returns [N, H, D].
    Dtypes  scores, softmax and sums in fp32 (fp64 for fp64), one cast to q.dtype.
    Raises  ValueError when N is no multiple of B or H none of G.
    Source  Vaswani et al. 2017, arXiv:1706.03762, eq. 1; pages as Kwon et al. 2023,
            arXiv:2309.06180, section 4.3.
    """
    check_rows("attention_dense", q, k_cache, block_tables)
    visible, slots = visible_keys(
        positions, block_tables, seq_lens, max_seq_len, k_cache.shape[1], first_key
    )
    if window is not None:
        t = torch.arange(visible.shape[-1], device=q.device)
        visible &= t > positions.view(len(seq_lens), -1, 1) - window
    return attend(q, k_cache, v_cache, slots, visible[:, None], scale)


def attention_dense_ragged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    q_lens: tuple[int, ...],
    max_seq_len: int,
    scale: float,
    first_key: int = 0,
    window: int | None = None,
) -> Tensor:
    """attention_dense with q_lens[b] rows for sequence b: prefill chunks.

    Rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] belong to sequence b; rows past the last are zero.

    Shapes  as attention_dense; cu_seqlens_q [B + 1], the running sum of q_lens, for the kernel
            as q_lens is for the host.
    Dtypes, Raises  as attention_dense.
    """
    out = torch.zeros_like(q)
    for rows, b, keys in ragged_tiles(q_lens, seq_lens, positions):
        out[rows] = attention_dense(
            q[rows],
            k_cache,
            v_cache,
            positions[rows],
            block_tables[b],
            seq_lens[b],
            keys,
            scale,
            first_key,
            window,
        )
    return out


# What the paged references share. None of it is a kernel's twin.

_TILE_ROWS = 256


def check_rows(name: str, q: Tensor, k_cache: Tensor, block_tables: Tensor) -> None:
    if q.shape[0] % max(block_tables.shape[0], 1) or q.shape[1] % k_cache.shape[2]:
        raise ValueError(
            f"{name}: q {tuple(q.shape)}, cache {tuple(k_cache.shape)}, "
            f"block_tables {tuple(block_tables.shape)}"
        )


@remember_last
def visible_keys(
    positions: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    block_size: int,
    first_key: int = 0,
) -> tuple[Tensor, Tensor]:
    """Which keys each row may see, and where they lie.

    L = max_seq_len rounded up to whole blocks. Returns visible [B, Q, L] (first_key <= t <=
    position, t < seq_len) and slots [B, L]: the kv_slot of key t, and for the t that hold no
    key of the sequence the slot of its first key. So what is gathered through ``slots`` is
    finite wherever a row sees anything, and zero weights stay zeros (0 * NaN is NaN).
    """
    num_blocks = -(-max_seq_len // block_size)
    t = torch.arange(num_blocks * block_size, device=positions.device)
    blocks = block_tables[:, :num_blocks].clamp(min=0).long()
    slots = (blocks[:, :, None] * block_size + t[:block_size]).flatten(1)
    held = t < seq_lens[:, None]
    if first_key:
        held &= t >= first_key
    if num_blocks:
        slots = torch.where(held, slots, slots[:, min(first_key, len(t) - 1), None])
    visible = (t <= positions.view(len(seq_lens), -1, 1)) & held[:, None]
    return visible, slots


@remember_last
def _group_cells(slots: Tensor, groups: int) -> Tensor:
    """Rows of a cache seen as [num_blocks * block_size * G, D]: [B * G * L], group by group."""
    return (slots[:, None] * groups + torch.arange(groups, device=slots.device)[:, None]).flatten()


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """Softmax attention of q [N, H, D] to the keys at slots [B, L], per visible [B, 1|G, Q, L]."""
    batch, length = slots.shape
    groups, dim = k_cache.shape[2:]
    ratio = q.shape[1] // groups
    rows = q.shape[0] // max(batch, 1)
    if not q.numel() or not length:
        return torch.zeros_like(q)
    # Cells of one group are gathered side by side: k, v [B * G, L, D], ready for bmm.
    cells = _group_cells(slots, groups)
    k = wide(k_cache.view(-1, dim).index_select(0, cells)).view(-1, length, dim)
    v = wide(v_cache.view(-1, dim).index_select(0, cells)).view(-1, length, dim)
    grouped = wide(q).view(batch, rows, groups, ratio, dim).transpose(1, 2)
    scores = torch.bmm(grouped.reshape(-1, rows * ratio, dim), k.transpose(1, 2)) * scale
    scores = scores.view(batch, groups, rows, ratio, length)
    # The smallest finite number: a row that sees nothing stays finite until it is zeroed below.
    scores = scores.masked_fill(~visible[:, :, :, None], torch.finfo(scores.dtype).min)
    out = torch.bmm(scores.softmax(-1).view(-1, rows * ratio, length), v)
    out = out.view(batch, groups, rows, ratio, dim)
    out = out.masked_fill(~visible.any(-1)[..., None, None], 0.0)
    return out.transpose(1, 2).reshape(q.shape).to(q.dtype)


def ragged_tiles(
    q_lens: tuple[int, ...], seq_lens: Tensor, positions: Tensor
) -> list[tuple[slice, slice, int]]:
    """Rows of at most _TILE_ROWS, their sequence, and how many keys they can see at most."""
    tiles = []
    for b, (q_len, end) in enumerate(zip(q_lens, accumulate(q_lens), strict=True)):
        for start in range(end - q_len, end, _TILE_ROWS):
            rows = slice(start, min(start + _TILE_ROWS, end))
            keys = min(int(seq_lens[b]), int(positions[rows].max()) + 1)
            tiles.append((rows, slice(b, b + 1), keys))
    return tiles
