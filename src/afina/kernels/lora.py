"""Grouped LoRA: the low-rank outputs of all LoRA adapters of a module in one call, of any ranks.

    y[rows] += weight * (x[rows] A_k^T) B_k^T        A_k (r_k, in), B_k (out, r_k)

Nothing is gathered, copied or padded to the largest rank. One table serves training several
adapters in one pass, and a decoding step in which each sequence has an adapter of its own
(`afina.kernels.adapter_group` describes the rows). The kernels take B transposed, `bt` `(r, out)`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afina.kernels.adapter_group import (
    AdapterGroup,
    FusedKernel,
    SegmentRow,
    Weights,
    check_rows,
    mean_tokens,
    prefers_products,
    segment_table,
    sort_rows,
    table_rows,
)
from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

# With more tokens a row and a larger rank than these, PyTorch's products are faster than C++.
MAX_CPP_TOKENS, MAX_CPP_RANK = 128, 16


def grouped_lora(
    y: Tensor,  # (num_tokens, out)
    x: Tensor,  # (num_tokens, in)
    rows: Sequence[SegmentRow],
    a: Sequence[Tensor],  # each (r, in)
    b: Sequence[Tensor],  # each (out, r)
) -> Tensor:
    """Return y plus, on the tokens of each row, weight * (x A_k^T) B_k^T.

    Gradients reach y, x, every A and every B. A and B of another dtype (float32 parameters under
    bfloat16 activations) are rounded to that of x.

    Raises:
        ValueError: rows or shapes do not fit each other.
    """
    check_rows(rows, x.shape[0], len(a))
    for k, (left, right) in enumerate(zip(a, b, strict=True)):
        if (
            left.shape != (right.shape[1], x.shape[1])
            or right.shape[0] != y.shape[1]
            or len(y) != len(x)
        ):
            raise ValueError(
                f"adapter {k}, A {tuple(left.shape)} and B {tuple(right.shape)}, does not fit "
                f"x {tuple(x.shape)} and y {tuple(y.shape)}"
            )
    return _lora(
        y, x, *segment_table(rows), [t.to(x.dtype) for t in a], [t.to(x.dtype).T for t in b]
    )


def pack_lora(a: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A `(r, in)` and B transposed `(r, out)`, contiguous, in `dtype`."""
    return a.to(dtype).contiguous(), b.T.to(dtype).contiguous()


class FusedLoRA(FusedKernel):
    """The kernel for one table of rows with packed weights, which are referenced and not copied."""

    def __init__(
        self,
        num_tokens: int,
        rows: Sequence[SegmentRow],
        a: Sequence[Tensor],  # each (r, in), contiguous
        bt: Sequence[Tensor],  # each (r, out), contiguous
    ) -> None:
        check_rows(rows, num_tokens, len(a))
        inputs, outputs, dtype = a[0].shape[1], bt[0].shape[1], a[0].dtype
        for left, right in zip(a, bt, strict=True):
            if (
                left.shape != (len(right), inputs)
                or right.shape[1] != outputs
                or left.dtype != dtype
                or not kernels.cpp_accepts(left, right)
                or not (left.is_contiguous() and right.is_contiguous())
            ):
                shapes = f"A {tuple(left.shape)} and B transposed {tuple(right.shape)}"
                raise ValueError(f"{shapes} do not fit each other")
        ordered = sort_rows(rows)
        native = kernels.library.FusedLoRA(
            torch.get_num_threads(),
            TYPES[dtype],
            num_tokens,
            inputs,
            outputs,
            [n for row in ordered for n in row[:3]],
            [row[3] for row in ordered],
            [len(t) for t in a],
            [data_pointer(t) for t in a],
            [data_pointer(t) for t in bt],
        )
        super().__init__(kernels.add, native, (a, bt), (num_tokens, inputs, outputs), dtype)


class LoRAProducts(FusedKernel):
    """What `FusedLoRA` computes, by PyTorch's products, a row at a time."""

    def __init__(
        self, num_tokens: int, rows: Sequence[SegmentRow], a: Sequence[Tensor], bt: Sequence[Tensor]
    ) -> None:
        check_rows(rows, num_tokens, len(a))
        shape = (num_tokens, a[0].shape[1], bt[0].shape[1])
        super().__init__(kernels.add, None, (a, bt), shape, a[0].dtype)
        self.rows, self.a, self.bt = rows, a, bt

    def _add(self, y: Tensor, x: Tensor) -> None:
        y, x = y.flatten(0, -2), x.flatten(0, -2)
        for start, end, k, weight in self.rows:
            y[start:end].addmm_(x[start:end] @ self.a[k].T, self.bt[k], alpha=weight)


class LoRAGroup(AdapterGroup):
    """LoRA layers of one module: the kernel reads A, `a` `(r, in)`, and B, `b` `(out, r)`."""

    @property
    def parameters(self) -> list[Tensor]:
        """Every A, then every B."""
        return [*(layer.a for layer in self.layers), *(layer.b for layer in self.layers)]

    def prepare(self, x: Tensor, outputs: int, weights: Sequence[Weights]) -> FusedKernel:
        """Return the kernel for inputs like `x` `(..., in)`; weights are those of `pack_lora`."""
        a, bt = zip(*weights, strict=True)
        kind = LoRAProducts if self._prefers_products(a) else FusedLoRA
        return kind(x.shape[:-1].numel(), self.rows, a, bt)

    def _prefers_products(self, a: Sequence[Tensor]) -> bool:
        is_large = max(map(len, a)) > MAX_CPP_RANK and mean_tokens(self.rows) > MAX_CPP_TOKENS
        return is_large or prefers_products(self.rows, a[0].dtype)

    def saved_tensors(self, weights: Sequence[Weights]) -> list[Tensor]:
        """Return the packed weights: every A, then every B transposed."""
        return [matrix for kind in zip(*weights, strict=True) for matrix in kind]

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, saved: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of every A and B, float32; that of x is added to `grad_x`."""
        a, bt = saved[: len(self.layers)], saved[len(self.layers) :]
        if self._prefers_products(a):
            grad_a, grad_bt = _product_gradients(grad, x, grad_x, self.rows, a, bt)
        else:
            grad_a, grad_bt = _weight_gradients(grad, x, grad_x, *segment_table(self.rows), a, bt)
        return [*grad_a, *(t.T for t in grad_bt)]

    def apply(self, y: Tensor, x: Tensor) -> Tensor:
        """Return `grouped_lora`."""
        a, b = ([getattr(layer, name) for layer in self.layers] for name in ("a", "b"))
        return grouped_lora(y, x, self.rows, a, b)


def _product_gradients(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor | None,
    rows: Sequence[SegmentRow],
    a: Sequence[Tensor],
    bt: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what `_weight_gradients` does, by PyTorch's products."""
    grad_a, grad_bt = ([torch.zeros(t.shape) for t in ts] for ts in (a, bt))
    if grad_x is not None:
        grad_x = grad_x.flatten(0, -2)
    for start, end, k, weight in rows:
        x_row, grad_row = x[start:end], grad[start:end]
        low, grad_low = weight * (x_row @ a[k].T), weight * (grad_row @ bt[k].T)
        if grad_x is not None:
            grad_x[start:end].addmm_(grad_low, a[k])
        grad_a[k] += grad_low.T @ x_row
        grad_bt[k] += low.T @ grad_row
    return grad_a, grad_bt


# ---- references; table (num_rows, 3) int64: start, end, adapter, sorted by adapter


def lora_reference(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> Tensor:
    """Return the sum, in PyTorch."""
    y = y.clone()
    for start, end, k, weight in table_rows(table, weights):
        y[start:end] += weight * (x[start:end] @ a[k].T) @ bt[k]
    return y


def lora_backward_reference(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the gradients of x, of each A and of each B transposed."""
    sum_dtype, grad_x = torch.promote_types(x.dtype, torch.float32), torch.zeros_like(x)
    grad_a, grad_bt = ([torch.zeros_like(t, dtype=sum_dtype) for t in ts] for ts in (a, bt))
    for start, end, k, weight in table_rows(table, weights):
        low, grad_low = weight * x[start:end] @ a[k].T, weight * grad[start:end] @ bt[k].T
        grad_x[start:end] += grad_low @ a[k]
        grad_a[k] += grad_low.T @ x[start:end]
        grad_bt[k] += low.T @ grad[start:end]
    return grad_x, [t.to(x.dtype) for t in grad_a], [t.to(x.dtype) for t in grad_bt]


# ---- the operations


def _weight_gradients(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor | None,
    table: Tensor,
    weights: Tensor,
    a: Sequence[Tensor],
    bt: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each A and B transposed, float32; that of x is added to `grad_x`."""
    grad_a, grad_bt = ([torch.empty(t.shape) for t in ts] for ts in (a, bt))
    kernels.lora_backward(
        TYPES[x.dtype],
        *x.shape,
        grad.shape[-1],
        data_pointer(table),
        data_pointer(weights),
        len(table),
        [len(t) for t in a],
        [data_pointer(t) for t in a],
        [data_pointer(t) for t in bt],
        data_pointer(x),
        data_pointer(grad),
        data_pointer(grad_x),
        [data_pointer(t) for t in grad_a],
        [data_pointer(t) for t in grad_bt],
    )
    return grad_a, grad_bt


def _run(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> Tensor:
    if not kernels.cpp_accepts(x, y, *a, *bt):
        return lora_reference(y, x, table, weights, a, bt)
    y = y.clone(memory_format=torch.contiguous_format)
    if not a:
        return y
    a, bt = [t.contiguous() for t in a], [t.contiguous() for t in bt]
    return FusedLoRA(len(x), table_rows(table, weights), a, bt).add(y, x)


def _run_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if not kernels.cpp_accepts(x, grad, *a, *bt):
        return lora_backward_reference(grad, x, table, weights, a, bt)
    grad, x, grad_x = grad.contiguous(), x.contiguous(), torch.zeros(x.shape, dtype=x.dtype)
    a, bt = [t.contiguous() for t in a], [t.contiguous() for t in bt]
    grad_a, grad_bt = _weight_gradients(grad, x, grad_x, table, weights, a, bt)
    return grad_x, [t.to(x.dtype) for t in grad_a], [t.to(x.dtype) for t in grad_bt]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, table, weights, a, bt = inputs
    ctx.save_for_backward(x, table, weights, *a, *bt)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, table, weights, *matrices = ctx.saved_tensors
    a, bt = matrices[: len(matrices) // 2], matrices[len(matrices) // 2 :]
    grad_x, grad_a, grad_bt = _lora_backward(grad, x, table, weights, a, bt)
    return grad, grad_x, None, None, grad_a, grad_bt


_ARGUMENTS = "Tensor table, Tensor weights, Tensor[] a, Tensor[] bt"
_lora = register_op(
    f"grouped_lora(Tensor y, Tensor x, {_ARGUMENTS}) -> Tensor",
    _run,
    lambda y, x, table, weights, a, bt: torch.empty_like(y),
    _gradients,
    _keep,
)
_lora_backward = register_op(
    f"grouped_lora_backward(Tensor grad, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor[], Tensor[])",
    _run_backward,
    lambda grad, x, table, weights, a, bt: (
        torch.empty_like(x),
        [torch.empty_like(t) for t in a],
        [torch.empty_like(t) for t in bt],
    ),
)
