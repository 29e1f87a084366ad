"""How much of a GPU the KV blocks may have: what everything else takes is measured first.

Before the first request a runner of one KV block runs the widest steps that the scheduler can
plan, and the peak of the device's memory is read. The device is behind DeviceMemory; the
arithmetic is budget.size_kv.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch

from eaglerun.checkpoint.budget import MemoryUse, refusal
from eaglerun.errors import CapacityError
from eaglerun.messages import MAX_LOGPROBS, SamplingParams
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import STEP_TIMEOUT_S, Admission, DecodeRow, PrefillChunk, StepPlan
from eaglerun.run.options import RunnerOptions
from eaglerun.run.runner import Runner

# The device gives out large tensors in whole pages.
_PAGE_BYTES = 2 << 20
# All that a request can ask for, so that nothing it asks for later takes more.
_GREEDIEST = SamplingParams(
    temperature=1.0,
    top_p=0.9,
    top_k=50,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    logit_bias={1: 1.0},
    seed=0,
    max_tokens=None,
    min_tokens=1,
    ignore_eos=True,
    logprobs=MAX_LOGPROBS,
)


class DeviceMemory(Protocol):
    """What is asked of a device. Bytes."""

    def total(self) -> int:
        """Of the device."""

    def free(self) -> int:
        """Of the device, for anyone."""

    def settle(self) -> int:
        """Give back what is unused and begin a new peak; returns what is held now."""

    def held(self) -> int:
        """By this process's tensors, gaps between them included."""

    def peak(self) -> int:
        """The most that was held since settle()."""


class CudaMemory:
    """torch's CUDA (or HIP) device. held() counts whole segments: what others cannot have."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def settle(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        return self.held()

    def held(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)


def weights_of(target: MiniMaxM3, draft: Eagle3Llama | None) -> int:
    """Bytes of both models; what the draft shares with the target counts once."""
    tensors: list[torch.Tensor] = []
    for model in (target, draft):
        if model is not None:
            tensors += [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def before_loading(memory: DeviceMemory, utilization: float, weights: int) -> MemoryUse:
    """What is known before anything is loaded: weights of so many bytes are yet to come."""
    total = memory.total()
    return MemoryUse(total, utilization, other=total - memory.free(), weights=weights)


def measure(
    memory: DeviceMemory,
    utilization: float,
    weights: int,
    make_runner: Callable[[], Runner],
    max_num_batched_tokens: int,
    max_chunk_tokens: int,
    graph_outputs: int,
) -> MemoryUse:
    """Run the widest steps on a runner that make_runner() makes, which is gone afterwards.

    weights        bytes of the loaded models; what else is held is counted as other
    graph_outputs  bytes that captured decode steps keep, 0 where none is captured; such steps
                   need the room of a decode step once more, for replays share it
    """
    before = memory.settle()
    use = replace(
        before_loading(memory, utilization, weights),
        other=memory.total() - memory.free() - weights,
    )
    try:
        runner = make_runner()
        regions = runner.kv_regions()
        for region in regions:
            # All blocks of the rehearsal are this one, and rows read cells that nobody wrote.
            region.tensor.zero_()
        # What comes in place of the one block is rounded up, tensor by tensor.
        rounding = sum(_PAGE_BYTES - region.tensor.nbytes for region in regions)
        idle = memory.settle()
        use = replace(use, state=idle - before + rounding)
        prefill, decode = widest_plans(
            runner.options,
            max_num_batched_tokens,
            max_chunk_tokens,
            runner.target.spec.vocab_size,
        )
        runner.launch(prefill).result(STEP_TIMEOUT_S)
        widest = memory.peak() - idle
        between = memory.settle()
        runner.launch(decode).result(STEP_TIMEOUT_S)
        fullest = memory.peak() - between
    except torch.OutOfMemoryError as error:
        raise CapacityError(
            refusal("the widest step does not fit the GPU, before any KV block:", use, [])
        ) from error
    use = replace(
        use,
        # Once more: the first step loads the code of kernels.
        other=memory.total() - memory.free() - memory.held() + before - weights,
        activations=max(widest, fullest + between - idle),
        graphs=fullest + graph_outputs if graph_outputs else 0,
    )
    del runner, regions, region
    memory.settle()
    return use


def rehearsing(options: RunnerOptions) -> RunnerOptions:
    """The options of measure()'s runner: one KV block, nothing captured."""
    return replace(options, num_blocks=1, capture=False)


def widest_plans(
    options: RunnerOptions, max_num_batched_tokens: int, max_chunk_tokens: int, vocab_size: int
) -> tuple[StepPlan, StepPlan]:
    """A prefill of as many rows as a step may have, then a decode step of all slots at K_max.

    Every slot's prompt ends in the prefill, one chunk is as long as a chunk may be, and one row
    stands at the last position of max_model_len: tensors are as wide as its keys, the work is
    one row's. All blocks are block 0, whose content means nothing.
    """
    slots, K = range(options.num_slots), options.num_draft_tokens
    count = min(MAX_LOGPROBS, vocab_size)
    # Room behind each prompt for two rounds of drafts; in a model too short for that, none.
    longest = max(min(max_chunk_tokens, options.max_model_len - 2 * K - 2), 1)
    drafts = K if longest + 2 * K + 2 <= options.max_model_len else 0
    spare = max_num_batched_tokens - len(slots) - 1
    chunks = []
    for slot in slots:
        extra = min(spare, longest - 1)
        spare -= extra
        token_ids = (1,) * (1 + extra)
        chunks.append(PrefillChunk(slot, token_ids, 0, -1, drafts, count))
    far = PrefillChunk(0, (1,), options.max_model_len - 2, 1, 0, count)
    # Histories of one token: the tensors of penalties are as large as with longer ones.
    admissions = tuple(Admission(slot, _GREEDIEST, slot, (1,), (1,), 0, -1) for slot in slots)
    bound = max(options.max_model_len - K, 1)
    rows = tuple(DecodeRow(slot, drafts, drafts, bound) for slot in slots)
    return (
        StepPlan(0, admissions, (), (), (*chunks, far), 0, K, count),
        StepPlan(1, (), (), rows, (), K, K, count),
    )
