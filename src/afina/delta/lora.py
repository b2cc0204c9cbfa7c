"""LoRA: the update of a matrix is a product of two thin ones (Hu et al. 2021, arXiv 2106.09685).

D(x) = s * B (A x)        A (r, in), B (out, r), s = alpha / r, or alpha / sqrt(r) for rsLoRA
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.delta.contract import Delta, Layer, Spec


class LoRA(Delta):
    """Low-rank update. A starts uniform as in PEFT (Kaiming with a = sqrt 5), B at zero."""

    keys = {"a": "lora_A.weight", "b": "lora_B.weight"}

    def __init__(self, layer: Layer, spec: Spec, generator: torch.Generator) -> None:
        super().__init__(layer, spec, generator)
        rank = spec.rank_of(layer.path)
        a = torch.empty(rank, layer.in_features).uniform_(-1, 1, generator=generator) / math.sqrt(layer.in_features)
        self.a = nn.Parameter(a.to(layer.device))  # (r, in), float32
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, device=layer.device))  # (out, r), float32
        self.scale = spec.scale_of(layer.path)
        self.dropout = spec.dropout

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * s * B A x, in the dtype of y0; the only new activations are (..., r)."""
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        low = self.layer.project(x, self.a.to(y0.dtype)).flatten(0, -2)  # (T, r)
        return torch.addmm(y0.flatten(0, -2), low, self.b.to(y0.dtype).T, alpha=weight * self.scale).view(y0.shape)

    def merged(self, weight: Tensor) -> Tensor:
        """W + s B A."""
        return weight + self.scale * (self.b.to(weight) @ self.a.to(weight))

    @classmethod
    def count(cls, layer: Layer, spec: Spec) -> int:
        """r (in + out)."""
        return spec.rank_of(layer.path) * (layer.in_features + layer.out_features)
