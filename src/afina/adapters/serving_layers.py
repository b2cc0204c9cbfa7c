"""Adapter layers that the serving engine adds to a module: views into its pool, and merged weights.

They are no `nn.Module`, have no gradients, and do not change while they are in use.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.lora import add_low_rank
from afina.adapters.target_module import TargetModule
from afina.models.fast_llama import FastLinear


class LoRAView:
    """A LoRA layer of the serving engine: views into its pool of blocks, in the base's dtype.

    Thousands are added and removed, so that each is only A `(r, in)`, B transposed `(r, out)` and
    the scale.
    """

    __slots__ = ("a", "bt", "scale")
    replaces_base, fused_kernel, can_fuse = False, "lora", True

    def __init__(self, a: Tensor, bt: Tensor, scale: float) -> None:
        self.a, self.bt, self.scale = a, bt, scale

    @property
    def b(self) -> Tensor:
        """B (out, r)."""
        return self.bt.T

    def inference_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return A and B transposed; an output layer of a 16-bit base takes them in float32."""
        return self.a.to(dtype), self.bt.to(dtype)

    def __call__(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * scale * B A x, in the dtype of y0."""
        a, bt = self.inference_weights(y0.dtype)
        return add_low_rank(y0, F.linear(x.to(y0.dtype), a), bt, weight * self.scale)


class MergedLinear:
    """A linear module whose weight has an adapter merged; it replaces the base on all tokens."""

    __slots__ = ("layer",)
    replaces_base, fused_kernel, can_fuse = True, None, False

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @classmethod
    @torch.no_grad()
    def of(cls, layer: TargetModule, view: LoRAView) -> "MergedLinear":
        """Return W + scale * B A, summed in float32 and rounded once to the dtype of A."""
        bias: Any = getattr(layer.module, "bias", None)
        merged = FastLinear(layer.in_features, layer.out_features, bias=False, device="meta")
        weight = layer.weight.float().addmm(view.b.float(), view.a.float(), alpha=view.scale)
        merged.weight = nn.Parameter(weight.to(view.a.dtype), requires_grad=False)
        merged.bias = bias
        return cls(merged)

    @property
    def weight(self) -> Tensor:
        """The merged matrix (out, in)."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's own bias."""
        return self.layer.bias

    def __call__(self, x: Tensor, y0: Tensor, weight: float, *others: Any, **named: Any) -> Tensor:
        """Return the output of the merged module."""
        return self.layer(x)
