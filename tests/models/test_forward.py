"""One forward of the target at a time: verify rows against transformers, and rows of padding."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from pairs import target_spec, tiny_target
from torch import Tensor
from transformers import MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig

from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels.index_topk import index_topk
from eaglerun.kernels.rows import Rows
from eaglerun.models import minimax_m3
from eaglerun.models.attention import TargetKV
from eaglerun.models.minimax_m3 import MiniMaxM3

CPU = torch.device("cpu")
NUM_BLOCKS = 90


class Memory:
    """NaN in every cell, and a shuffled block table for each sequence."""

    def __init__(self, spec: TargetSpec, dtype: torch.dtype, num_sequences: int, seed: int) -> None:
        self.block_size = spec.sparse_block_size
        self.kv = TargetKV.allocate(spec, NUM_BLOCKS, self.block_size, CPU, dtype)
        for region in self.kv.regions():
            region.tensor.fill_(torch.nan)
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(seed))
        self.tables = order.view(num_sequences, -1).int()

    def written(self) -> list[Tensor]:
        """Which slots hold something, memory by memory."""
        return [~r.tensor.flatten(2).isnan().any(-1).flatten() for r in self.kv.regions()]

    def batch(self, rows: list[list[int]], uniform: bool = True) -> Rows:
        """rows[b]: the positions of sequence b, -1 for padding."""
        positions = torch.tensor([p for row in rows for p in row])
        seq_ids = torch.tensor([b for b, row in enumerate(rows) for _ in row])
        blocks = self.tables[seq_ids, positions.clamp(min=0) // self.block_size].long()
        slots = blocks * self.block_size + positions % self.block_size
        ends = [max(row, default=-1) + 1 for row in rows]
        q_lens = tuple(len(row) for row in rows)
        sums = torch.tensor([0, *q_lens]).cumsum(0)
        made = Rows(
            positions=positions,
            kv_slots=slots.masked_fill(positions < 0, -1),
            block_tables=self.tables,
            seq_lens=torch.tensor(ends, dtype=torch.int32),
            max_seq_len=max(ends),
        )
        return made if uniform else made._replace(cu_seqlens=sums.int(), q_lens=q_lens)


@torch.inference_mode()
@pytest.mark.parametrize("heads, groups, local", [(4, 1, 1), (4, 2, 2), (4, 4, 1)])
def test_verify_rows_are_those_of_transformers(heads: int, groups: int, local: int) -> None:
    """Two chunks, then runs of 1 to 5 rows, in pages of NaN; taps at both ends of the stack."""
    changes = {"num_attention_heads": heads, "num_key_value_heads": groups}
    changes |= {"num_index_heads": groups, "sparse_local_blocks": local}
    spec = dataclasses.replace(target_spec(), **changes)
    torch.manual_seed(heads + groups)
    model, taps = MiniMaxM3VLForCausalLM._from_config(golden_config(spec)).eval(), (0, 2, 4)
    ours = MiniMaxM3(spec, taps, device=CPU, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        scale = 0.3 if tensor.ndim == 1 else 0.8 * tensor.shape[-1] ** -0.5
        tensor.normal_(0, 1.0 if "embed" in name else scale)
    copy_weights(model, ours)
    ids = torch.randint(0, spec.vocab_size, (210,))
    whole = model(ids[None], output_hidden_states=True, use_cache=False)
    memory = Memory(spec, torch.float32, 1, seed=3)
    cuts = [0, 90, 170, 174, 175, 180, 182, 187, 190, 195, 200, 201, 206, 210]
    aux = torch.full((3, 100, spec.hidden_size), torch.nan)
    for start, stop in pairwise(cuts):
        batch = memory.batch([list(range(start, stop))], uniform=start >= 170)
        hidden = ours(ids[start:stop], batch, memory.kv, aux)
        torch.testing.assert_close(
            ours.logits(hidden), whole.logits[0, start:stop], rtol=1e-4, atol=1e-4
        )
        for tap, captured in zip(taps[:2], aux, strict=False):
            theirs = whole.hidden_states[tap][0, start:stop]
            torch.testing.assert_close(captured[: stop - start], theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.norm(aux[2, : stop - start]), hidden)
    blocks = memory.tables[0, torch.arange(210) // 4].long()
    expected = (blocks * 4 + torch.arange(210) % 4).sort().values
    for written in memory.written():
        assert torch.equal(written.nonzero()[:, 0], expected), "only these cells are written"


def golden_config(spec: TargetSpec) -> MiniMaxM3VLTextConfig:
    sparse = spec.sparse_layers
    return MiniMaxM3VLTextConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.expert_intermediate_size,
        dense_intermediate_size=spec.dense_intermediate_size,
        shared_intermediate_size=spec.shared_intermediate_size,
        num_local_experts=spec.num_experts,
        num_experts_per_tok=spec.num_experts_per_tok,
        routed_scaling_factor=spec.routed_scaling_factor,
        mlp_layer_types=["sparse" if moe else "dense" for moe in spec.moe_layers],
        layer_types=["minimax_m3_sparse" if s else "full_attention" for s in sparse],
        index_n_heads=spec.num_index_heads,
        index_head_dim=spec.index_head_dim,
        index_block_size=spec.sparse_block_size,
        index_topk_blocks=spec.sparse_topk_blocks,
        index_local_blocks=spec.sparse_local_blocks,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": spec.rotary_dim / spec.head_dim,
        },
        attn_implementation="eager",
        bos_token_id=1,
        eos_token_id=0,
    )


def copy_weights(model: MiniMaxM3VLForCausalLM, ours: MiniMaxM3) -> None:
    """transformers' tensors into ours by name; the loader has its own tests."""
    state = model.state_dict()
    for name, parameter in ours.named_parameters():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        theirs = theirs.replace("index_q_norm", "indexer.q_norm")
        theirs = theirs.replace("index_k_norm", "indexer.k_norm")
        theirs = theirs.replace("experts.w13", "experts.gate_up_proj")
        theirs = theirs.replace("experts.w2", "experts.down_proj")
        names = [theirs]
        if "qkv_proj" in name:
            parts = ("q_proj", "k_proj", "v_proj", "indexer.q_proj", "indexer.k_proj")
            names = [theirs.replace("qkv_proj", part) for part in parts]
            names = [each for each in names if each in state]
        parameter.copy_(torch.cat([state[each] for each in names]))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_changes_no_other_row(dtype: torch.dtype) -> None:
    """Drafts that were not made and a sequence that is not there: whatever their token is, even
    one whose embedding is NaN, the others have the same bits, cells and count of experts."""
    spec, taps = target_spec(), (1, 4)
    target = tiny_target(0, spec, taps, dtype)
    target.embed_tokens.weight[0] = torch.nan
    lengths = (70, 33, 50)
    texts = torch.randint(1, spec.vocab_size, (3, 80))
    decode = [[70, 71, 72, 73], [33, 34, -1, -1], [-1] * 4]
    outcomes = []
    for filling in (1, 7, 0):
        memory = Memory(spec, dtype, 3, seed=1)
        for b, length in enumerate(lengths):
            rows: list[list[int]] = [[], [], []]
            rows[b] = list(range(length))
            target(texts[b, :length], memory.batch(rows, uniform=False), memory.kv)
        batch = memory.batch(decode)
        real = batch.positions >= 0
        owner = torch.arange(len(real)) // batch.longest
        ids = texts[owner, batch.positions.clamp(min=0)].masked_fill(~real, filling)
        aux = torch.full((2, 20, spec.hidden_size), torch.nan, dtype=dtype)
        count = torch.zeros(1, dtype=torch.int64)
        before = memory.written()
        hidden = target(ids, batch, memory.kv, aux, count)
        for now, had in zip(memory.written(), before, strict=True):
            added = (now & ~had).nonzero()[:, 0]
            assert torch.equal(added, batch.kv_slots[real].sort().values)
        captured = aux[:, : len(ids)]
        if filling:
            assert hidden.isfinite().all() and captured.isfinite().all()
        assert aux[:, len(ids) :].isnan().all()
        outcomes.append((hidden[real], captured[:, real], count))
    assert outcomes[0][0].isfinite().all()
    assert 0 < int(outcomes[0][2]) <= sum(spec.moe_layers) * spec.num_experts
    for other in outcomes[1:]:
        for mine, theirs in zip(other, outcomes[0], strict=True):
            assert torch.equal(mine, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("max_seq_len", [12, 13])
def test_few_blocks_need_no_selection(max_seq_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as every causal block is among the top 3 of 4 keys each, no score is computed."""
    spec = target_spec()
    target, memory = tiny_target(0, spec, (1,), torch.float64), Memory(spec, torch.float64, 1, 0)
    calls: list[int] = []
    monkeypatch.setattr(
        minimax_m3, "index_topk", lambda *args: (calls.append(1), index_topk(*args))[1]
    )
    target(torch.arange(max_seq_len), memory.batch([list(range(max_seq_len))], False), memory.kv)
    assert len(calls) == (3 if max_seq_len > 12 else 0)


def test_specs_that_cannot_run() -> None:
    sparse = (False, True, True, True)
    for change, message in (
        ({"num_index_heads": 4}, "num_index_heads 4"),
        ({"index_shared": sparse}, "first sparse layer"),
    ):
        spec = dataclasses.replace(target_spec(), **change)
        with pytest.raises(ValueError, match=message):
            MiniMaxM3(spec, (1,), device=CPU, dtype=torch.float32)
    for taps in ((5,), (-1,), (2, 2)):
        with pytest.raises(ValueError, match="distinct layers of 0 .. 4"):
            MiniMaxM3(target_spec(), taps, device=CPU, dtype=torch.float32)
    with pytest.raises(ValueError, match="block_size 8: .* of 4 keys"):
        TargetKV.allocate(target_spec(), 3, 8, CPU, torch.float32)


def test_memory_is_named_and_measured() -> None:
    spec = dataclasses.replace(target_spec(), index_shared=(False, False, True, False))
    kv = TargetKV.allocate(spec, 5, 4, CPU, torch.float32)
    sizes = {region.name: region.bytes_per_block for region in kv.regions()}
    assert kv.layers[0].index_k is None and kv.layers[2].index_k is None
    assert sizes == {
        **{f"target.{i}.{part}": 4 * 2 * 8 * 4 for i in range(4) for part in "kv"},
        **{f"target.{i}.index_k": 4 * 8 * 4 for i in (1, 3)},
    }
