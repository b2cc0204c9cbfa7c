"""Elementwise operations of a Llama-like layer that save no more than backward needs.

In eager PyTorch a layer of width d and feed-forward width f saves, per token in bfloat16: four
float32 and bfloat16 copies around each norm (12 d bytes more than its input), both halves of the
rotary products, and silu(gate) besides gate, up and their product (2 f bytes more). These save
their inputs only. The C++ kernels read each input once, compute in float32 and round once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op


def rms_norm(
    x: Tensor,  # (..., d)
    weight: Tensor,  # (d,)
    eps: float,
) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last axis, with statistics in float32.

    References:
        Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    return _norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, elementwise, of one shape (Shazeer 2020, arXiv 2002.05202)."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    return _swiglu(gate, up)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return heads x `(T, heads, d)` rotated by their position's angles, cos and sin `(T, d)`.

    The halves (a, b) of a head become (a cos - b sin, b cos + a sin), as in transformers; gradients
    reach x only.

    References:
        Su et al. 2021, arXiv 2104.09864.
    """
    tokens, _, width = x.shape
    if cos.shape != (tokens, width) or sin.shape != cos.shape or width % 2:
        raise ValueError(
            f"x {tuple(x.shape)} does not fit cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        )
    return _rotary(x, cos, sin, False)


# ---- references


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm`, in PyTorch."""
    # norm and scaling read x once each and round once; F.rms_norm makes float32 copies (4 times
    # slower)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_statistics_dtype(x)).square_()
    scale = square.div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)


def norm_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient of `rms_norm` with respect to x."""
    normed, scale = _normed(x, eps)
    inner = (grad * weight).to(normed.dtype)
    along = (inner * normed).mean(-1, keepdim=True)
    return inner.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Return `swiglu`, in PyTorch."""
    return F.silu(gate).mul_(up)


def swiglu_backward_reference(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `swiglu` with respect to gate and up."""
    sigmoid = torch.sigmoid(gate)
    silu = sigmoid * gate
    grad_up = grad * silu
    # d silu / d gate = sigmoid + silu (1 - sigmoid)
    slope = torch.addcmul(sigmoid, silu, 1 - sigmoid)
    return slope.mul_(grad).mul_(up), grad_up


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return `rotary`, or its transpose, which is its gradient, in PyTorch."""
    if back:
        a, b = (x * sin[:, None]).chunk(2, -1)
        return x * cos[:, None] + torch.cat([b, -a], -1)
    a, b = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None]


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the statistics: float32, or float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _normed(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = x.to(_statistics_dtype(x), copy=True)
    scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return exact.mul_(scale), scale


# ---- the operations


def _run_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not kernels.cpp_accepts(x, weight):
        return norm_reference(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    kernels.norm(
        data_pointer(x),
        data_pointer(weight),
        0,
        data_pointer(y),
        TYPES[x.dtype],
        x.numel() // width,
        width,
        eps,
    )
    return y


def _run_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not kernels.cpp_accepts(x, weight, grad):
        return norm_backward_reference(grad, x, weight, eps)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    kernels.norm(
        data_pointer(x),
        data_pointer(weight),
        data_pointer(grad),
        data_pointer(out),
        TYPES[x.dtype],
        x.numel() // width,
        width,
        eps,
    )
    return out


def _keep_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = _norm_backward(grad, x, weight, ctx.eps) if ctx.needs_input_grad[0] else None
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (
            (grad * _normed(x, ctx.eps)[0]).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        )
    return grad_x, grad_weight, None


def _run_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    if not kernels.cpp_accepts(gate, up):
        return swiglu_reference(gate, up)
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    kernels.swiglu(
        data_pointer(gate), data_pointer(up), 0, data_pointer(y), 0, 0, TYPES[y.dtype], y.numel()
    )
    return y


def _run_swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if not kernels.cpp_accepts(gate, up, grad):
        return swiglu_backward_reference(grad, gate, up)
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    where = (
        data_pointer(gate),
        data_pointer(up),
        data_pointer(grad),
        0,
        data_pointer(of_gate),
        data_pointer(of_up),
    )
    kernels.swiglu(*where, TYPES[gate.dtype], gate.numel())
    return of_gate, of_up


def _swiglu_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _swiglu_backward(grad, *ctx.saved_tensors)


def _run_rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    tokens, heads, width = x.shape
    if not kernels.cpp_accepts(x, cos, sin):
        return rotary_reference(x, cos, sin, back)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    kernels.rotary(
        data_pointer(x),
        data_pointer(cos),
        data_pointer(sin),
        data_pointer(y),
        TYPES[x.dtype],
        tokens,
        heads,
        width,
        back,
    )
    return y


def _keep_rotary(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _rotary_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _rotary(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_norm = register_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _run_norm,
    lambda x, weight, eps: torch.empty_like(x),
    _norm_gradients,
    _keep_norm,
)
_norm_backward = register_op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> Tensor",
    _run_norm_backward,
    lambda grad, x, weight, eps: torch.empty_like(x),
)
_swiglu = register_op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    _run_swiglu,
    lambda gate, up: torch.empty_like(gate),
    _swiglu_gradients,
    lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
_swiglu_backward = register_op(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _run_swiglu_backward,
    lambda grad, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
_rotary = register_op(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor",
    _run_rotary,
    lambda x, cos, sin, back: torch.empty_like(x),
    _rotary_gradients,
    _keep_rotary,
)
