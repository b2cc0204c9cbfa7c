"""The product of a few rows with a frozen matrix, at the speed of reading the matrix: decoding.

PyTorch's bfloat16 product of few rows first copies the matrix into blocks, which costs more than
the product.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

# Rows up to which the kernel runs. Weights read from memory, speed over PyTorch: 1.3 at 1 row,
# 1.1 at 8 rows, 0.95 at 16 rows.
MAX_SKINNY_ROWS = 8


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias `(..., out)`, as PyTorch's linear; gradients reach all three."""
    return _linear(x, weight, bias)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out, width = weight.shape
    if x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} columns, the matrix {width}")
    rows = x.numel() // max(1, width)
    if rows > MAX_SKINNY_ROWS or not kernels.cpp_accepts(x, weight, bias):
        return F.linear(x, weight, bias)
    x, weight, y = x.contiguous(), weight.contiguous(), x.new_empty(*x.shape[:-1], out)
    kernels.product(
        data_pointer(x),
        TYPES[x.dtype],
        rows,
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
