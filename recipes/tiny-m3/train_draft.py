"""Trains an EAGLE3 draft for a target of M3's architecture on the target's own outputs.

    python recipes/tiny-m3/train_draft.py --target OUT --out DRAFT      # one H200, minutes
    python recipes/tiny-m3/train_draft.py --target OUT --out DRAFT --smoke

The target continues prompts of every task, half of them greedily, half at temperature 1. The
draft then learns with EAGLE3's training-time test: `--passes` chained steps from every position,
each fed with the draft's own state of the step before (draft.Eagle3Draft.passes), against the
target's distribution. For another target give its folder and `--prompts` (JSON lines with
`messages`); sizes of the draft follow those of the target.
"""

import argparse
import copy
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_m3 import checkpoints, evalsets, outputs, tasks
from tiny_m3.corpus import ROW_LENS, Rows
from tiny_m3.decoding import Sampling
from tiny_m3.draft import DraftConfig, Eagle3Draft
from tiny_m3.model import TinyM3
from tiny_m3.scoring import Speaker, acceptance
from tokenizers import Tokenizer
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run depends on besides target and seed."""

    short_prompts: int = 100_000
    long_prompts: int = 1_500
    max_new: int = 320
    speak_batch: int = 6144
    row_lens: tuple[int, int] = ROW_LENS
    short_rows: int = 64  # short rows in a step
    long_rows: int = 4  # long rows, every long_every steps
    long_every: int = 6
    passes: int = 5
    pass_decay: float = 0.9  # weight of a pass against the one before
    steps: int = 6000
    warmup: int = 100
    peak_lr: float = 1.5e-3
    weight_decay: float = 0.01
    eval_each: int = 200


SMOKE = Plan(
    short_prompts=6, long_prompts=1, max_new=8, speak_batch=16, row_lens=(400, 640),
    short_rows=1, long_rows=1,
    long_every=2, passes=3, steps=2, warmup=1, eval_each=2,
)  # fmt: skip


def default_taps(num_layers: int) -> tuple[int, int, int]:
    """Early, middle, late. M3's (2, 30, 57) of 60 end at nine tenths of the depth, and so do
    these; the usual L - 3 would lie before the last third of a target of eight layers."""
    if num_layers < 6:
        raise ValueError(f"no default taps for {num_layers} layers: give --taps")
    return (2, num_layers // 2, num_layers - 1)


def draft_config_for(
    target: TinyM3, taps: tuple[int, ...] | None, width: int | None
) -> DraftConfig:
    """A draft that fits the target: same heads and embedding width, MLP one and a half as wide."""
    c = target.config
    return DraftConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        taps=taps or default_taps(c.num_layers), width=width or c.hidden_size * 3 // 2,
        num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim,
        rope_theta=c.rope_theta, max_len=c.max_len, norm_eps=c.norm_eps,
    )  # fmt: skip


@dataclass(slots=True)
class Batch:
    """One step's rows. Row r of the draft holds token r + 1 and judges token r + 2."""

    ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    next_ids: Tensor  # [B, S]
    weights: Tensor  # [B, S], 1 where token r + 2 was generated in the same chat


class RowSet:
    """Rows on the device, drawn without replacement, epoch after epoch."""

    def __init__(self, rows: Rows, size: int, seed: int, device: torch.device) -> None:
        self.ids = torch.from_numpy(rows.ids.astype(np.int16)).to(device)
        self.positions = torch.from_numpy(rows.positions).to(device)
        self.answer = torch.from_numpy(rows.answer).to(device)
        self.size = min(size, len(rows.ids))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.zeros(0, dtype=torch.long)

    def __bool__(self) -> bool:
        return len(self.ids) > 0

    def draw(self) -> Batch:
        """The next batch."""
        if len(self.order) < self.size:
            self.order = torch.randperm(len(self.ids), generator=self.generator)
        pick, self.order = self.order[: self.size].to(self.ids.device), self.order[self.size :]
        ids, positions = self.ids[pick].long(), self.positions[pick].long()
        same = F.pad(positions[:, 2:] == positions[:, :-2] + 2, (0, 2))
        spoken = F.pad(self.answer[pick][:, 2:] > 0, (0, 2))
        return Batch(ids, positions, F.pad(ids[:, 1:], (0, 1)), (same & spoken).float())


def pass_loss(state: Tensor, head: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """(cross-entropy against `wanted` [B, S, V], hits of the arg max), weighted sums."""
    logits = F.linear(state, head).float()
    losses = -(wanted.float() * logits.log_softmax(-1)).sum(-1)
    hits = logits.argmax(-1) == wanted.argmax(-1)
    return torch.stack([(losses * weights).sum(), (hits * weights).sum()])


class Trainer:
    """Target, draft and the compiled pieces of a step."""

    def __init__(self, plan: Plan, target: TinyM3, draft: Eagle3Draft, fast: bool) -> None:
        # A copy, for the compiled one must not be asked for other shapes.
        self.target = copy.deepcopy(target)
        self.plan, self.draft, self.fast = plan, draft, fast
        self.run_layer: Any = draft.layers[0]
        self.loss: Any = pass_loss
        if fast:
            torch._dynamo.config.recompile_limit = 32
            self.run_layer = torch.compile(draft.layers[0].forward, dynamic=False)
            self.loss = torch.compile(pass_loss, dynamic=False)
            for layer in self.target.layers:
                layer.compile(dynamic=False)

    def losses(self, batch: Batch, compiled: bool) -> Tensor:
        """[passes, 2]: mean loss and hit rate of every pass."""
        device = batch.ids.device
        full = torch.zeros(len(batch.ids), dtype=torch.bool, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.fast):
            with torch.no_grad():
                hidden, taps, _, _ = self.target(
                    batch.ids, batch.positions, full, taps=self.draft.config.taps
                )
                # Row r is judged by what the target says on row r + 1.
                wanted = self.target.head(F.pad(hidden[:, 1:], (0, 0, 0, 1))).softmax(-1)
                wanted = wanted.to(torch.bfloat16 if self.fast else torch.float32)
            states = self.draft.passes(
                batch.next_ids, taps, batch.positions, self.plan.passes,
                self.run_layer if compiled else None,
            )  # fmt: skip
            loss = self.loss if compiled else pass_loss
            rows = []
            for s, state in enumerate(states):
                weights = batch.weights * (batch.positions >= s)
                terms = loss(state, self.draft.lm_head.weight, wanted, weights)
                rows.append(terms / weights.sum().clamp(min=1))
        return torch.stack(rows)


def train(
    plan: Plan, trainer: Trainer, rows: tuple[RowSet, RowSet], minutes: float, begun: float
) -> list[dict[str, Any]]:
    """The loop; the learning rate falls to zero at plan.steps or when the time is up.

    The clock of the rate starts after the first step: generation and compilation take more than
    half of the time, and a rate that had fallen meanwhile would leave little to learn with.
    """
    draft = trainer.draft
    matrices = [p for p in draft.parameters() if p.ndim > 1]
    vectors = [p for p in draft.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": plan.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=plan.peak_lr, betas=(0.9, 0.95), fused=trainer.fast,
    )  # fmt: skip
    decay = torch.tensor([plan.pass_decay**s for s in range(plan.passes)])
    decay = (decay / decay.sum()).to(draft.fc.weight.device)
    curve: list[dict[str, Any]] = []
    short, long = rows
    start = end = begun + minutes * 60
    for step in range(plan.steps):
        if step == 1:
            start = time.monotonic()
        gone = (time.monotonic() - start) / max(end - start, 1e-9) if step else 0.0
        progress = max(step / plan.steps, gone)
        if progress >= 1.0:
            break
        rate = plan.peak_lr * min(1.0, (step + 1) / plan.warmup) * (1.0 - progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        terms = trainer.losses(short.draw(), trainer.fast)
        (terms[:, 0] * decay).sum().backward()
        if long and step % plan.long_every == 0:
            extra = trainer.losses(long.draw(), False)
            (extra[:, 0] * decay).sum().mul(0.5).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0 or step == plan.steps - 1:
            values = terms.detach().tolist()
            point = {
                "step": step, "seconds": round(time.monotonic() - begun, 1), "lr": round(rate, 6),
                "loss": [round(v[0], 4) for v in values], "hits": [round(v[1], 4) for v in values],
            }  # fmt: skip
            curve.append(point)
            if step % 250 == 0:
                print(json.dumps(point), flush=True)
    return curve


def evaluate(plan: Plan, speaker: Speaker, draft: Eagle3Draft) -> dict[str, Any]:
    """Acceptance on greedy outputs for held-out prompts, by task; K = 3 unless named."""
    n, small = plan.eval_each, plan.eval_each < 50
    max_new = 8 if small else 400
    report: dict[str, Any] = {}

    def measure(name: str, sequences: list[tuple[list[int], list[int]]], k: int = 3) -> None:
        batch = 4 if small or "needle" in name else 64
        report[name] = acceptance(speaker.model, draft, sequences, k, batch).report()

    for mode in ("adaptive", "disabled"):
        _, _, sequences = speaker.word_problems(evalsets.held_out_seeds(n), mode, max_new)
        measure(f"word_problems_{mode}", sequences)
        if mode == "adaptive":
            for k in (1,) if small else (1, 2, 4, 5, 7):
                measure(f"word_problems_k{k}", sequences, k)
    _, _, sequences = speaker.word_problems(evalsets.held_out_templates(n), "adaptive", max_new)
    measure("held_out_templates", sequences)
    if not small:
        _, _, sequences = speaker.needles(evalsets.needles(12, 4, 124), False, 80)
        measure("needle_1500", sequences)
    rng = random.Random(evalsets.EVAL_SEED + "/draft")
    for task in ("sum",) if small else outputs.SHARES:
        if task == "word":
            continue
        samples = [tasks.choose_mode(tasks.SHORT[task][0](rng), task, "adaptive", rng)
                   for _ in range(n)]  # fmt: skip
        prompts = [s.prompts()[0] for s in samples]
        _, sequences = speaker.complete(prompts, Sampling(max_new))
        measure(task, sequences)
        if task == "story":
            _, sequences = speaker.complete(prompts, Sampling(max_new, temperature=1.0, seed=5))
            measure("story_sampled", sequences)
    return report


def main(argv: list[str] | None = None) -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, required=True, help="folder of the target")
    parser.add_argument("--out", type=Path, required=True, help="folder for the draft")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=6.0, help="time until training ends")
    parser.add_argument("--prompts", type=Path, help="JSON lines; default: our generator")
    parser.add_argument("--taps", type=int, nargs="+", help="target layers whose input is tapped")
    parser.add_argument("--width", type=int, help="width of the MLP")
    parser.add_argument("--init-from", type=Path, help="go on from an exported draft")
    parser.add_argument("--smoke", action="store_true", help="tiny run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args(argv)
    plan = SMOKE if args.smoke else Plan()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = device.type == "cuda"
    target = checkpoints.load_target(args.target).to(device).eval().requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    speaker = Speaker(target, tokenizer, plan.speak_batch)
    if args.prompts:
        prompts = outputs.read_prompts(args.prompts)
    else:
        prompts = outputs.make_prompts(
            f"{args.seed}/draft", plan.short_prompts, plan.long_prompts,
            1 if args.smoke else args.workers,
        )  # fmt: skip
    print(f"{len(prompts)} prompts, {time.monotonic() - begun:.0f} s", flush=True)
    torch.set_float32_matmul_precision("high")
    short, long, stats = outputs.speak(speaker, prompts, plan.max_new, args.seed, plan.row_lens)
    torch.set_float32_matmul_precision("highest")
    print(json.dumps(stats), short.ids.shape, long.ids.shape, f"{time.monotonic() - begun:.0f} s")
    taps = tuple(args.taps) if args.taps else None
    draft = Eagle3Draft(draft_config_for(target, taps, args.width))
    draft.initialise(target.embed.weight.cpu(), target.head.weight.cpu(), args.seed)
    if args.init_from:
        draft.load_state_dict(checkpoints.load_draft(args.init_from).state_dict())
    draft.to(device)
    rows = (
        RowSet(short, plan.short_rows, args.seed, device),
        RowSet(long, plan.long_rows, args.seed + 1, device),
    )
    curve = train(plan, Trainer(plan, target, draft, fast), rows, args.minutes, begun)
    checkpoints.save_draft(draft, args.out)
    (args.out / "curve.json").write_text(json.dumps(curve))
    print(f"trained in {time.monotonic() - begun:.0f} s", flush=True)
    exported = checkpoints.load_draft(args.out).to(device).eval()
    report = evaluate(plan, speaker, exported)
    (args.out / "acceptance.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))
    print(f"done in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
