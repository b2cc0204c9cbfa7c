"""The elementwise parts of a Llama-like block, each keeping only what its backward cannot make again.

In eager PyTorch a block of width d and feed-forward width f keeps, for each token in bf16: four float32 and bf16
copies around each norm (12 d bytes more than its input), both halves of the rotary products, and silu(gate)
besides gate, up and their product (2 f bytes more). These keep the inputs only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        # the norm and the scaling read x once each and round once, where F.rms_norm makes float32 copies (4 times slower)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        normed = x.float()
        scale = torch.rsqrt(normed.square().mean(-1, keepdim=True) + ctx.eps)
        normed *= scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        inner = (grad * weight).float()
        along = (inner * normed).mean(-1, keepdim=True)
        return inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        silu = sigmoid * gate
        grad_up = grad * silu
        # d silu / d gate = sigmoid + silu (1 - sigmoid)
        slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
        return slope.mul_(grad).mul_(up), grad_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; x (..., d), weight (d); statistics in float32.

    Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv 2002.05202)."""
    return _SwiGLU.apply(gate, up)
