"""VeRA: frozen random matrices, scaled by two trained vectors (Kopiczko et al. 2024, 2310.11454).

D(x) = s * b o (B (d o (A x)))      A (r, in), B (out, r) frozen, by a seed; d (r,), b (out,) trained
"""

import math
import zlib

import torch
from torch import Tensor, nn

from afina.adapters.base import AdapterConfig, AdapterLayer, TargetModule
from afina_vera.settings import VeRASettings


class VeRA(AdapterLayer):
    """Vector-based random matrix adaptation: d starts at 0.1, b at zero."""

    tensor_names = {"d": "vera_lambda_d", "b": "vera_lambda_b"}
    shape_rules = {"d": "(rank,)", "b": "(outputs,)"}
    settings_class = VeRASettings

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        rank, device = spec.rank_of(layer.path), layer.device
        key = f"{spec.method_settings.get('seed', 0)} {layer.path}"
        random = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        shapes = {"frozen_a": (rank, layer.in_features), "frozen_b": (layer.out_features, rank)}
        for name, shape in shapes.items():
            matrix = torch.randn(shape, generator=random) / math.sqrt(shape[1])
            self.register_buffer(name, matrix.to(device))
        self.d = nn.Parameter(torch.full((rank,), 0.1, device=device))
        self.b = nn.Parameter(torch.zeros(layer.out_features, device=device))
        self.scale = spec.scale_of(layer.path)

    def as_low_rank(self) -> tuple[Tensor, Tensor]:
        """Return s diag(b) B `(out, r)` and diag(d) A `(r, in)`."""
        return self.scale * self.b[:, None] * self.frozen_b, self.d[:, None] * self.frozen_a

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * D(x)."""
        b, a = (matrix.to(y0.dtype) for matrix in self.as_low_rank())
        return y0 + weight * (self.layer.project(x, a) @ b.T)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return W + s diag(b) B diag(d) A."""
        b, a = self.as_low_rank()
        return weight + (b @ a).to(weight)

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Return r + out."""
        return spec.rank_of(layer.path) + layer.out_features
