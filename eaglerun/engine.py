"""Engine: submit, abort, step, close. Synchronous, no threads; whoever owns it drives it.

It stands between the scheduler and the rank, and holds no tensor: start.py makes one from a Config.
"""

import logging
import random
import time
from collections import deque
from collections.abc import Callable

from eaglerun.config import Config
from eaglerun.errors import EngineError, RequestError
from eaglerun.messages import MAX_LOGIT_BIAS, MAX_STOP_IDS, Event, Request
from eaglerun.plan.scheduler import Scheduler
from eaglerun.plan.sequence import Sequence
from eaglerun.plan.step import STEP_TIMEOUT_S, StepPlan, StepResult
from eaglerun.plan.text import TextStream
from eaglerun.ranks.rank import HiddenRows, Pending, Rank, RankReady
from eaglerun.stats import AcceptanceLog, Builds, EngineStats

log = logging.getLogger("eaglerun")


class Engine:
    """One engine: a scheduler, a rank, and the steps between them.

    ``lag`` steps are launched before the oldest is committed; lag 0 is the reference for lag 1.
    """

    def __init__(self, config: Config, ready: RankReady, scheduler: Scheduler, rank: Rank) -> None:
        """``rank`` has allocated what ``scheduler`` hands out; ``ready`` is what it told.

        Raises  ConfigError where the settings ask for several ranks.
        """
        config.check_one_rank()
        self.config = config
        self.model_name = ready.model_name
        self.tokenizer = ready.tokenizer
        self.path = ready.path
        self.on_gpu = ready.on_gpu
        self.vocab_size = ready.vocab_size
        self.eos_token_ids = ready.eos_token_ids
        self.num_draft_tokens = scheduler.limits.num_draft_tokens
        self.max_model_len = scheduler.limits.max_model_len
        self.pool = scheduler.pool
        self.scheduler = scheduler
        self.rank = rank
        lag = config.scheduling.lag
        self._lag = int(ready.on_gpu) if lag is None else lag
        self._pending: deque[Pending] = deque()
        self._arrivals = 0
        self._seeds = random.Random(config.model.seed)
        self._acceptance_log = AcceptanceLog(config.output.log_stats_every, time.monotonic())
        # Hidden states by (request_id, index), with return_aux_hidden_states; whoever asked for
        # them takes them out.
        self.aux: dict[tuple[str, int], list[HiddenRows]] = {}
        # Sees every committed step; for measurements.
        self.observer: Callable[[StepPlan, StepResult], None] | None = None

    @property
    def stats(self) -> EngineStats:
        return self.scheduler.stats

    @property
    def builds(self) -> Builds:
        """Kernels and graphs that its rank has made so far."""
        return self.rank.builds()

    @property
    def idle_builds(self) -> Builds:
        """Those of builds that were made in make_missed()."""
        return self.rank.idle_builds()

    @property
    def has_missed(self) -> bool:
        """True where steps did without something that can be made for the next ones."""
        return self.rank.has_missed

    def make_missed(self) -> None:
        """Make one such thing, which takes up to a second. EngineError where there is work."""
        if self.has_work:
            raise EngineError("what steps missed is made while there is no work")
        self.rank.make_missed()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._pending)

    @property
    def num_running(self) -> int:
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self.scheduler.num_waiting

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that running sequences hold."""
        return self.pool.num_held / self.pool.num_blocks

    def submit(self, request: Request) -> None:
        """Queue a request. RequestError if it can never run; nothing is queued then."""
        self.check(request)
        sampling = request.sampling
        seed = sampling.seed
        if seed is None:
            seed = self._seeds.getrandbits(62)
        leader: Sequence | None = None
        for index in range(sampling.n):
            text = None
            if self.tokenizer is not None:
                text = TextStream(
                    self.tokenizer,
                    sampling.stop,
                    sampling.include_stop_str_in_output,
                    sampling.skip_special_tokens,
                )
            seq = Sequence(request, index, _wrap(seed + index), self._arrivals, text)
            if self.scheduler.limits.prefix_caching:
                seq.leader = leader
            leader = leader or seq
            self.scheduler.add(seq)
        self._arrivals += 1

    def abort(self, request_id: str) -> bool:
        """End a request; its Finished events come with the next step. Whether it was open."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[Event]:
        """Plan and launch one step, commit what is due, and return what became final.

        [] when there is nothing to do. Errors of the models or of the bookkeeping are the
        caller's to turn into close().
        """
        plan = self.scheduler.plan()
        if plan is not None:
            self._pending.append(self.rank.launch(plan))
        events: list[Event] = []
        if self._pending and (plan is None or len(self._pending) > self._lag):
            events += self._commit(self._pending.popleft())
        events += self.scheduler.take_events()
        return events

    def close(self, message: str = "the engine was shut down") -> list[Event]:
        """Fail every open request and forget the steps in flight.

        The engine takes new requests; after RankFailed it would only launch them on a device that
        hangs, so whoever owns it lets it go.
        """
        self._pending.clear()
        return self.scheduler.fail_all(message)

    def _commit(self, pending: Pending) -> list[Event]:
        result = pending.result(STEP_TIMEOUT_S)
        if self.config.output.return_aux_hidden_states:
            slots = self.scheduler.oldest_slots()
            for rows in pending.aux:
                seq = slots[rows.slot_id]
                self.aux.setdefault((seq.request.request_id, seq.index), []).append(rows)
        events = self.scheduler.commit(result)
        self.stats.target_ms += result.times.target_ms
        self.stats.draft_ms += result.times.draft_ms
        self.stats.step_ms += result.times.total_ms
        if self.observer is not None:
            self.observer(pending.plan, result)
        line = self._acceptance_log.line(self.stats.acceptance.stats(), time.monotonic())
        if line is not None:
            log.info(line)
        return events

    def check(self, request: Request) -> None:
        """RequestError if the request can never run here."""
        sampling, prompt = request.sampling, request.prompt_ids
        if not prompt:
            raise RequestError("prompt", "is empty")
        if any(type(token) is not int for token in prompt):
            raise RequestError("prompt", "holds something that is not a token id")
        try:
            request.cache_salt.encode()
        except UnicodeEncodeError:
            raise RequestError("cache_salt", f"{request.cache_salt!r} is not text") from None
        worst = max(prompt)
        if worst >= self.vocab_size or min(prompt) < 0:
            bad = worst if worst >= self.vocab_size else min(prompt)
            raise RequestError("prompt", f"token id {bad} is not in [0, {self.vocab_size})")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                "prompt",
                f"{len(prompt)} tokens leave no room for an answer: the model's length is "
                f"{self.max_model_len}",
            )
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop", "stop strings need a tokenizer, and the model has none")
        for name, ids in (
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", tuple(sampling.logit_bias)),
        ):
            for token in ids:
                if token >= self.vocab_size:
                    raise RequestError(name, f"{token} is not in [0, {self.vocab_size})")
        if len(sampling.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError(
                "stop_token_ids", f"{len(sampling.stop_token_ids)} given, allowed {MAX_STOP_IDS}"
            )
        if len(sampling.logit_bias) > MAX_LOGIT_BIAS:
            raise RequestError(
                "logit_bias", f"{len(sampling.logit_bias)} given, allowed {MAX_LOGIT_BIAS}"
            )
        for name, count in (
            ("logprobs", sampling.logprobs),
            ("prompt_logprobs", sampling.prompt_logprobs),
        ):
            if count is not None and count > self.vocab_size:
                raise RequestError(name, f"{count} exceeds the vocabulary, {self.vocab_size}")
        if self.scheduler.is_open(request.request_id):
            raise RequestError("request_id", f"{request.request_id!r} is already running")


def _wrap(seed: int) -> int:
    """A seed as a signed 64-bit integer."""
    return (seed + 2**63) % 2**64 - 2**63
