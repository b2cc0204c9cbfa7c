"""RMSNorm, SwiGLU and rotary embedding in Triton: one read, sums in float32, one rounding."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements per program of SwiGLU


@triton.jit
def _norm(x, weight, grad, out, width, eps, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one row of x / sqrt(mean(x^2) + eps) * weight, or of the gradient of x."""
    start = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    there = at < width
    value = tl.load(x + start + at, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    if BACK:
        inner = tl.load(grad + start + at, mask=there, other=0.0).to(tl.float32) * factor
        normed = value * scale
        result = (inner - normed * (tl.sum(inner * normed) / width)) * scale
    else:
        result = value * scale * factor
    tl.store(out + start + at, result.to(out.dtype.element_ty), mask=there)


def _run_norm(x: Tensor, weight: Tensor, grad: Tensor, eps: float, back: bool) -> Tensor:
    x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(x.numel() // width,)](
        x,
        weight,
        grad,
        out,
        width,
        eps,
        BACK=back,
        BLOCK=block,
        num_warps=min(16, max(4, block // 512)),
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the norm of x `(..., d)`."""
    return _run_norm(x, weight, x, eps, False)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the gradient of x `(..., d)`."""
    return _run_norm(x, weight, grad, eps, True)


@triton.jit
def _swiglu(gate, up, grad, out, of_up, count, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Write silu(gate) * up to `out`, or the gradients of gate and up to `out` and `of_up`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    g = tl.load(gate + at, mask=there, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    if BACK:
        d = tl.load(grad + at, mask=there, other=0.0).to(tl.float32)
        silu = g * sigmoid
        tl.store(of_up + at, (d * silu).to(of_up.dtype.element_ty), mask=there)
        result = d * u * (sigmoid + silu * (1.0 - sigmoid))
    else:
        result = g * sigmoid * u
    tl.store(out + at, result.to(out.dtype.element_ty), mask=there)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, of one shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _swiglu[(triton.cdiv(out.numel(), BLOCK),)](
        gate, up, gate, out, out, out.numel(), BACK=False, BLOCK=BLOCK
    )
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
    _swiglu[(triton.cdiv(gate.numel(), BLOCK),)](
        gate, up, grad, of_gate, of_up, gate.numel(), BACK=True, BLOCK=BLOCK
    )
    return of_gate, of_up


@triton.jit
def _rotary(
    x, cos, sin, y, heads, half, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    """Rotate all heads of one token, (a, b) to (a cos - b sin, b cos + a sin), or transposed."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF)
    inside = at < half
    angles = token * 2 * half + at
    cos_a = tl.load(cos + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + angles + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + angles, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + angles + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)
    there = (head < heads)[:, None] & inside[None, :]
    where = (token * heads + head)[:, None] * 2 * half + at[None, :]
    a = tl.load(x + where, mask=there, other=0.0).to(tl.float32)
    b = tl.load(x + where + half, mask=there, other=0.0).to(tl.float32)
    if BACK:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y + where, first.to(y.dtype.element_ty), mask=there)
    tl.store(y + where + half, second.to(y.dtype.element_ty), mask=there)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Return heads x `(T, heads, d)` rotated by cos and sin `(T, d)`, or back."""
    tokens, heads, width = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y, sizes = (
        torch.empty_like(x),
        (triton.next_power_of_2(heads), triton.next_power_of_2(width // 2)),
    )
    _rotary[(tokens,)](x, cos, sin, y, heads, width // 2, BACK=back, HEADS=sizes[0], HALF=sizes[1])
    return y
