"""The product of a few rows with a frozen matrix, at the speed of reading the matrix: decoding.

PyTorch's bfloat16 product of few rows first copies the matrix into blocks, which costs more than
the product.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

# Rows up to which the kernel runs. Weights read from memory, speed over PyTorch: 1.3 at 1 row,
# 1.1 at 8 rows, 0.95 at 16 rows.
MAX_SKINNY_ROWS = 8
CAST_ELEMENTS = 1 << 18  # weights in float32 at a time, 1 MB: they stay in the cache


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias `(..., out)`, as PyTorch's linear; gradients reach all three."""
    return _linear(x, weight, bias)


def linear_float32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias `(..., out)`, summed and returned in float32 for 16-bit x and weights.

    Without gradients. A 16-bit product rounds its result: logits of 16 and more to eighths.
    """
    if x.dtype == torch.float32:
        return F.linear(x, weight, bias)
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if x.numel() <= MAX_SKINNY_ROWS * x.shape[-1] and kernels.uses_cpp(*tensors):
        return _product(x, weight, bias, torch.float32)
    added = None if bias is None else bias.float()
    if x.is_cuda:
        y = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
        return (y if added is None else y + added).view(*x.shape[:-1], len(weight))
    rows, y = x.float(), x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    step = max(1, CAST_ELEMENTS // x.shape[-1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        y[..., part] = F.linear(rows, weight[part].float(), None if added is None else added[part])
    return y


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[1]
    if x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} columns, the matrix {width}")
    rows = x.numel() // max(1, width)
    if rows > MAX_SKINNY_ROWS or not kernels.cpp_accepts(x, weight, bias):
        return F.linear(x, weight, bias)
    return _product(x, weight, bias, x.dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x W^T + bias in `dtype`, that of x or float32, by the C++ kernel."""
    out, width = weight.shape
    x, weight = x.contiguous(), weight.contiguous()
    y = x.new_empty(*x.shape[:-1], out, dtype=dtype)
    product = kernels.product if dtype == x.dtype else kernels.product_float32
    product(
        data_pointer(x),
        TYPES[x.dtype],
        x.numel() // max(1, width),
        width,
        out,
        data_pointer(weight),
        data_pointer(bias),
        data_pointer(y),
    )
    return y


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ weight if ctx.needs_input_grad[0] else None,
        rows.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None,
        rows.sum(0) if ctx.needs_input_grad[2] else None,
    )


_linear = register_op(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _run,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
    _gradients,
    _keep,
)
