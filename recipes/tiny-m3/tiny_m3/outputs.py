"""What a draft learns from: prompts of every task and the target's own continuations."""

import json
import multiprocessing
import random
from pathlib import Path

import numpy as np

from tiny_m3 import chat_format, tasks
from tiny_m3.corpus import Packer, Rows
from tiny_m3.decoding import Sampling
from tiny_m3.scoring import Speaker

# Word problems weigh more than in the target's own training, and so do letters and repeated words,
# which a draft finds hard.
SHARES = {"word": 24, "composed": 26, "sum": 5, "story": 9, "world": 3, "world_text": 3,
          "needle": 4, "json": 5, "tools": 6, "code": 5, "talk": 3, "spelling": 4, "repeat": 7,
          "lookup": 3, "conversation": 3, "raw": 5}  # fmt: skip
SHARD_PROMPTS = 1000


def _prompt_shard(job: tuple[str, int, bool]) -> list[str]:
    seed, shard, long = job
    rng = random.Random(f"{seed}/{shard}")
    if long:
        pool = tasks.LONG
    else:
        pool = {task: (tasks.SHORT[task][0], share) for task, share in SHARES.items()}
    return [rng.choice(tasks.draw(pool, rng).prompts()) for _ in range(SHARD_PROMPTS)]


def make_prompts(seed: str, num_short: int, num_long: int, num_workers: int) -> list[str]:
    """Rendered prompts; those of long rows are appended."""
    counts = (num_short, num_long)
    jobs = [
        (f"{seed}/{'long' if long else 'short'}", i, bool(long))
        for long, count in enumerate(counts)
        for i in range(-(-count // SHARD_PROMPTS))
    ]
    if num_workers <= 1:
        shards = [_prompt_shard(j) for j in jobs]
    else:
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            shards = pool.map(_prompt_shard, jobs, chunksize=1)
    out: list[str] = []
    for long, count in enumerate(counts):
        texts = [t for job, s in zip(jobs, shards, strict=True) if job[2] == bool(long) for t in s]
        out += texts[:count]
    return out


def read_prompts(file: Path) -> list[str]:
    """Prompts of another target: JSON lines with messages and, if wanted, tools and
    thinking_mode."""
    out = []
    for line in file.read_text().splitlines():
        item = json.loads(line)
        out.append(
            chat_format.render(
                item["messages"],
                tools=item.get("tools"),
                thinking_mode=item.get("thinking_mode", "adaptive"),
                add_generation_prompt=True,
            )
        )
    return out


def speak(
    speaker: Speaker, prompts: list[str], max_new: int, seed: int, row_lens: tuple[int, int]
) -> tuple[Rows, Rows, dict[str, int]]:
    """Continuations packed into short and long rows: half greedy, half at temperature 1.

    Rows.answer marks the generated tokens.
    """
    packers = Packer(row_lens[0], speaker.eos), Packer(row_lens[1], speaker.eos)
    greedy, drawn = prompts[::2], prompts[1::2]
    sampled = Sampling(max_new, temperature=1.0, seed=seed)
    num_tokens = unfinished = 0
    sequences: list[tuple[list[int], list[int]]] = []
    for part, sampling in ((greedy, Sampling(max_new)), (drawn, sampled)):
        sequences += speaker.complete(part, sampling)[1]
    random.Random(seed).shuffle(sequences)
    for prompt, output in sequences:
        num_tokens += len(output)
        unfinished += output[-1] != speaker.eos
        ids = np.array(prompt + output, np.uint16)
        if len(ids) > row_lens[1]:
            continue
        answer = np.zeros(len(ids), np.uint8)
        answer[len(prompt) :] = 1
        packers[0 if len(ids) <= row_lens[0] else 1].add(ids, answer)
    stats = {"sequences": len(sequences), "tokens": num_tokens, "unfinished": unfinished}
    return packers[0].pack(), packers[1].pack(), stats
