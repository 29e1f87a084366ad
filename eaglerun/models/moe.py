"""The target's feed-forward layers: dense, and routed experts beside a shared one."""

import torch
from torch import Tensor, nn

from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rows import Experts, Routing
from eaglerun.kernels.swiglu_oai import swiglu_oai
from eaglerun.models.layers import Linear, empty_parameter


class DenseMLP(nn.Module):
    """down(swiglu_oai(gate_up(x))); gate rows, then up rows."""

    def __init__(
        self, spec: TargetSpec, width: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_up_proj = Linear(spec.hidden_size, 2 * width, device=device, dtype=dtype)
        self.down_proj = Linear(width, spec.hidden_size, device=device, dtype=dtype)
        self.activation = (spec.swiglu_alpha, spec.swiglu_limit, spec.swiglu_beta)

    def forward(self, x: Tensor) -> Tensor:
        """[N, hidden] -> [N, hidden]."""
        activated = swiglu_oai(self.gate_up_proj(x), *self.activation)
        out: Tensor = self.down_proj(activated)
        return out


class Gate(nn.Module):
    """The router: which experts a row visits, and with what weight.

    weight [E, hidden] and selection bias [E] are float32 whatever the model's dtype (float64 in a
    float64 model).
    """

    def __init__(self, spec: TargetSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = empty_parameter(
            spec.num_experts, spec.hidden_size, device=device, dtype=dtype
        )
        self.e_score_correction_bias = (
            empty_parameter(spec.num_experts, device=device, dtype=dtype)
            if spec.use_routing_bias
            else None
        )
        self.topk = spec.num_experts_per_tok
        self.scale = spec.routed_scaling_factor

    def forward(self, x: Tensor, positions: Tensor, num_experts: Tensor | None) -> Routing:
        """x [N, hidden] -> the experts of each row; see moe_route."""
        return moe_route(
            x,
            self.weight,
            self.e_score_correction_bias,
            positions,
            self.topk,
            self.scale,
            num_experts,
        )


class RoutedExperts(nn.Module):
    """w13 [E, 2 I, hidden] (w1 rows, then w3 rows) and w2 [E, hidden, I]."""

    def __init__(self, spec: TargetSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        count, width = spec.num_experts, spec.expert_intermediate_size
        self.w13 = empty_parameter(count, 2 * width, spec.hidden_size, device=device, dtype=dtype)
        self.w2 = empty_parameter(count, spec.hidden_size, width, device=device, dtype=dtype)


class MoE(nn.Module):
    """Routed experts, their weights times routed_scaling_factor, plus the shared expert."""

    def __init__(self, spec: TargetSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Gate(spec, device=device, dtype=dtype)
        self.experts = RoutedExperts(spec, device=device, dtype=dtype)
        self.shared_experts = DenseMLP(
            spec, spec.shared_intermediate_size, device=device, dtype=dtype
        )
        self.activation = (spec.swiglu_alpha, spec.swiglu_limit, spec.swiglu_beta)

    def forward(self, x: Tensor, positions: Tensor, num_experts: Tensor | None) -> Tensor:
        """[N, hidden] -> [N, hidden]; rows at position -1 visit no routed expert.

        num_experts  int64 [1], incremented by the distinct experts visited; None counts nothing
        """
        routing = self.gate(x, positions, num_experts)
        experts = Experts(
            self.experts.w13,
            self.experts.w2,
            self.shared_experts.gate_up_proj.weight,
            self.shared_experts.down_proj.weight,
        )
        return moe_gemm(x, routing, experts, *self.activation)
