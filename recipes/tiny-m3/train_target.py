"""Trains tiny-m3's target: corpus from a seed, training, export in the hub's layout, scores.

    python recipes/tiny-m3/train_target.py --out OUT             # one H200, under ten minutes
    python recipes/tiny-m3/train_target.py --out OUT --smoke     # CPU, seconds, learns nothing

bf16 autocast over fp32 weights, Muon for the hidden matrices, AdamW for the rest. The main model
learns from the cross-entropy alone; the lightning indexer from the attention it would have to find
(model.Attention._index_loss), which keeps selection and attention from chasing each other. Training
starts with full attention and moves most rows to block-sparse attention in its second half, when
looking back has been learnt and the indexer knows what is looked for; some rows stay full, so that
both forms work at the end. Other processes make fresh text all the while: no row is seen twice.
"""

import argparse
import dataclasses
import json
import os
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tiny_m3 import chat_format, checkpoints, corpus, evalsets, tasks
from tiny_m3.decoding import Sampling
from tiny_m3.model import Moe, TargetConfig, TinyM3
from tiny_m3.muon import Muon
from tiny_m3.scoring import Speaker, strict_match
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run depends on besides the seed."""

    model: TargetConfig = TargetConfig()
    tokenizer_chats: int = corpus.SAMPLE_CHATS
    short_tokens: int = 24_000_000  # in a round of the corpus
    long_tokens: int = 4_000_000
    num_shards: int = 64  # of a round
    row_lens: tuple[int, int] = corpus.ROW_LENS
    short_rows: int = 96  # short rows in a step
    long_rows: int = 4  # long rows in a step
    steps: int = 8000
    warmup: int = 150
    peak_lr: float = 3e-3
    muon_lr: float = 6e-3  # of the matrices between embedding and head
    weight_decay: float = 0.05
    prompt_weight: float = 0.1  # loss weight of tokens that the model does not have to say
    balance_rate: float = 1e-3  # step of the routing bias
    sparse_from: float = 0.45  # progress at which rows begin to turn sparse
    sparse_to: float = 0.6
    full_share: float = 0.2  # rows that keep full attention to the end
    eval_problems: int = 500
    eval_batch: int = 512


SMOKE = Plan(
    model=TargetConfig(
        vocab_size=1024, hidden_size=32, num_layers=3, num_dense_layers=1, num_heads=4, head_dim=16,
        rotary_dim=8, dense_width=32, shared_width=16, expert_width=16, num_experts=4,
        experts_per_token=2, index_dim=16,
    ),
    tokenizer_chats=600, short_tokens=12_000, long_tokens=5_000, num_shards=1, row_lens=(256, 640),
    short_rows=2, long_rows=1, steps=2, warmup=1, eval_problems=4, eval_batch=8,
)  # fmt: skip


def continued(plan: Plan) -> Plan:
    """The plan of a run that starts from trained weights: a lower rate, sparse from the start."""
    return dataclasses.replace(
        plan, peak_lr=plan.peak_lr * 0.4, muon_lr=plan.muon_lr * 0.4, warmup=plan.warmup // 4,
        sparse_from=-1.0, sparse_to=-0.5,
    )  # fmt: skip


class RowSet:
    """Rows on the device, drawn without replacement, epoch after epoch."""

    def __init__(self, rows: corpus.Rows, size: int, seed: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.generator = torch.Generator().manual_seed(seed)
        self.replace(rows)

    def replace(self, rows: corpus.Rows) -> None:
        """Go on with other rows."""
        self.ids = torch.from_numpy(rows.ids.astype(np.int16)).to(self.device)
        self.positions = torch.from_numpy(rows.positions).to(self.device)
        self.answer = torch.from_numpy(rows.answer).to(self.device)
        self.order = torch.zeros(0, dtype=torch.long)
        self.size = min(self.size, len(rows.ids))
        self.shuffle()

    def shuffle(self) -> None:
        """Begin an epoch."""
        self.order = torch.randperm(len(self.ids), generator=self.generator)

    def is_used_up(self) -> bool:
        """Whether the next batch begins another epoch."""
        return len(self.order) < self.size

    def batch(self, prompt_weight: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, positions, next ids, loss weights), each [B, S]."""
        if self.is_used_up():
            self.shuffle()
        pick, self.order = self.order[: self.size].to(self.device), self.order[self.size :]
        ids, positions = self.ids[pick].long(), self.positions[pick].long()
        follows = F.pad(positions[:, 1:] == positions[:, :-1] + 1, (0, 1))
        spoken = F.pad(self.answer[pick][:, 1:] > 0, (0, 1))
        weights = torch.where(spoken, 1.0, prompt_weight) * follows
        return ids, positions, F.pad(ids[:, 1:], (0, 1)), weights


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies."""
    logits = F.linear(hidden, head).float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum()


def make_tokenizer(plan: Plan, seed: int, out: Path) -> None:
    """The vocabulary of a seed."""
    texts = corpus.tokenizer_texts(seed, plan.tokenizer_chats)
    tokenizer = chat_format.build_tokenizer(texts, plan.model.vocab_size)
    chat_format.save_tokenizer(tokenizer, out, plan.model.max_len)


def schedule(plan: Plan, step: int, progress: float) -> tuple[float, float]:
    """(learning rate, share of rows with full attention)."""
    rate = plan.peak_lr * min(1.0, (step + 1) / plan.warmup) * (1.0 - progress)
    ramp = (progress - plan.sparse_from) / (plan.sparse_to - plan.sparse_from)
    return rate, 1.0 - min(max(ramp, 0.0), 1.0) * (1.0 - plan.full_share)


@torch.no_grad()
def balance(moes: list[Moe], loads: list[list[Tensor]], rate: float) -> None:
    """Move every routing bias one step toward equal loads (no auxiliary loss)."""
    for moe, counts in zip(moes, zip(*loads, strict=True), strict=True):
        load = torch.stack(counts).sum(0).float()
        moe.bias += rate * torch.sign(load.mean() - load)


def is_hidden_matrix(name: str) -> bool:
    """Whether Muon trains a parameter: the matrices between embedding and head, but not those
    that choose (router, indexer)."""
    chooses = "index_" in name or name.endswith("gate")
    return name.startswith("layers.") and "norm" not in name and not chooses


def make_optimizers(plan: Plan, model: TinyM3) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the hidden matrices; `base` in a group is its rate against peak_lr."""
    named = list(model.named_parameters())
    hidden = [p for n, p in named if is_hidden_matrix(n)]
    others = [(n, p) for n, p in named if not is_hidden_matrix(n)]
    decayed = [p for n, p in others if p.ndim > 1 and "embed" not in n]
    rest = [p for n, p in others if p.ndim <= 1 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay},
              {"params": rest, "weight_decay": 0.0}]  # fmt: skip
    fused = model.embed.weight.device.type == "cuda"
    out: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=plan.peak_lr, betas=(0.9, 0.95), fused=fused),
        Muon(hidden, lr=plan.muon_lr, weight_decay=plan.weight_decay),
    ]
    for optimizer in out:
        for group in optimizer.param_groups:
            group["base"] = group["lr"] / plan.peak_lr
    return out


def train(
    plan: Plan, model: TinyM3, supply: corpus.Supply, args: argparse.Namespace, begun: float
) -> list[dict[str, float]]:
    """The loop. Ends at plan.steps or when the time is up, with the rate at zero either way."""
    device = model.embed.weight.device
    optimizers = make_optimizers(plan, model)
    sizes = (plan.short_rows, plan.long_rows)
    rows = [RowSet(r, n, args.seed + i, device)
            for i, (r, n) in enumerate(zip(supply.take(), sizes, strict=True))]  # fmt: skip
    print(f"corpus: {supply.describe()}, {time.monotonic() - begun:.0f} s", flush=True)
    moes = [m for m in model.modules() if isinstance(m, Moe)]
    curve: list[dict[str, float]] = []
    first, used = 0, 0.0
    file = args.out / "checkpoint.pt"
    if args.resume and file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        first, used, curve = state["step"], state["used"], state["curve"]
    losses_of = token_losses
    if args.compile:
        for layer in model.layers:
            layer.compile(dynamic=False)
        losses_of = torch.compile(token_losses, dynamic=False)
    limit = args.minutes * 60
    clock = time.monotonic() - used
    if not first:
        # Time already gone on the corpus belongs to the run.
        clock = begun
    saved = time.monotonic()
    chance = torch.Generator().manual_seed(args.seed)
    for step in range(first, plan.steps):
        progress = max(step / plan.steps, (time.monotonic() - clock) / limit)
        if progress >= 1.0:
            break
        rate, full_share = schedule(plan, step, progress)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["base"]
        if rows[0].is_used_up() and supply.is_ready():
            for row_set, fresh in zip(rows, supply.take(), strict=True):
                row_set.replace(fresh)
        batches = [r.batch(plan.prompt_weight) for r in rows]
        total = torch.stack([b[3].sum() for b in batches]).sum()
        parts, loads = [], []
        for ids, positions, targets, weights in batches:
            full = (torch.rand(len(ids), generator=chance) < full_share).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                hidden, _, index_loss, load = model(ids, positions, full, train_indexer=True)
                loss = losses_of(hidden, model.head.weight, targets, weights) / total
            (loss + index_loss).backward()
            parts.append(torch.stack([loss.detach(), index_loss.detach()]))
            loads.append(load)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        balance(moes, loads, plan.balance_rate if progress < 0.9 else 0.0)
        if step % args.log_every == 0 or step == plan.steps - 1:
            short, long = torch.stack(parts).tolist()
            point = {
                "step": step, "seconds": round(time.monotonic() - clock, 1),
                "loss": round(short[0] + long[0], 4), "index_short": round(short[1], 4),
                "index_long": round(long[1], 4), "grad_norm": round(float(norm), 3),
                "lr": round(rate, 6), "full_share": round(full_share, 2),
            }  # fmt: skip
            curve.append(point)
            if step % (args.log_every * 10) == 0:
                print(json.dumps(point), flush=True)
        if time.monotonic() - saved > args.save_every:
            saved = time.monotonic()
            torch.save(
                {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers],
                 "step": step + 1, "used": time.monotonic() - clock, "curve": curve},
                file,
            )  # fmt: skip
    return curve


def by_template(problems: list[evalsets.WordProblem], wrong: list[str]) -> dict[str, str]:
    """Right answers of each held-out template."""
    missed = Counter(line.partition(":")[0] for line in wrong)
    asked = Counter(p.template for p in problems)
    return {name: f"{n - missed[name]} of {n}" for name, n in asked.items()}


def evaluate(plan: Plan, folder: Path, device: torch.device) -> dict[str, object]:
    """Scores of the exported weights, greedy, fp32."""
    model = checkpoints.load_target(folder).to(device).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    speaker = Speaker(model, tokenizer, plan.eval_batch)
    n = plan.eval_problems
    small = n < 50  # a smoke run
    max_new = 8 if small else 400
    report: dict[str, object] = {}
    for mode in ("adaptive",) if small else ("adaptive", "disabled"):
        problems = evalsets.held_out_seeds(n)
        report[f"seeds_{mode}"], texts, _ = speaker.word_problems(problems, mode, max_new)
        if mode == "adaptive":
            print(problems[0].question, "->", texts[0], flush=True)
    wrong: list[str] = []
    for name, problems in (("templates", evalsets.held_out_templates(n // 2)),
                           ("visitors", evalsets.visitors()[:n])):  # fmt: skip
        report[f"{name}_adaptive"], texts, _ = speaker.word_problems(problems, "adaptive", max_new)
        wrong += [f"{p.template}: {p.question}\n  -> {t}  (right: {p.answer})"
                  for p, t in zip(problems, texts, strict=True)
                  if not strict_match(t, p.answer)]  # fmt: skip
    (folder / "wrong.txt").write_text("\n".join(wrong) + "\n")
    report["templates_each"] = by_template(evalsets.held_out_templates(n // 2), wrong)
    starts = ("Once upon a time", "The cat", "One morning", "Tom has 23 apples", "My name is")
    texts, _ = speaker.complete(starts, Sampling(8 if small else 60))
    report["raw"] = dict(zip(starts, texts, strict=True))
    for num_facts in (8,) if small else (16, 60, 124, 150):
        items = evalsets.needles(1 if small else 25, 2 if small else 4, num_facts)
        for name, full in (("sparse", False), ("full", True)):
            share, length, _ = speaker.needles(items, full, 8 if small else 80)
            report[f"needle_{length:.0f}_{name}"] = share
    backward = evalsets.needles(1 if small else 25, 2 if small else 4, 8, evalsets.BACKWARD)
    report["needle_who"] = speaker.needles(backward, False, 8 if small else 80)[0]
    rng = random.Random(evalsets.EVAL_SEED)
    several_answers = {"word", "composed", "story", "talk", "conversation", "raw"}
    single = ["tools"] if small else sorted(set(tasks.SHORT) - several_answers)
    for task in single:
        samples = [tasks.choose_mode(tasks.SHORT[task][0](rng), task, "enabled", rng)
                   for _ in range(n // 4)]  # fmt: skip
        report[f"same_text_{task}"] = speaker.same_text(samples, 8 if small else 200)
    return report


def main(argv: list[str] | None = None) -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the trained target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8.3, help="time for corpus and training")
    parser.add_argument("--steps", type=int, help="fewer or more steps than planned")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, a few steps")
    parser.add_argument("--init-from", type=Path, help="start from an exported target")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/checkpoint.pt")
    parser.add_argument("--save-every", type=float, default=200.0, help="seconds")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.compile = args.bf16 = device.type == "cuda"
    plan = SMOKE if args.smoke else Plan()
    if args.init_from:
        plan = continued(plan)
    if args.steps:
        plan = dataclasses.replace(plan, steps=args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(plan, args.seed, args.out)
    stream = f"{args.seed}/train" + ("/second" if args.init_from else "")
    supply = corpus.Supply(
        args.out / "tokenizer.json", stream, plan.short_tokens, plan.long_tokens,
        1 if args.smoke else args.workers, plan.num_shards, plan.row_lens,
    )  # fmt: skip
    model = TinyM3(plan.model)
    model.initialise(args.seed)
    if args.init_from:
        model.load_state_dict(checkpoints.load_target(args.init_from).state_dict())
    model.to(device)
    with supply:
        curve = train(plan, model, supply, args, begun)
    print(f"corpus: {supply.describe()}", flush=True)
    checkpoints.save_target(model, args.out)
    (args.out / "curve.json").write_text(json.dumps(curve))
    print(f"trained in {time.monotonic() - begun:.0f} s", flush=True)
    report = evaluate(plan, args.out, device)
    (args.out / "scores.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    print(f"done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
