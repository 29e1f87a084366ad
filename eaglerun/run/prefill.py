"""The prefill part of a step: chunks of prompts in one ragged forward, and the token after each
chunk that ends its prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from eaglerun.kernels.draft_inputs import kv_slots_of
from eaglerun.kernels.launch import invariant
from eaglerun.kernels.rows import Rows
from eaglerun.plan.step import PrefillChunk, StepPlan
from eaglerun.run.parts import Parts
from eaglerun.run.pending import AuxRows, Clock, Prefilled, PromptLogprobs
from eaglerun.sampling import LogprobRows, logprobs_of
from eaglerun.speculative.drafter import Asked, Drafter
from eaglerun.staging import host_tensor, to_host


@dataclass(frozen=True, slots=True)
class _Batch:
    """The chunks of a plan, their rows one after the other.

    starts  where each chunk's rows begin, and the end of all
    """

    chunks: tuple[PrefillChunk, ...]
    starts: list[int]
    ids: Tensor  # [N]
    slots: Tensor  # [chunks]
    ends: Tensor  # [chunks], the last row of each
    rows: Rows


@dataclass(frozen=True, slots=True)
class _First:
    """The chunks that end their prompt, and the token after each.

    which   [final] int64, which of the batch's chunks they are
    length  [final] int64, of the prompt: where the token stands
    """

    chunks: list[PrefillChunk]
    which: Tensor
    slots: Tensor
    length: Tensor
    tokens: Tensor
    logprobs: LogprobRows | None


class Prefill:
    """Runs the prefill chunks of plans."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def run(self, plan: StepPlan, aux: list[AuxRows], clock: Clock) -> Prefilled:
        """``aux`` takes the captured hidden states, where they are kept."""
        parts = self._parts
        clock.start()
        batch = self._batch(plan.prefill)
        with invariant(parts.options.batch_invariant):
            hidden = parts.target(batch.ids, batch.rows, parts.target_kv, parts.aux, None)
            prompt = self._prompt_logprobs(batch, hidden)
            first = self._first(plan, batch, hidden)
        broken = self._broken(batch, hidden)
        clock.target_done()
        if parts.options.keep_aux and parts.aux is not None:
            for c, start in zip(batch.chunks, batch.starts, strict=False):
                kept = parts.aux[:, start : start + len(c.token_ids)].clone()
                aux.append(AuxRows(c.slot_id, c.start, kept))
        drafts = None
        if parts.drafter is not None:
            drafts = self._draft(parts.drafter, batch, first)
        clock.draft_done()
        told = None if drafts is None else to_host(drafts)
        if first is None:
            none = torch.zeros(0, dtype=torch.int64)
            return Prefilled(none, to_host(broken), None, prompt, told)
        return Prefilled(to_host(first.tokens), to_host(broken), first.logprobs, prompt, told)

    def _batch(self, chunks: tuple[PrefillChunk, ...]) -> _Batch:
        device, starts = self._parts.device, [0]
        for c in chunks:
            starts.append(starts[-1] + len(c.token_ids))
        positions = host_tensor([p for c in chunks for p in range(c.start, c.end)], device)
        q_lens = tuple(len(c.token_ids) for c in chunks)
        seq_ids = host_tensor([i for i, n in enumerate(q_lens) for _ in range(n)], device)
        slots = host_tensor([c.slot_id for c in chunks], device)
        table = self._parts.state.block_table[slots]
        kv_slots = kv_slots_of(positions[:, None], table[seq_ids], self._parts.options.block_size)
        rows = Rows(
            positions=positions,
            kv_slots=kv_slots[:, 0],
            block_tables=table,
            seq_lens=host_tensor([c.end for c in chunks], device).int(),
            max_seq_len=max(c.end for c in chunks),
            cu_seqlens=host_tensor(starts, device).int(),
            q_lens=q_lens,
        )
        ids = host_tensor([t for c in chunks for t in c.token_ids], device)
        ends = host_tensor([end - 1 for end in starts[1:]], device)
        return _Batch(chunks, starts, ids, slots, ends, rows)

    def _first(self, plan: StepPlan, batch: _Batch, hidden: Tensor) -> _First | None:
        """The token after each chunk that ends its prompt; its sequence becomes a decode one."""
        final = [i for i, c in enumerate(batch.chunks) if c.samples]
        if not final:
            return None
        parts, state = self._parts, self._parts.state
        chunks = [batch.chunks[i] for i in final]
        which = host_tensor(final, parts.device)
        slots, length = batch.slots[which], host_tensor([c.end for c in chunks], parts.device)
        features = state.sampling.features([c.slot_id for c in chunks])
        logits = parts.head.logits(hidden[batch.ends[which]])[:, None]
        rows = state.sampling.rows(slots, features)
        tokens, scored = parts.judge.first(logits, rows, length)
        state.length[slots] = length + 1
        state.last_token[slots] = tokens
        state.sampling.add_tokens(slots, tokens[:, None], features.penalties)
        logprobs = None
        if plan.num_logprobs >= 0:
            chosen = scored.final if parts.options.processed_logprobs else logits
            logprobs = logprobs_of(chosen[:, 0], tokens, plan.num_logprobs).leaving()
        return _First(chunks, which, slots, length, tokens, logprobs)

    def _prompt_logprobs(self, batch: _Batch, hidden: Tensor) -> list[PromptLogprobs | None]:
        """For each chunk that asks: log-probabilities of the known token after each of its rows."""
        head = self._parts.head
        found: list[PromptLogprobs | None] = []
        for c, start in zip(batch.chunks, batch.starts, strict=False):
            if c.prompt_logprobs < 0:
                found.append(None)
                continue
            after = c.token_ids[1:] + (() if c.samples else (c.next_token,))
            tokens = host_tensor(after, self._parts.device)
            # A slice at a time: the logits of a whole chunk can be gigabytes.
            parts = [
                logprobs_of(
                    head.logits(hidden[start + i : start + min(i + 256, len(after))]),
                    tokens[i : i + 256],
                    c.prompt_logprobs,
                ).leaving()
                for i in range(0, len(after), 256)
            ]
            found.append((parts, after))
        return found

    def _broken(self, batch: _Batch, hidden: Tensor) -> Tensor:
        """How many rows [chunks] of each chunk have hidden states that are not finite.

        A NaN or Inf anywhere before, in any layer, shows in the last layer's rows. x - x is 0 for
        any other x, and takes fewer launches than isfinite().
        """
        assert batch.rows.cu_seqlens is not None  # ragged
        row = torch.arange(len(batch.ids), device=hidden.device)
        owners = torch.bucketize(row, batch.rows.cu_seqlens[1:], right=True)
        largest = torch.linalg.vector_norm(hidden, float("inf"), dim=-1)
        count = torch.zeros(len(batch.chunks), dtype=torch.int64, device=hidden.device)
        return count.index_add_(0, owners, (largest - largest != 0).long())

    def _draft(self, drafter: Drafter, batch: _Batch, first: _First | None) -> Tensor | None:
        """Draft KV of the chunks' rows; what was sampled is filled too and proposes: the drafts
        after each final chunk [final, passes], None where none is made."""
        state = self._parts.state
        hidden = drafter.fill_prompt(batch.ids, batch.rows, batch.slots, batch.ends)
        if first is None:
            return None
        table = state.block_table[first.slots]
        newest = drafter.start(first.tokens, first.length, hidden[first.which], table)
        count = max(c.num_propose for c in first.chunks)
        if not count:
            return None
        num_propose = host_tensor([c.num_propose for c in first.chunks], self._parts.device)
        features = state.sampling.features([c.slot_id for c in first.chunks])
        asked = Asked(newest, num_propose, table, max(c.end for c in first.chunks) + 1)
        rows = state.sampling.rows(first.slots, features)
        drafts = drafter.propose(asked, count, rows)
        drafts = self._parts.judge.drafted(drafts, first.slots, newest.positions)
        state.draft_tokens[first.slots, :count] = drafts
        return drafts
