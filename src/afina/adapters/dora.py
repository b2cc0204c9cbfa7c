"""DoRA: magnitude and direction of a weight's rows (Liu et al. 2024, arXiv 2402.09353, eq. 5, 11).

    W' = m * (W + s B A) / n      n = ||W + s B A|| by row, constant for the gradient (4.3)
    D(x, y0) = (m / n - 1) (y0 - bias) + (m / n) s B A x        m (out) starts as ||W||, B as 0

The norm is computed without the matrix W + s B A:

    n^2 = ||W||^2 + 2 s <B, (A W^T)^T> + s^2 <B (A A^T), B>     row by row

so that a step costs one product with A more than LoRA, and a pass over the outputs.
"""

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from afina.adapters.base import LayerCost, TargetModule
from afina.adapters.lora import LoRA
from afina.adapters.registry import register_method
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.settings.groups import MethodSettings

NORM_CHUNK = 1 << 20  # weights converted to float32 at a time: they stay in the cache


@register_method("dora")
class DoRA(LoRA):
    """LoRA on the direction of the rows of W, and their magnitudes m."""

    peft_fields = {"use_dora": True}
    tensor_names = {**LoRA.tensor_names, "m": "lora_magnitude_vector"}
    shape_rules = {**LoRA.shape_rules, "m": "(1, outputs, *ones) if kernel else (outputs,)"}
    name_aliases = {"lora_magnitude_vector.weight": "lora_magnitude_vector"}
    supported_modules = "matrix"
    low_rank_tensors = None  # type: ignore[assignment]  # the rows of W + s B A are normalized
    fused_kernel = None  # type: ignore[assignment]
    settings_class = MethodSettings
    no_grad_terms = ("norm",)

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        # caches, with the state of the tensors that they were computed from
        self._base: tuple[object, Tensor] = (None, torch.empty(0))  # ||W||^2 (out)
        self._norm: tuple[object, Tensor] = (None, torch.empty(0))  # n (out)
        self.m = nn.Parameter(self.norm().clone())  # (out), float32

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Raise `SettingsError`: the update is not a sum, since it depends on the rows' norms."""
        why = "its rows are scaled, so that a merged update would depend on the next one"
        raise SettingsError(
            "dora cannot merge and restart", where="restart_every", why=why, hint="--method lora"
        )

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * D(x, y0), in the dtype of y0."""
        if self.dropout and self.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        gain = self.m / self.norm()  # (out)
        # without the 1, next to which 16 bits would lose it
        more = (weight * (gain - 1)).to(y0.dtype)
        bias = getattr(self.layer.module, "bias", None)
        flat = y0.flatten(0, -2)  # (T, out)
        y = torch.addcmul(flat if bias is None else flat - more * bias.to(y0.dtype), flat, more)
        b = (weight * self.scale * gain[:, None] * self.b).to(y0.dtype)  # (out, r)
        low = self.layer.project(x, self.a.to(y0.dtype)).flatten(0, -2)  # (T, r)
        return y.addmm_(low, b.T).view(y0.shape)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return m (W + s B A) / ||W + s B A||."""
        direction = super().merged_weight(weight)
        norm = torch.linalg.vector_norm(direction, dim=1).clamp_min(
            torch.finfo(direction.dtype).tiny
        )
        return (self.m.to(weight) / norm)[:, None] * direction

    def norm(self) -> Tensor:
        """Return n `(out,)`, float32 or wider, cached between forward passes without gradients.

        With gradients it is always computed: fused optimizers change parameters without counting
        a version.
        """
        if self.training or torch.is_grad_enabled():
            self._norm = (None, self._norm[1])
            return self._compute()
        key = _state(self.a, self.b, *self.layer.module.parameters(), *self.layer.module.buffers())
        if self._norm[0] != key:
            self._norm = (key, self._compute())
        return self._norm[1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop the cached norm: parameters change between the modes."""
        self._norm = (None, self._norm[1])
        return super().train(mode)

    @torch.no_grad()
    def _compute(self) -> Tensor:
        dtype = torch.promote_types(self.a.dtype, torch.float32)
        a, b = self.a.to(dtype), self.b.to(dtype)
        squares, cross = self._products(a)  # (out), (out, r)
        sum_of_squares = (
            squares
            + 2 * self.scale * (cross * b).sum(1)
            + self.scale**2 * ((b @ (a @ a.T)) * b).sum(1)
        )
        floor = squares * torch.finfo(dtype).eps  # where W and its update cancel, no digit is left
        return sum_of_squares.maximum(floor).clamp_min(torch.finfo(dtype).tiny).sqrt()

    def _products(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return ||W||^2 by rows `(out,)`, cached for an unchanged base, and W A^T `(out, r)`."""
        key = (a.dtype, *_state(*self.layer.module.parameters(), *self.layer.module.buffers()))
        known, squares, cross = self._base[0] == key, [], []
        for rows in self.layer.weight.detach().split(max(1, NORM_CHUNK // self.layer.in_features)):
            chunk = rows.to(a.dtype)
            cross.append(a @ chunk.T)
            if not known:
                squares.append(chunk.square().sum(1))
        if not known:
            self._base = (key, torch.cat(squares))
        return self._base[1], torch.cat(cross, 1).T

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Return r (in + out) + out."""
        return super().num_parameters(layer, spec) + layer.out_features

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """Return the cost of a layer.

        Backward reads y0 besides what LoRA saves; A W^T is a product with the entire weight;
        gradients pass three times over y0.
        """
        lora = super().layer_cost(layer, spec, device)
        once = float(spec.rank_of(layer.path) * layer.in_features * layer.out_features)
        saved, workspace = lora.saved_numel + layer.out_features, 3.0 * layer.out_features
        return LayerCost(lora.saves_input, saved, lora.macs_per_token, once, workspace)


def _state(*tensors: Tensor) -> tuple[object, ...]:
    """Return a value that changes when one of the tensors does."""
    return tuple((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
