"""One rank: launch(StepPlan) -> PendingStep, whose result() is the StepResult.

The plan's admissions and blocks enter DeviceState; then Decode runs the decode part, and Prefill
the prefill part in launches of its own, so that a decode row's bits do not depend on it. Nothing
here waits for the device: the result does.
"""

import torch
from torch import Tensor

from eaglerun.head import Head
from eaglerun.kernels.launch import overlapping
from eaglerun.messages import MAX_STOP_IDS
from eaglerun.models.attention import KVRegion, TargetKV
from eaglerun.models.eagle3_llama import Eagle3Llama
from eaglerun.models.minimax_m3 import MiniMaxM3
from eaglerun.plan.step import StepPlan
from eaglerun.run.decode import Decode, Wanted
from eaglerun.run.options import RunnerOptions
from eaglerun.run.parts import Parts
from eaglerun.run.pending import AuxRows, Clock, PendingStep
from eaglerun.run.prefill import Prefill
from eaglerun.run.state import DeviceState
from eaglerun.speculative.drafter import Drafter, DrafterOptions
from eaglerun.speculative.eagle3 import Eagle3
from eaglerun.speculative.verify import Forced, Invariant, Judge, Rejection, Script


class Runner:
    """Holds the models, their KV memory and the DeviceState of one rank."""

    def __init__(
        self,
        target: MiniMaxM3,
        draft: Eagle3Llama | None,
        options: RunnerOptions,
        progress: bool | None = False,
    ) -> None:
        """``progress``: whether a line is drawn while a graph is captured."""
        self.target = target
        self.options = options
        weight, spec = target.embed_tokens.weight, target.spec
        self.device, dtype = weight.device, weight.dtype
        self.target_kv = TargetKV.allocate(
            spec,
            options.num_blocks,
            options.block_size,
            self.device,
            options.kv_dtype,
            options.index_dtype,
        )
        self.state = DeviceState(
            num_slots=options.num_slots,
            max_blocks=-(-options.max_model_len // options.block_size),
            num_draft_tokens=options.num_draft_tokens,
            vocab_size=spec.vocab_size,
            max_stop_ids=MAX_STOP_IDS + len(options.eos_token_ids),
            device=self.device,
        )
        self.aux: Tensor | None = None
        if draft is not None or options.keep_aux:
            size = (len(target.taps), options.max_rows, spec.hidden_size)
            self.aux = torch.empty(size, device=self.device, dtype=dtype)
        self.drafter: Drafter | None = None
        if draft is not None and self.aux is not None:
            self.drafter = Eagle3(draft, self.aux, self.state.by_slot, _drafter_options(options))
        self.script: Script | None = None
        if options.scripted_drafts or options.scripted_tokens:
            length = options.max_model_len + options.num_draft_tokens
            self.script = Script(options.num_slots + 1, length, spec.vocab_size, self.device)
        head = Head(target.logits)
        self.judge = _judge(head, options, self.script, self.device)
        parts = Parts(
            options=options,
            device=self.device,
            target=target,
            target_kv=self.target_kv,
            head=head,
            state=self.state,
            judge=self.judge,
            drafter=self.drafter,
            aux=self.aux,
        )
        self.decode = Decode(parts, progress)
        self.prefill = Prefill(parts)
        # The step being launched, for whoever watches the forwards.
        self.plan: StepPlan | None = None

    def kv_regions(self) -> tuple[KVRegion, ...]:
        """Every memory that holds something for each block: what a transfer of blocks must move."""
        own = self.target_kv.regions()
        return own if self.drafter is None else own + self.drafter.regions()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> PendingStep:
        """Run one step. Plans must come in the order they were made."""
        with overlapping(self.options.overlap_kernels):
            return self._launch(plan)

    @torch.inference_mode()
    def capture(self, step: Wanted) -> None:
        """Capture the moves of a decode step, with padding in them. No step may be in flight."""
        with overlapping(self.options.overlap_kernels):
            self.decode.capture(step)

    def _launch(self, plan: StepPlan) -> PendingStep:
        self.plan = plan
        for admission in plan.admissions:
            self.state.admit(admission, self.options.eos_token_ids)
            self.judge.admit(admission)
            if self.drafter is not None:
                self.drafter.admit(admission)
        for update in plan.blocks:
            self.state.set_blocks(update)
        aux: list[AuxRows] = []
        clock = Clock(self.device)
        decoded = self.decode.run(plan, aux, clock) if plan.decode else None
        prefilled = self.prefill.run(plan, aux, clock) if plan.prefill else None
        clock.end()
        return PendingStep(plan, decoded, prefilled, aux, clock)


def _drafter_options(options: RunnerOptions) -> DrafterOptions:
    return DrafterOptions(
        num_slots=options.num_slots,
        num_blocks=options.num_blocks,
        block_size=options.block_size,
        max_batch=options.max_batch,
        max_model_len=options.max_model_len,
        num_draft_tokens=options.num_draft_tokens,
        kv_dtype=options.kv_dtype,
        probabilistic=options.probabilistic_drafts,
        rejection=options.rejection,
    )


def _judge(
    head: Head, options: RunnerOptions, script: Script | None, device: torch.device
) -> Judge:
    """The one judge of all steps."""
    rule = Rejection(head) if options.rejection else Invariant(head)
    if script is None and not options.synthetic:
        return rule
    rates = None
    if options.synthetic:
        rates = torch.tensor(options.synthetic, dtype=torch.float64).to(device)
    return Forced(rule, rates, script, options.scripted_tokens)
