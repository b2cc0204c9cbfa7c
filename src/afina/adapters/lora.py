"""LoRA: the update of a matrix is a low-rank product (Hu et al. 2021, arXiv 2106.09685).

D(x) = s * B (A x)        A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) for rsLoRA

Fused experts have one pair per expert, in PEFT's layout: A (E, r, in) as (E * r, in), expert after
expert, and B as (out, r * E), the experts' columns interleaved.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.base import AdapterLayer, LayerCost, TargetModule
from afina.adapters.registry import register_method
from afina.io.adapter_config import AdapterConfig
from afina.kernels.lora import pack_lora
from afina.settings.groups import MethodSettings
from afina.settings.methods import LoRASettings


def add_low_rank(y0: Tensor, low: Tensor, bt: Tensor, scale: float) -> Tensor:
    """Return y0 `(..., out)` + scale * low B^T; low is A x `(..., r)`, bt is B^T `(r, out)`."""
    return torch.addmm(y0.flatten(0, -2), low.flatten(0, -2), bt, alpha=scale).view(y0.shape)


@register_method("lora")
class LoRA(AdapterLayer):
    """Low-rank update. A starts uniform as in PEFT (Kaiming with a = sqrt 5), B at zero."""

    tensor_names = {"a": "lora_A.weight", "b": "lora_B.weight"}
    embedding_names = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    shape_rules = {"a": "(rank, channels, *kernel)", "b": "(outputs, rank, *ones)"}
    peft_fields = {"use_dora": False}
    low_rank_tensors = ("a", "b")
    supported_modules = "experts"
    fused_kernel = "lora"
    settings_class: ClassVar[type[MethodSettings]] = LoRASettings

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        rank = spec.rank_of(layer.path) * layer.num_experts
        self.a = nn.Parameter(
            torch.empty(rank, layer.in_features, device=layer.device)
        )  # (E r, in), float32
        self.b = nn.Parameter(
            torch.empty(layer.out_features, rank, device=layer.device)
        )  # (out, r E), float32
        self.scale = spec.scale_of(layer.path)
        LoRA.reset_parameters(self, generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw A again and set B to zero."""
        a = torch.empty(self.a.shape).uniform_(-1, 1, generator=generator) / math.sqrt(
            self.a.shape[1]
        )
        self.a.copy_(a)
        self.b.zero_()

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * s * B A x, in the dtype of y0; only A x `(..., r)` is new."""
        y0 = self.add_restart_delta(x, y0, weight)
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        low = self.layer.project(x, self.a.to(y0.dtype))  # (..., r)
        return add_low_rank(y0, low, self.b.to(y0.dtype).T, weight * self.scale)

    @property
    def can_fuse(self) -> bool:
        """Whether the kernel computes all that the layer adds: not at fused experts."""
        return super().can_fuse and not self.layer.is_experts

    def _by_expert(self) -> tuple[Tensor, Tensor]:
        """Return A `(E, r, in)` and B `(E, out, r)` of fused experts."""
        experts = self.layer.num_experts
        a = self.a.unflatten(0, (experts, -1))
        return a, self.b.unflatten(1, (-1, experts)).permute(2, 0, 1)

    def expert_factors(self, dtype: torch.dtype, weight: float) -> list[tuple[Tensor, Tensor]]:
        """Return A `(r, in)` and weight * s * B transposed `(r, out)` of each expert."""
        a, b = self._by_expert()
        scaled = (weight * self.scale * b.mT).to(dtype).contiguous()
        # unbind: the gradients of all experts are stacked once, not added one by one
        return list(zip(a.to(dtype).unbind(), scaled.unbind(), strict=True))

    def as_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return B and A; None at fused experts, whose update is one product per expert."""
        return None if self.layer.is_experts else super().as_low_rank()

    def kernel_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A `(r, in)` and B transposed `(r, out)`, contiguous and in `dtype`."""
        return pack_lora(self.a, self.b, dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + s B A, `(out, in)` or `(E, out, in)`."""
        if self.layer.is_experts:
            a, b = self._by_expert()
            return weight + self.scale * (b.to(weight) @ a.to(weight))
        return self.merge_restart_delta(weight) + self.scale * (
            self.b.to(weight) @ self.a.to(weight)
        )

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Return r (in + out), times the number of fused experts."""
        rank = spec.rank_of(layer.path) * layer.num_experts
        return rank * (layer.in_features + layer.out_features)

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """Return the cost of a layer.

        Backward reads x and A x (x only where the C++ kernel runs); with dropout, x after dropout
        and its mask.
        """
        dropped = 2 * layer.in_features if spec.dropout else 0
        return LayerCost(
            not spec.dropout,
            spec.rank_of(layer.path) + dropped,
            float(LoRA.num_parameters(layer, spec)),
        )
