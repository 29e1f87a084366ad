# mypy: allow-untyped-defs, allow-incomplete-defs
"""Where the rows of a decode step stand: ids, positions, KV slots and lengths, on the device."""

import torch
from torch import Tensor

from eaglerun.kernels import paired
from eaglerun.kernels.language import begin, cdiv, empty_each, jit, power_of_2, require, tl
from eaglerun.kernels.launch import settings
from eaglerun.kernels.reference import draft_inputs as reference
from eaglerun.kernels.rows import BySlot, Newest

# Sequences of a program that makes a draft pass's inputs: the lanes of its one warp.
BLOCK_B = 32
# Entries of a block table that a program copies.
BLOCK_M = 1024


@jit
def _slots(positions, live, b, table_ptr, table_row, block_size):
    """kv_slot of positions (>= 0 where live), the table read nowhere else."""
    at = tl.where(live, positions, 0)
    block = tl.load(table_ptr + b * table_row + at // block_size, mask=live, other=0)
    return tl.where(live, block.to(tl.int64) * block_size + at % block_size, -1)


@jit(varying=("table_row", "rows"))
def _kv_slots_kernel(
    positions_ptr, table_ptr, slots_ptr, position_row, table_row, block_size, rows,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(positions_ptr + b * position_row + q, mask=q < rows, other=-1)
    slots = _slots(p, p >= 0, b, table_ptr, table_row, block_size)
    tl.store(slots_ptr + b * rows + q, slots, mask=q < rows)


@jit(varying=("table_row", "table_width", "rows"))
def _verify_inputs_kernel(
    slots_ptr,
    num_drafts_ptr,
    length_ptr,
    last_token_ptr,
    draft_tokens_ptr,
    table_ptr,
    ids_ptr,
    positions_ptr,
    kv_slots_ptr,
    seq_lens_ptr,
    own_length_ptr,
    own_table_ptr,
    slots_step,
    num_drafts_step,
    draft_row,
    table_row,
    table_width,
    block_size,
    rows,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (b, 0): the rows of sequence b; (b, 1 + i): a piece of its block table."""
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + b * slots_step)
    piece = tl.program_id(1) - 1
    if piece >= 0:
        m = piece * BLOCK_M + tl.arange(0, BLOCK_M)
        block = tl.load(table_ptr + slot * table_row + m, mask=m < table_width)
        tl.store(own_table_ptr + b * table_width + m, block, mask=m < table_width)
    else:
        length = tl.load(length_ptr + slot)
        num_drafts = tl.load(num_drafts_ptr + b * num_drafts_step)
        j = tl.arange(0, BLOCK)
        real = (j <= num_drafts) & (j < rows)
        drafted = real & (j > 0)
        ids = tl.load(draft_tokens_ptr + slot * draft_row + j - 1, mask=drafted, other=0)
        ids = tl.where(real & (j == 0), tl.load(last_token_ptr + slot), ids)
        positions = tl.where(real, length - 1 + j, -1)
        at = b * rows + j
        tl.store(ids_ptr + at, ids, mask=j < rows)
        tl.store(positions_ptr + at, positions, mask=j < rows)
        kv_slots = _slots(positions, real, slot, table_ptr, table_row, block_size)
        tl.store(kv_slots_ptr + at, kv_slots, mask=j < rows)
        seq_len = tl.where(num_drafts >= 0, length + num_drafts, 0)
        tl.store(seq_lens_ptr + b, seq_len.to(tl.int32))
        tl.store(own_length_ptr + b, length)


@jit(varying=("pass_index", "table_row", "batch"))
def _draft_inputs_kernel(
    position_ptr,
    num_propose_ptr,
    table_ptr,
    positions_ptr,
    slots_ptr,
    seq_lens_ptr,
    pass_index,
    num_propose_step,
    table_row,
    block_size,
    batch,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    begin(OVERLAP)
    b = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = b < batch
    num_propose = tl.load(num_propose_ptr + b * num_propose_step, mask=live, other=0)
    real = live & (pass_index < num_propose)
    at = tl.where(real, tl.load(position_ptr + b, mask=real, other=0) + pass_index, -1)
    # Pass 0 writes no KV: the fill wrote that of the newest token.
    written = b < tl.where(pass_index > 0, batch, 0)
    slots = _slots(at, real & written, b, table_ptr, table_row, block_size)
    tl.store(positions_ptr + b, at, mask=live)
    tl.store(slots_ptr + b, slots, mask=live)
    tl.store(seq_lens_ptr + b, (at + 1).to(tl.int32), mask=live)


@jit(varying=("emitted_ptr", "emitted_row", "table_row", "rows"))
def _accepted_inputs_kernel(
    emitted_ptr, length_ptr, table_ptr, ids_ptr, positions_ptr, slots_ptr,
    emitted_row, table_row, block_size, rows,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    token = tl.load(emitted_ptr + b * emitted_row + j, mask=j < rows, other=-1)
    real = token >= 0
    positions = tl.where(real, tl.load(length_ptr + b) + j, -1)
    at = b * rows + j
    tl.store(ids_ptr + at, tl.where(real, token, 0), mask=j < rows)
    tl.store(positions_ptr + at, positions, mask=j < rows)
    slots = _slots(positions, real, b, table_ptr, table_row, block_size)
    tl.store(slots_ptr + at, slots, mask=j < rows)


@jit(varying=("rows",))
def _newest_inputs_kernel(
    slots_ptr, accepted_ptr, num_propose_ptr, length_ptr, last_token_ptr, hidden_ptr,
    tokens_ptr, positions_ptr, own_hidden_ptr,
    slots_step, accepted_step, num_propose_step, rows, width,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    begin(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + b * slots_step)
    if tl.program_id(1) == 0:
        tl.store(tokens_ptr + b, tl.load(last_token_ptr + slot))
        tl.store(positions_ptr + b, tl.load(length_ptr + slot) - 1)
    row = b * rows + tl.load(accepted_ptr + b * accepted_step)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = tl.load(num_propose_ptr + b * num_propose_step) > 0
    x = tl.load(hidden_ptr + row * width + d, mask=d < tl.where(known, width, 0), other=0.0)
    tl.store(own_hidden_ptr + b * width + d, x, mask=d < width)


@paired(reference.kv_slots_of)
def kv_slots_of(positions: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """KV slot of each position: block_table[p // block_size] * block_size + p % block_size.

    Shapes  positions [B, Q] int64, -1 on padding rows, last dim contiguous; block_table [B, M]
            int32, last dim contiguous; returns [B, Q] int64, -1 where the position is -1.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    Source  facts of paged attention: vLLM's slot mapping.
    """
    batch, rows = positions.shape
    _require("kv_slots_of", block_table, batch, positions=positions)
    slots = torch.empty(batch, rows, dtype=torch.int64, device=positions.device)
    if slots.numel():
        launch = settings("one_warp", positions)
        block = min(power_of_2(rows), 128)
        _kv_slots_kernel[(batch, cdiv(rows, block))](
            positions,
            block_table,
            slots,
            positions.stride(0),
            block_table.stride(0),
            block_size,
            rows,
            BLOCK=block,
            **launch,
        )
    return slots


@paired(reference.verify_inputs)
def verify_inputs(
    slots: Tensor,
    num_drafts: Tensor,
    by_slot: BySlot,
    table: Tensor,
    block_size: int,
    num_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rows [last token, d1 .. dk] that the target runs for each sequence, and its state.

    Row j stands at position length - 1 + j; it is a padding row where j > num_drafts. Keys that
    the rows see, once their own are written: length + num_drafts.

    Shapes  slots, num_drafts [B] int64 of any stride (num_drafts -1 on padding sequences);
            by_slot of S slots with at least num_rows - 1 drafts, last dims contiguous; table
            [B, M] int32, contiguous. Returns token_ids, positions, kv_slots [B, num_rows] int64,
            seq_lens [B] int32, and length [B] int64 of the slots. Padding rows: id 0, position -1,
            slot -1.
    Writes  table, the block tables of the slots.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    length, last_token, draft_tokens, block_table = by_slot
    batch, (places, width) = slots.shape[0], block_table.shape
    _require(
        "verify_inputs",
        block_table,
        places,
        length=length,
        last_token=last_token,
        draft_tokens=draft_tokens,
    )
    require(
        draft_tokens.shape[1] >= num_rows - 1
        and slots.shape == num_drafts.shape == (batch,)
        and slots.dtype == num_drafts.dtype == torch.int64
        and table.shape == (batch, width)
        and table.dtype == torch.int32
        and table.is_contiguous(),
        "verify_inputs",
        slots=slots,
        draft_tokens=draft_tokens,
        num_drafts=num_drafts,
        table=table,
    )
    ids, positions, kv_slots = empty_each(3, (batch, num_rows), length.device)
    seq_lens = torch.empty(batch, dtype=torch.int32, device=length.device)
    own_length = torch.empty(batch, dtype=torch.int64, device=length.device)
    if batch:
        _verify_inputs_kernel[(batch, 1 + cdiv(width, BLOCK_M))](
            slots,
            num_drafts,
            length,
            last_token,
            draft_tokens,
            block_table,
            ids,
            positions,
            kv_slots,
            seq_lens,
            own_length,
            table,
            slots.stride(0),
            num_drafts.stride(0),
            draft_tokens.stride(0),
            block_table.stride(0),
            width,
            block_size,
            num_rows,
            BLOCK=power_of_2(num_rows),
            BLOCK_M=BLOCK_M,
            **settings("one_warp", length),
        )
    return ids, positions, kv_slots, seq_lens, own_length


@paired(reference.draft_inputs)
def draft_inputs(
    position: Tensor, pass_index: int, num_propose: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Position, KV slot and length of the one row per sequence that draft pass ``pass_index`` runs.

    The row of pass s stands s places after the newest token. Its KV is written from pass 1 on
    (the fill wrote that of pass 0). Sequences that propose fewer than s + 1 tokens have a padding
    row.

    Shapes  position [B] int64, of the newest token; num_propose [B] int64; block_table [B, M]
            int32, last dim contiguous. Returns positions [B, 1], kv_slots [B, 1] int64 and
            seq_lens [B] int32.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    batch = position.shape[0]
    _require("draft_inputs", block_table, batch, position=position)
    require(
        num_propose.shape == (batch,) and num_propose.dtype == torch.int64,
        "draft_inputs",
        num_propose=num_propose,
    )
    positions, kv_slots = empty_each(2, (batch, 1), position.device)
    seq_lens = torch.empty(batch, dtype=torch.int32, device=position.device)
    if batch:
        _draft_inputs_kernel[(cdiv(batch, BLOCK_B),)](
            position,
            num_propose,
            block_table,
            positions,
            kv_slots,
            seq_lens,
            pass_index,
            num_propose.stride(0),
            block_table.stride(0),
            block_size,
            batch,
            BLOCK=BLOCK_B,
            **settings("one_warp", position),
        )
    return positions, kv_slots, seq_lens


@paired(reference.accepted_inputs)
def accepted_inputs(
    emitted: Tensor, length: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The draft rows of the tokens that a verify emitted: token j of a sequence stands at position
    length + j. Rows that emit nothing are padding: id 0, position -1, slot -1.

    Shapes  emitted [B, Q] int64, -1 where there is none; length [B] int64, before the step;
            block_table [B, M] int32; last dims contiguous. Returns token_ids, positions and
            kv_slots [B, Q] int64.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    batch, rows = emitted.shape
    _require("accepted_inputs", block_table, batch, emitted=emitted, length=length)
    ids, positions, kv_slots = empty_each(3, (batch, rows), emitted.device)
    if batch:
        _accepted_inputs_kernel[(batch,)](
            emitted,
            length,
            block_table,
            ids,
            positions,
            kv_slots,
            emitted.stride(0),
            block_table.stride(0),
            block_size,
            rows,
            BLOCK=power_of_2(rows),
            **settings("one_warp", emitted),
        )
    return ids, positions, kv_slots


@paired(reference.newest_inputs)
def newest_inputs(
    slots: Tensor,
    accepted: Tensor,
    num_propose: Tensor,
    by_slot: BySlot,
    hidden: Tensor,
    newest: Newest,
) -> None:
    """What the first draft pass starts from: the newest token of each sequence, where it stands,
    and the hidden state of the position before, row accepted[b] of its rows.

    Shapes  slots, accepted, num_propose [B] int64 of any stride; by_slot of S slots; hidden
            [B * Q, H] contiguous; newest of B sequences and H, contiguous; B at least 1.
    Dtypes  both hidden alike, any; a copy.
    Writes  newest; its hidden is 0 where num_propose is 0: that of a padding sequence is not read.
    Error   none.
    Raises  ValueError on another shape, stride or dtype.
    """
    batch, (total, width) = slots.shape[0], hidden.shape
    length, last_token = by_slot.length, by_slot.last_token
    require(
        all(t.shape == (batch,) and t.dtype == torch.int64 for t in (slots, accepted, num_propose))
        and all(
            t.ndim == 1 and t.dtype == torch.int64 and t.is_contiguous()
            for t in (length, last_token)
        )
        and hidden.is_contiguous()
        and batch > 0
        and total % batch == 0
        and newest.tokens.shape == newest.positions.shape == (batch,)
        and newest.tokens.dtype == newest.positions.dtype == torch.int64
        and newest.hidden.shape == (batch, width)
        and newest.hidden.dtype == hidden.dtype
        and all(t.is_contiguous() for t in newest),
        "newest_inputs",
        slots=slots,
        accepted=accepted,
        num_propose=num_propose,
        hidden=hidden,
        newest=newest,
    )
    launch = settings("copy", hidden)
    _newest_inputs_kernel[(batch, cdiv(width, launch["BLOCK"]))](
        slots,
        accepted,
        num_propose,
        length,
        last_token,
        hidden,
        *newest,
        slots.stride(0),
        accepted.stride(0),
        num_propose.stride(0),
        total // batch,
        width,
        **launch,
    )


def _require(name: str, block_table: Tensor, batch: int, **rows: Tensor) -> None:
    require(
        block_table.shape[0] == batch
        and block_table.dtype == torch.int32
        and block_table.stride(1) == 1
        and all(t.shape[0] == batch and t.dtype == torch.int64 for t in rows.values())
        and all(t.shape[-1] < 2 or t.stride(-1) == 1 for t in rows.values()),
        name,
        block_table=block_table,
        **rows,
    )
