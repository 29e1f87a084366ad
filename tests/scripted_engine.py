"""An engine without a model, for the process around it: python tests/scripted_engine.py [flags].

Token k of answer i to a prompt is a function of prompt, i and k, so that a reader can tell whether
a stream is whole. It obeys max_tokens, aborts and its number of places; nothing stops it earlier.
"""

import argparse
import atexit
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from eaglerun.errors import ConfigError, RankFailed, RequestError
from eaglerun.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Tokens,
)
from eaglerun.server.engine_process import Served, run
from eaglerun.stats import AcceptanceCounter, Builds, EngineStats

FOREVER = 1 << 30


# Where fake_engine's tokenizer, which lists the printable bytes first, has the letter a.
LETTER_A = ord("a") - ord("!")


def token_at(prompt_ids: tuple[int, ...], index: int, k: int) -> int:
    return LETTER_A + (sum(prompt_ids) + 7 * index + k) % 26


def text_of(prompt_ids: tuple[int, ...], index: int, num_tokens: int) -> str:
    """The whole answer."""
    return letters(token_at(prompt_ids, index, k) for k in range(num_tokens))


def letters(token_ids: Iterable[int]) -> str:
    return "".join(chr(id_ + ord("!")) for id_ in token_ids)


def lose(why: str) -> NoReturn:
    """Fail as a rank does whose device hangs: the interpreter cannot end by itself either."""
    atexit.register(threading.Event().wait)
    raise RankFailed(why)


class Answer:
    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.num_tokens = 0
        self.aborted = False
        self.due_s = 0.0
        self.acceptance = AcceptanceCounter()


class ScriptedEngine:
    """Every step gives each running answer one token and ``num_accepted`` drafts before it.

    A step takes at least ``pause_ms``. With ``rate``, answers advance that many times a second,
    each at its own moment, and their text is that moment, time.perf_counter_ns().
    ``raise_at``, ``hang_at`` and ``lose_rank_at`` are steps at which it breaks.
    """

    model_name = "scripted"
    num_draft_tokens = 3

    def __init__(
        self,
        max_num_seqs: int = 256,
        max_model_len: int = FOREVER,
        num_accepted: int = 1,
        raise_at: int = FOREVER,
        hang_at: int = FOREVER,
        lose_rank_at: int = FOREVER,
        pause_ms: int = 0,
        rate: int = 0,
    ) -> None:
        self.max_model_len = max_model_len
        self._rate = rate
        self._num_begun = 0
        self._pause_s = pause_ms / 1e3
        self.stats = EngineStats()
        self.builds = self.idle_builds = Builds()
        self.has_missed = False
        self._places = max_num_seqs
        self._num_accepted = num_accepted
        self._raise_at, self._hang_at, self._lose_rank_at = raise_at, hang_at, lose_rank_at
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_usage(self) -> float:
        return len(self._running) / self._places

    def submit(self, request: Request) -> None:
        if not request.prompt_ids:
            raise RequestError("prompt", "is empty")
        self._waiting += (Answer(request, i) for i in range(request.sampling.n))

    def abort(self, request_id: str) -> bool:
        found = [a for a in (*self._waiting, *self._running) if a.request.request_id == request_id]
        for answer in found:
            answer.aborted = True
        return bool(found)

    def make_missed(self) -> None:
        self.has_missed = False

    def step(self) -> list[Event]:
        if self.stats.steps == self._raise_at:
            raise ZeroDivisionError("a step that cannot be")
        if self.stats.steps == self._lose_rank_at:
            lose("step 5 is not done")
        while self.stats.steps == self._hang_at:
            time.sleep(1.0)
        self.stats.steps += 1
        if self._pause_s:
            time.sleep(self._pause_s)
        while self._waiting and len(self._running) < self._places:
            answer = self._waiting.popleft()
            self.stats.prompt_tokens += len(answer.request.prompt_ids)
            self._running.append(answer)
        events: list[Event] = []
        due = self._running if not self._rate else self._wait_for_due()
        for answer in (*due, *(a for a in self._waiting if a.aborted)):
            events += self._advance(answer)
        if any(type(event) is Finished for event in events):
            self._running = [a for a in self._running if not self._is_done(a)]
            self._waiting = deque(a for a in self._waiting if not a.aborted)
        return events

    def _wait_for_due(self) -> list[Answer]:
        """The next answer that is to advance, when it is, and all that are aborted."""
        now = time.perf_counter()
        period = 1 / self._rate
        for answer in self._running:
            if not answer.due_s:
                self._num_begun += 1
                # Multiples of the golden ratio spread any number of answers over the period.
                answer.due_s = now + period * (0.618034 * self._num_begun % 1)
        answer = min(self._running, key=lambda a: a.due_s)
        due = [a for a in self._running if a is answer or a.aborted]
        if answer.due_s > now:
            time.sleep(answer.due_s - now)
        answer.due_s += period
        return due

    def close(self, message: str = "closed") -> list[Event]:
        ids = dict.fromkeys(a.request.request_id for a in (*self._waiting, *self._running))
        self._waiting.clear()
        self._running = []
        return [Failed(request_id, message) for request_id in ids]

    def _is_done(self, answer: Answer) -> bool:
        return answer.aborted or answer.num_tokens >= (answer.request.sampling.max_tokens or 64)

    def _advance(self, answer: Answer) -> list[Event]:
        request, done, index = answer.request, answer.num_tokens, answer.index
        if answer.aborted:
            return [self._finished(answer, FinishReason.ABORT)]
        left = (request.sampling.max_tokens or 64) - done
        drafts = min(self.num_draft_tokens, left - 1)
        if request.sampling.num_draft_tokens is not None:
            drafts = min(drafts, request.sampling.num_draft_tokens)
        accepted = min(self._num_accepted, drafts)
        ids = tuple([token_at(request.prompt_ids, index, done + i) for i in range(accepted + 1)])
        answer.num_tokens += len(ids)
        self.stats.emitted_tokens += len(ids)
        if drafts:
            answer.acceptance.add(drafts, accepted)
        self.stats.add_decode_row(len(request.prompt_ids) + done, drafts, accepted)
        text = str(time.perf_counter_ns()) if self._rate else letters(ids)
        events: list[Event] = [Tokens(request.request_id, index, ids, text, accepted)]
        if self._is_done(answer):
            events.append(self._finished(answer, FinishReason.LENGTH))
        return events

    def _finished(self, answer: Answer, reason: FinishReason) -> Finished:
        self.stats.finished[reason] = self.stats.finished.get(reason, 0) + 1
        return Finished(
            request_id=answer.request.request_id,
            index=answer.index,
            reason=reason,
            stop_reason=None,
            num_prompt_tokens=len(answer.request.prompt_ids),
            num_output_tokens=answer.num_tokens,
            num_cached_tokens=0,
            seed=0,
            speculation=answer.acceptance.stats(),
        )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--refuse", help="do not start, and say this")
    parser.add_argument("--lose-rank", help="do not start: the rank is lost, and this is why")
    parser.add_argument("--load-from", type=Path, help="start when this pipe has been read")
    parser.add_argument("--die", action="store_true", help="do not start, and say nothing")
    for name, default in (
        ("max-num-seqs", 256),
        ("max-model-len", FOREVER),
        ("num-accepted", 1),
        ("raise-at", FOREVER),
        ("hang-at", FOREVER),
        ("lose-rank-at", FOREVER),
        ("pause-ms", 0),
        ("rate", 0),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    flags = vars(parser.parse_args())
    names = ("checkpoint", "refuse", "lose_rank", "die", "load_from")
    checkpoint, refuse, lose_rank, die, load_from = (flags.pop(name) for name in names)

    def make_engine(config: object, progress: object) -> Served:
        if load_from is not None:
            load_from.read_bytes()
        if die:
            sys.exit(9)
        if refuse is not None:
            raise ConfigError(refuse)
        if lose_rank is not None:
            lose(lose_rank)
        return Served(ScriptedEngine(**flags), checkpoint)

    return run(make_engine)


if __name__ == "__main__":
    sys.exit(main())
