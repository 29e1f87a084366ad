"""What the lightning indexer is worth: attention mass that its blocks hold, and needles without it.

    python recipes/tiny-m3/measure_indexer.py configs/demo/target --prompts 8

For the answers to needle questions: the share of full attention's mass that lies in the selected
blocks, in the best possible choice of as many blocks, and in the last blocks before the query; and
the needles found when the selection shrinks to the local block.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from tiny_m3 import chat_format, checkpoints, evalsets
from tiny_m3.model import Attention, TinyM3, among_top, packed_visibility, rotate
from tiny_m3.scoring import Speaker
from tokenizers import Tokenizer
from torch import Tensor, nn


def heads(x: Tensor, num: int) -> Tensor:
    """[B, S, num * d] -> [B, num, S, d]."""
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def shares(layer: Attention, x: Tensor, rope: tuple[Tensor, Tensor], positions: Tensor) -> Tensor:
    """[3, S]: mass in the selected, the best and the last blocks, mean over KV groups."""
    c = layer.config
    visible, query_block = packed_visibility(positions, c.block_size)
    q = rotate(layer.q_norm(heads(layer.q(x), c.num_heads)), *rope)
    k = rotate(layer.k_norm(heads(layer.k(x), c.num_kv_heads)), *rope)
    grouped = q.unflatten(1, (c.num_kv_heads, -1))
    scores = grouped @ k[:, :, None].transpose(-1, -2) * c.head_dim**-0.5
    probs = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).mean(2)
    mass = nn.functional.pad(probs, (0, -probs.shape[-1] % c.block_size))
    mass = mass.unflatten(-1, (-1, c.block_size)).sum(-1)  # [1, G, S, N]
    index_q = rotate(layer.index_q_norm(heads(layer.index_q(x), c.num_kv_heads)), *rope)
    index_k = rotate(layer.index_k_norm(heads(layer.index_k(x), 1)), *rope)
    block_scores = layer._block_scores(index_q, index_k, visible)
    blocks = torch.arange(mass.shape[-1])
    behind = query_block[:, None, :, None] - blocks
    forced = block_scores.masked_fill(behind == 0, torch.inf)
    best = mass.masked_fill(behind == 0, torch.inf)
    chosen = (
        among_top(forced, c.topk_blocks),
        among_top(best, c.topk_blocks),
        (behind >= 0) & (behind < c.topk_blocks),
    )
    return torch.stack([(mass * m).sum(-1).mean((0, 1)) for m in chosen])


@torch.no_grad()
def measure(model: TinyM3, prompt: list[int], output: list[int]) -> Tensor:
    """[sparse layers, 3]: the shares over the answer's tokens."""
    seen: dict[int, tuple[Tensor, tuple[Tensor, Tensor]]] = {}
    sparse = {i: a for i, a in enumerate(m for m in model.modules() if isinstance(m, Attention))
              if a.sparse}  # fmt: skip
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, i=i: seen.__setitem__(i, (args[0], args[1]))
        )
        for i, attention in sparse.items()
    ]
    ids = torch.tensor([prompt + output])
    positions = torch.arange(ids.shape[1])[None]
    model(ids, positions, torch.zeros(1, dtype=torch.bool))
    for hook in hooks:
        hook.remove()
    rows = [shares(sparse[i], x, rope, positions) for i, (x, rope) in seen.items()]
    return torch.stack(rows)[:, :, len(prompt) :].mean(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--facts", type=int, default=124)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    model = checkpoints.load_target(args.target).eval()
    speaker = Speaker(model, tokenizer, 2)
    items = evalsets.needles(args.prompts, 2, args.facts)
    right, length, sequences = speaker.needles(items, False, 80)
    print(f"{len(sequences)} needles of {length:.0f} tokens, right: {right:.2f}", flush=True)
    table = torch.stack([measure(model, p, o) for p, o in sequences[::2]]).mean(0)
    print("layer  selected  best  last   (share of full attention's mass)")
    for i, row in enumerate(table.tolist(), model.config.num_dense_layers):
        print(f"{i:5d}  " + "  ".join(f"{v:7.3f}" for v in row))
    local = TinyM3(dataclasses.replace(model.config, topk_blocks=1))
    local.load_state_dict(model.state_dict())
    right, _, sequences = Speaker(local.eval(), tokenizer, 2).needles(items, False, 80)
    print(f"local block only, right: {right:.2f}")
    print(tokenizer.decode(sequences[0][1], skip_special_tokens=False).split(chat_format.EOS)[0])


if __name__ == "__main__":
    main()
