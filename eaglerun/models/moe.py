"""The target's feed-forward layers: dense, and routed experts beside a shared one."""

from torch import Tensor, nn

from eaglerun.checkpoint.target import TargetSpec
from eaglerun.kernels.moe_gemm import moe_gemm
from eaglerun.kernels.moe_route import moe_route
from eaglerun.kernels.rows import Experts, Routing
from eaglerun.kernels.swiglu_oai import swiglu_oai
from eaglerun.models.allocation import Allocation
from eaglerun.models.layers import Linear


class DenseMLP(nn.Module):
    """down(swiglu_oai(gate_up(x))); gate rows, then up rows."""

    def __init__(self, spec: TargetSpec, weights: Allocation) -> None:
        super().__init__()
        self.gate_up_proj = Linear(weights.parameter("gate_up_proj.weight"))
        self.down_proj = Linear(weights.parameter("down_proj.weight"))
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

    def __init__(self, spec: TargetSpec, weights: Allocation) -> None:
        super().__init__()
        bias = "e_score_correction_bias"
        self.weight = weights.parameter("weight")
        self.e_score_correction_bias = weights.parameter(bias) if bias in weights else None
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

    def __init__(self, weights: Allocation) -> None:
        super().__init__()
        self.w13 = weights.parameter("w13")
        self.w2 = weights.parameter("w2")


class MoE(nn.Module):
    """Routed experts, their weights times routed_scaling_factor, plus the shared expert."""

    def __init__(self, spec: TargetSpec, weights: Allocation) -> None:
        super().__init__()
        self.gate = Gate(spec, weights.under("gate"))
        self.experts = RoutedExperts(weights.under("experts"))
        self.shared_experts = DenseMLP(spec, weights.under("shared_experts"))
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
