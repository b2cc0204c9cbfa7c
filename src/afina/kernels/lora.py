"""The grouped low-rank product: all adapters' parts of a layer in one call, whatever their ranks.

    x, y     | t t t t t | j j j | t t t t |        one flat run
    rows       (0, 5, k=0, .5) (5, 8, k=1, 1.) (8, 12, k=0, 1.) (8, 12, k=1, 2.)    who acts where, how strongly

    y[rows] += weight * (x[rows] A_k^T) B_k^T        A_k (r_k, in), B_k (out, r_k)

Nothing is gathered, copied or padded to the largest rank. The same table serves training eight adapters, and a decoding
step in which each row has an adapter of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op

SegmentRow = tuple[
    int, int, int, float
]  # start, end, adapter (a place in the lists of A and B), weight


def grouped_lora(
    y: Tensor, x: Tensor, rows: Sequence[SegmentRow], a: Sequence[Tensor], b: Sequence[Tensor]
) -> Tensor:
    """y (T, out) plus, on each row's tokens of x (T, in), weight * (x A_k^T) B_k^T; gradients reach y, x, every A and B.

    Rows may overlap. A and B of another dtype (float32 parameters under bf16 activations) are rounded to that of x.
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


class FusedLoRA:
    """The same for inference: one table with its matrices, ready for any number of x and y of one shape and dtype.

    `a` (r, in) and `bt` (r, out), B transposed, are in the dtype of x, contiguous and on the CPU. They are kept, not
    copied: what is written into them counts from the next call on.
    """

    def __init__(
        self, tokens: int, rows: Sequence[SegmentRow], a: Sequence[Tensor], bt: Sequence[Tensor]
    ) -> None:
        check_rows(rows, tokens, len(a))
        width, out, dtype = a[0].shape[1], bt[0].shape[1], a[0].dtype
        for left, right in zip(a, bt, strict=True):
            fits = (
                left.shape == (len(right), width) and right.shape[1] == out and left.dtype == dtype
            )
            if (
                not fits
                or not kernels.cpp_accepts(left, right)
                or not (left.is_contiguous() and right.is_contiguous())
            ):
                raise ValueError(
                    f"A {tuple(left.shape)} and B transposed {tuple(right.shape)} do not fit each other"
                )
        self.width, self.sizes, self.dtype, self._matrices = (
            width,
            (tokens * width, tokens * out),
            dtype,
            (a, bt),
        )
        ordered = sorted(rows, key=lambda row: row[2])
        self._native = kernels.library.FusedLoRA(
            torch.get_num_threads(),
            TYPES[dtype],
            tokens,
            width,
            out,
            [n for row in ordered for n in row[:3]],
            [row[3] for row in ordered],
            [len(t) for t in a],
            [data_pointer(t) for t in a],
            [data_pointer(t) for t in bt],
        )

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., out), contiguous, to which the adapters' parts are added in place; x (..., in).

        Raises `ValueError` where they are not of the prepared size and dtype.
        """
        fits = (
            (x.numel(), y.numel()) == self.sizes
            and x.shape[-1] == self.width
            and x.dtype == y.dtype == self.dtype
        )
        if not fits or not y.is_contiguous():
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)}, {x.dtype}, are not what was prepared for"
            )
        x = x.contiguous()
        kernels.add(self._native, data_pointer(x), data_pointer(y))
        return y


def check_rows(rows: Sequence[SegmentRow], tokens: int, adapters: int) -> None:
    """Raise `ValueError` where a row is not of `tokens` tokens and `adapters` adapters."""
    for start, end, adapter, _ in rows:
        if not 0 <= start <= end <= tokens or not 0 <= adapter < adapters:
            raise ValueError(
                f"row ({start}, {end}, {adapter}) does not fit {tokens} tokens and {adapters} adapters"
            )


@dataclass(frozen=True)
class LoRAGroup:
    """The parts of low-rank adapters as `adapted_linear` takes them: what acts where, A (r, in) and B (out, r) of each."""

    rows: Sequence[SegmentRow]
    a: Sequence[Tensor]
    b: Sequence[Tensor]

    @property
    def adapters(self) -> int:
        """How many there are."""
        return len(self.a)

    @property
    def learned(self) -> list[Tensor]:
        """What gradients reach."""
        return [*self.a, *self.b]

    def apply(self, y: Tensor, x: Tensor) -> Tensor:
        """y (T, out) plus the parts: `grouped_lora`."""
        return grouped_lora(y, x, self.rows, self.a, self.b)

    def add(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """y (T, out), to which the parts are added in place; what the way back wants to be kept."""
        if any(
            left.shape != (right.shape[1], x.shape[-1])
            for left, right in zip(self.a, self.b, strict=True)
        ):
            raise ValueError(f"x {tuple(x.shape)} does not fit")
        a, bt = (
            [t.to(x.dtype).contiguous() for t in self.a],
            [t.T.to(x.dtype).contiguous() for t in self.b],
        )
        table = segment_table(self.rows)
        kernels.lora(*_about(x, y.shape[-1], *table, a, bt), data_pointer(x), data_pointer(y))
        return [*a, *bt]

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of each A and B, float32; that of x is added to `grad_x`."""
        half = len(kept) // 2
        a, bt = list(kept[:half]), list(kept[half:])
        table, made = segment_table(self.rows), [torch.empty(t.shape) for t in kept]
        kernels.lora_backward(
            *_about(x, grad.shape[-1], *table, a, bt),
            data_pointer(x),
            data_pointer(grad),
            data_pointer(grad_x),
            [data_pointer(t) for t in made[:half]],
            [data_pointer(t) for t in made[half:]],
        )
        return [*made[:half], *(t.T for t in made[half:])]


def segment_table(rows: Sequence[SegmentRow]) -> tuple[Tensor, Tensor]:
    """Rows in the order of their adapters: (rows, 3) int64 of start, end, adapter; and their weights (rows) float32."""
    ordered = sorted(rows, key=lambda row: row[2])
    table = torch.tensor([row[:3] for row in ordered], dtype=torch.int64).view(-1, 3)
    return table, torch.tensor([row[3] for row in ordered], dtype=torch.float32)


# ---- references; table (rows, 3) int64: start, end, adapter, in the order of the adapters; bt: B transposed (r, out)


def lora_reference(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> Tensor:
    """The sum, in PyTorch."""
    y = y.clone()
    for (start, end, k), weight in zip(table.tolist(), weights.tolist(), strict=True):
        y[start:end] += weight * (x[start:end] @ a[k].T) @ bt[k]
    return y


def lora_backward_reference(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Gradients of x, of each A and of each B transposed."""
    wide, grad_x = torch.promote_types(x.dtype, torch.float32), torch.zeros_like(x)
    grad_a, grad_bt = ([torch.zeros_like(t, dtype=wide) for t in ts] for ts in (a, bt))
    for (start, end, k), weight in zip(table.tolist(), weights.tolist(), strict=True):
        low, thin = weight * x[start:end] @ a[k].T, weight * grad[start:end] @ bt[k].T
        grad_x[start:end] += thin @ a[k]
        grad_a[k] += thin.T @ x[start:end]
        grad_bt[k] += low.T @ grad[start:end]
    return grad_x, [t.to(x.dtype) for t in grad_a], [t.to(x.dtype) for t in grad_bt]


# ---- the operations


def _about(
    x: Tensor, out: int, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Any, ...]:
    """What both kernels take first."""
    ranks = [len(t) for t in a]
    places = ([data_pointer(t) for t in a], [data_pointer(t) for t in bt])
    return (
        TYPES[x.dtype],
        *x.shape,
        out,
        data_pointer(table),
        data_pointer(weights),
        len(table),
        ranks,
        *places,
    )


def _run(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> Tensor:
    if not kernels.cpp_accepts(x, y, *a, *bt):
        return lora_reference(y, x, table, weights, a, bt)
    y, x = y.clone(memory_format=torch.contiguous_format), x.contiguous()
    a, bt = [t.contiguous() for t in a], [t.contiguous() for t in bt]
    kernels.lora(*_about(x, y.shape[1], table, weights, a, bt), data_pointer(x), data_pointer(y))
    return y


def _run_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, a: list[Tensor], bt: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if not kernels.cpp_accepts(x, grad, *a, *bt):
        return lora_backward_reference(grad, x, table, weights, a, bt)
    grad, x, grad_x = grad.contiguous(), x.contiguous(), torch.zeros(x.shape, dtype=x.dtype)
    a, bt = [t.contiguous() for t in a], [t.contiguous() for t in bt]
    grad_a, grad_bt = ([torch.empty(t.shape) for t in ts] for ts in (a, bt))
    kernels.lora_backward(
        *_about(x, grad.shape[1], table, weights, a, bt),
        data_pointer(x),
        data_pointer(grad),
        data_pointer(grad_x),
        [data_pointer(t) for t in grad_a],
        [data_pointer(t) for t in grad_bt],
    )
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
