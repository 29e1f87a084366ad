"""From a seed to packed rows of token ids, made by every core of the machine at once.

Rows have two lengths, so that attention over the many short chats does not cost what the few long
ones need. Each chat starts at a multiple of BLOCK, where its key blocks would start if it stood
alone: block-sparse attention sees in training what it sees in serving.
"""

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from tiny_m3 import chat_format, tasks

BLOCK = 16
ROW_LENS = (512, 2048)  # of short rows, of long rows
SAMPLE_CHATS = 12_000  # chats from which the vocabulary is learnt


@dataclass(frozen=True, slots=True)
class Rows:
    """Packed chats, each array [R, S].

    ids        uint16 token ids; filled up with eos
    positions  int16 position inside its chat; a filler token is a chat of its own (position 0)
    answer     uint8, 1 where the token belongs to an assistant turn after the last user turn
    """

    ids: np.ndarray
    positions: np.ndarray
    answer: np.ndarray

    @staticmethod
    def join(parts: list["Rows"]) -> "Rows":
        """All rows of several shards."""
        return Rows(
            np.concatenate([p.ids for p in parts]),
            np.concatenate([p.positions for p in parts]),
            np.concatenate([p.answer for p in parts]),
        )


def tokenizer_texts(seed: int, num_chats: int) -> Iterator[str]:
    """The chats from which the vocabulary is learnt."""
    rng = random.Random(f"{seed}/tokenizer")
    for _ in range(num_chats):
        yield tasks.draw(tasks.SHORT, rng).text()


def answer_mask(
    ids: np.ndarray, turn: int, eos: int, ai: np.ndarray, user: np.ndarray
) -> np.ndarray:
    """1 on the tokens of the assistant turns after the last user turn, their eos included.

    ai and user are the token ids of the role lines that follow `turn`.
    """
    mask = np.zeros(len(ids), np.uint8)
    turns = np.flatnonzero(ids == turn).tolist()
    if not turns:  # a text without a chat: all of it is the answer
        return np.ones(len(ids), np.uint8)

    def is_role(at: int, role: np.ndarray) -> bool:
        return np.array_equal(ids[at + 1 : at + 1 + len(role)], role)

    last_user = max((t for t in turns if is_role(t, user)), default=-1)
    ends = np.flatnonzero(ids == eos)
    for t in turns:
        if t > last_user and is_role(t, ai):
            start = t + 1 + len(ai)
            mask[start : ends[ends >= start][0] + 1] = 1
    return mask


def _next_block(used: int) -> int:
    """The first multiple of BLOCK from `used` on."""
    return -(-used // BLOCK) * BLOCK


class Packer:
    """Best-fit packing of chats into rows of one length, with a few rows open at a time."""

    NUM_OPEN = 16

    def __init__(self, length: int, eos: int) -> None:
        self.length, self.eos = length, eos
        self.rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.open: list[tuple[int, int]] = []  # (tokens used, row), the fullest last

    def add(self, ids: np.ndarray, answer: np.ndarray) -> None:
        """Place one chat; one longer than a row is a ValueError."""
        if len(ids) > self.length:
            raise ValueError(f"a chat of {len(ids)} tokens does not fit a row of {self.length}")
        fitting = [o for o in self.open if _next_block(o[0]) + len(ids) <= self.length]
        if fitting:
            used, row = fitting[-1]
            self.open.remove((used, row))
        else:
            used, row = 0, len(self.rows)
            self.rows.append(
                (
                    np.full(self.length, self.eos, np.uint16),
                    np.zeros(self.length, np.int16),
                    np.zeros(self.length, np.uint8),
                )
            )
        start = _next_block(used)
        stop = start + len(ids)
        row_ids, row_positions, row_answer = self.rows[row]
        row_ids[start:stop] = ids
        row_positions[start:stop] = np.arange(len(ids))
        row_answer[start:stop] = answer
        self.open.append((stop, row))
        self.open.sort()
        if len(self.open) > self.NUM_OPEN:
            self.open.pop()

    def pack(self) -> Rows:
        """The rows so far."""
        if not self.rows:
            empty = np.zeros((0, self.length))
            return Rows(empty.astype(np.uint16), empty.astype(np.int16), empty.astype(np.uint8))
        return Rows(*(np.stack([r[i] for r in self.rows]) for i in range(3)))


@dataclass(frozen=True, slots=True)
class Shard:
    """What one worker makes: at least so many tokens of each pool of tasks."""

    tokenizer_file: str
    seed: str
    number: int
    short_tokens: int
    long_tokens: int
    row_lens: tuple[int, int] = ROW_LENS


def make_shard(shard: Shard) -> tuple[Rows, Rows, int]:
    """Short rows, long rows, bytes of text. A chat longer than a long row is left out."""
    tokenizer = Tokenizer.from_file(shard.tokenizer_file)
    turn, eos = (chat_format.id_of(tokenizer, t) for t in (chat_format.TURN, chat_format.EOS))
    ai = np.array(tokenizer.encode("ai\n").ids, np.uint16)
    user = np.array(tokenizer.encode("user\n").ids, np.uint16)
    num_bytes = 0
    short_len, long_len = shard.row_lens
    packers = Packer(short_len, eos), Packer(long_len, eos)
    rng = random.Random(f"{shard.seed}/{shard.number}")
    for pool, goal in ((tasks.SHORT, shard.short_tokens), (tasks.LONG, shard.long_tokens)):
        done = 0
        while done < goal:
            texts = [tasks.draw(pool, rng).text() for _ in range(64)]
            num_bytes += sum(len(t) for t in texts)
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array(encoding.ids, np.uint16)
                done += len(ids)
                if len(ids) > long_len:
                    continue
                packer = packers[0] if len(ids) <= short_len else packers[1]
                packer.add(ids, answer_mask(ids, turn, eos, ai, user))
    return packers[0].pack(), packers[1].pack(), num_bytes


class Supply:
    """Rounds of fresh rows: while a model trains on one, other processes make the next.

    Round r is the same whatever the number of workers; how many rounds there are, the clock says.
    """

    def __init__(
        self,
        tokenizer_file: Path,
        seed: str,
        short_tokens: int,
        long_tokens: int,
        num_workers: int,
        num_shards: int,
        row_lens: tuple[int, int],
    ) -> None:
        self.file, self.seed, self.row_lens = str(tokenizer_file), seed, row_lens
        self.goals, self.num_shards = (short_tokens, long_tokens), num_shards
        self.num_rounds = self.num_bytes = self.num_tokens = 0
        self.pool = (
            multiprocessing.get_context("spawn").Pool(num_workers) if num_workers > 1 else None
        )
        self.pending = self._start()

    def _start(self) -> AsyncResult[list[tuple[Rows, Rows, int]]] | None:
        """Begin the next round in the background."""
        return self.pool.map_async(make_shard, self._jobs(), chunksize=1) if self.pool else None

    def _jobs(self) -> list[Shard]:
        short, long = (goal // self.num_shards for goal in self.goals)
        seed = f"{self.seed}/{self.num_rounds}"
        return [Shard(self.file, seed, i, short, long, self.row_lens)
                for i in range(self.num_shards)]  # fmt: skip

    def is_ready(self) -> bool:
        """Whether `take` would not wait."""
        return self.pending is not None and self.pending.ready()

    def take(self) -> tuple[Rows, Rows]:
        """The next round's short and long rows."""
        shards = [make_shard(j) for j in self._jobs()] if self.pending is None else (
            self.pending.get())  # fmt: skip
        self.num_rounds += 1
        self.pending = self._start()
        short, long, sizes = zip(*shards, strict=True)
        rows = Rows.join(list(short)), Rows.join(list(long))
        self.num_bytes += sum(sizes)
        self.num_tokens += sum(int((r.positions > 0).sum()) for r in rows)
        return rows

    def describe(self) -> str:
        """What was taken so far."""
        return (
            f"{self.num_rounds} rounds, {self.num_bytes / 1e6:.0f} MB of text, "
            f"{self.num_tokens / 1e6:.1f} M tokens"
        )

    def __enter__(self) -> "Supply":
        return self

    def __exit__(self, *args: object) -> None:
        if self.pool:
            self.pool.terminate()
