"""The trainer's forms of target and draft against the forms in which they are served."""

import sys
from pathlib import Path

import pytest
import torch

RECIPE = Path(__file__).parents[2] / "recipes" / "tiny-m3"
sys.path.insert(0, str(RECIPE))

from tiny_m3.checkpoints import load_draft, load_target, save_draft, save_target  # noqa: E402
from tiny_m3.draft import DraftConfig, Eagle3Draft  # noqa: E402
from tiny_m3.model import TargetConfig, TinyM3, among_top, rope_tables, rotate  # noqa: E402
from tiny_m3.scoring import acceptance  # noqa: E402

SMALL = TargetConfig(
    vocab_size=96, hidden_size=32, num_layers=4, num_dense_layers=1, num_heads=4, head_dim=16,
    rotary_dim=8, dense_width=32, shared_width=16, expert_width=16, num_experts=4,
    experts_per_token=2, index_dim=16, block_size=4, topk_blocks=2, max_len=64,
)  # fmt: skip
TAPS = (1, 2, 3)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random_target(seed: int) -> TinyM3:
    model = TinyM3(SMALL)
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.mul_(20)
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
        for layer in model.layers[1:]:
            layer.mlp.bias.copy_(0.2 * torch.randn(4, generator=generator))
    return model.eval()


def random_draft(target: TinyM3, seed: int) -> Eagle3Draft:
    config = DraftConfig(vocab_size=96, hidden_size=32, taps=TAPS, width=48, num_heads=4,
                         num_kv_heads=2, head_dim=16, max_len=64)  # fmt: skip
    draft = Eagle3Draft(config)
    draft.initialise(target.embed.weight, target.head.weight, seed)
    return draft.eval()


def forward(model: TinyM3, ids: torch.Tensor, **options):
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    full = torch.zeros(len(ids), dtype=torch.bool)
    return model(ids, positions, full, **options)


def test_among_top_takes_the_lower_index_of_equal_scores():
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0], [-torch.inf, 2.0, -torch.inf, -torch.inf]])
    assert among_top(scores, 2).tolist() == [[False, True, True, False], [True, True, False, False]]


@torch.no_grad()
def test_a_packed_row_computes_each_chat_as_if_alone():
    model = random_target(0)
    generator = torch.Generator().manual_seed(1)
    chats = [torch.randint(0, 96, (1, n), generator=generator) for n in (22, 13, 9)]
    ids = torch.zeros(1, 56, dtype=torch.long)
    positions = torch.zeros(1, 56, dtype=torch.long)
    starts = (0, 24, 40)
    for chat, start in zip(chats, starts, strict=True):
        ids[:, start : start + chat.shape[1]] = chat
        positions[:, start : start + chat.shape[1]] = torch.arange(chat.shape[1])
    packed = model(ids, positions, torch.zeros(1, dtype=torch.bool))[0]
    for chat, start in zip(chats, starts, strict=True):
        alone = forward(model, chat)[0]
        torch.testing.assert_close(packed[:, start : start + chat.shape[1]], alone)


@torch.no_grad()
def test_cached_steps_equal_the_whole_row_and_selection_matters():
    model = random_target(2)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    whole = forward(model, ids)[0]
    caches = model.make_caches(2, 40, torch.device("cpu"))
    full = torch.zeros(2, dtype=torch.bool)
    parts = []
    for start, stop in ((0, 23), (23, 24), (24, 28), (28, 40)):
        positions = torch.arange(start, stop).expand(2, -1)
        parts.append(model(ids[:, start:stop], positions, full, caches=caches)[0])
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    positions = torch.arange(40).expand(2, -1)
    dense = model(ids, positions, torch.ones(2, dtype=torch.bool))[0]
    assert (dense[:, :8] - whole[:, :8]).abs().max() < 1e-5  # two blocks: all are selected
    assert (dense - whole).abs().max() > 1e-2


def chain(draft: Eagle3Draft, ids: torch.Tensor, taps: list[torch.Tensor], row: int, k: int):
    """K drafts after `row` as an engine makes them: pass 0 fills the keys of all rows so far,
    later passes append one row each. ids [n] holds at least row + 2 tokens."""
    layer, c = draft.layers[0], draft.config
    a = layer.self_attn
    keys = values = torch.zeros(c.num_kv_heads, 0, c.head_dim)
    hidden = draft.combine([t[:, : row + 1] for t in taps])[0]
    tokens, first = ids[1 : row + 2], 0
    drafted = []
    for _ in range(k):
        x = torch.cat([layer.input_layernorm(draft.embed_tokens(tokens)),
                       layer.hidden_norm(hidden)], -1)  # fmt: skip
        positions = torch.arange(first, first + len(tokens))[None]
        cos, sin = (t[0] for t in rope_tables(positions, c.head_dim, c.rope_theta))
        q = rotate(a.q_proj(x).unflatten(-1, (-1, c.head_dim)).transpose(0, 1), cos, sin)
        new = rotate(a.k_proj(x).unflatten(-1, (-1, c.head_dim)).transpose(0, 1), cos, sin)
        keys = torch.cat([keys, new], 1)
        values = torch.cat([values, a.v_proj(x).unflatten(-1, (-1, c.head_dim)).transpose(0, 1)], 1)
        group = c.num_heads // c.num_kv_heads
        scores = q @ keys.repeat_interleave(group, 0).transpose(1, 2) * c.head_dim**-0.5
        late = torch.arange(keys.shape[1]) > positions[0][:, None]
        probs = scores.masked_fill(late, -torch.inf).softmax(-1)
        out = (probs @ values.repeat_interleave(group, 0)).transpose(0, 1).flatten(1)
        z = hidden + a.o_proj(out)
        z = z + layer.mlp(layer.post_attention_layernorm(z))
        state = draft.norm(z)[-1:]
        drafted.append(int(draft.lm_head(state).argmax()))
        first += len(tokens)
        tokens, hidden = torch.tensor(drafted[-1:]), state
    return drafted


@torch.no_grad()
def test_parallel_passes_accept_what_served_chains_accept():
    target = random_target(4)
    draft = random_draft(target, 5)
    # A draft that is right now and then: its head follows the target's over a shared embedding.
    generator = torch.Generator().manual_seed(6)
    sequences = []
    for n in (5, 9):
        ids = torch.randint(0, 96, (1, n), generator=generator)
        for _ in range(14):
            hidden, taps, _, _ = forward(target, ids, taps=TAPS)
            token = target.head(hidden[:, -1]).argmax(-1)
            if ids.shape[1] % 3 and ids.shape[1] > n:  # now and then what the draft would say
                token = torch.tensor(chain(draft, ids[0], taps, ids.shape[1] - 2, 1))
            ids = torch.cat([ids, token[:, None]], 1)
        sequences.append((ids[0, :n].tolist(), ids[0, n:].tolist()))
    for k in (1, 3, 4):
        accepted = rounds = 0
        for prompt, output in sequences:
            ids = torch.tensor(prompt + output)
            taps = forward(target, ids[None], taps=TAPS)[1]
            row = len(prompt) - 1
            while row + 2 < len(ids):
                drafted = chain(draft, ids, taps, row, k)
                wanted = ids[row + 2 : row + 2 + k].tolist()
                n = 0
                while n < len(wanted) and drafted[n] == wanted[n]:
                    n += 1
                accepted, rounds, row = accepted + n, rounds + 1, row + n + 1
        result = acceptance(target, draft, sequences, k, 2)
        assert (result.accepted, result.rounds) == (accepted, rounds)
        assert 0 < accepted < rounds * k


def test_saved_checkpoints_load_again(tmp_path):
    target = random_target(7)
    save_target(target, tmp_path / "target")
    again = load_target(tmp_path / "target")
    assert again.config == SMALL
    for (name, p), q in zip(target.named_parameters(), again.parameters(), strict=True):
        exact = p if name.endswith("mlp.gate") else p.to(torch.bfloat16).float()
        assert torch.equal(exact, q), name
    assert torch.equal(again.layers[2].mlp.bias, target.layers[2].mlp.bias)
    draft = random_draft(target, 8)
    save_draft(draft, tmp_path / "draft")
    assert load_draft(tmp_path / "draft").config == draft.config
