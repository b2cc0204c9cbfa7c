"""Grouped MoRA: outputs of all MoRA adapters of a module in one call, of any ranks and operators.

    y[rows] += weight * unfold(M_k fold(x[rows]))        M_k (q_k, q_k)

fold makes `num_vectors` vectors of q elements of a row, unfold a row of such vectors; neither has
parameters (`afina.adapters.mora` has the formulas). In C++ a tile of rows passes through all three
steps in the cache, forward and backward, and the input of M is recomputed for its gradient rather
than kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.adapter_group import (
    AdapterGroup,
    FusedKernel,
    SegmentRow,
    Weights,
    check_rows,
    prefers_products,
    segment_table,
    sort_rows,
    table_rows,
)
from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op


@dataclass(frozen=True)
class MoRALayout:
    """A MoRA operator at a module.

    Vectors are blocks of q neighbors, added in turn; `is_rotated` rotates each block by its own
    angles first. With `is_sharing` there is one vector, of the sums of q runs of neighbors; the
    first runs are longer by one where q does not divide.

    Attributes:
        size: q.
        num_vectors: How many vectors M takes of a row.
        num_inputs: Inputs that are read, from the first.
        num_outputs: Outputs that are written, from the first.
    """

    size: int
    num_vectors: int
    num_inputs: int
    num_outputs: int
    is_sharing: bool = False
    is_rotated: bool = False

    @property
    def num_blocks(self) -> int:
        """How many blocks of q inputs there are, the last one perhaps not full."""
        return -(-self.num_inputs // self.size)

    def check(self, inputs: int, outputs: int) -> None:
        """Raise `ValueError` where the operator does not fit a module of these sizes."""
        most = max(1, min(self.num_blocks, -(-self.num_outputs // self.size)))
        fits = self.num_vectors == 1 if self.is_sharing else 0 < self.num_vectors <= most
        if (
            not fits
            or self.num_inputs > inputs
            or self.num_outputs > outputs
            or (self.is_rotated and self.size % 2)
        ):
            raise ValueError(f"{self} does not fit {inputs} inputs and {outputs} outputs")

    def fold(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Return the vectors that M takes of x `(num_tokens, in)`: `(num_tokens, num_vectors, q)`.

        `rotation` is `rotation_angles` on the device of x, needed where that is not the CPU.
        """
        x = x[:, : self.num_inputs]
        if self.is_sharing:
            run, num_longer = divmod(self.num_inputs, self.size)
            first, rest = x.tensor_split([num_longer * (run + 1)], 1)
            sums = (
                first.unflatten(1, (num_longer, run + 1)).sum(2),
                rest.unflatten(1, (self.size - num_longer, run)).sum(2),
            )
            return torch.cat(sums, 1)[:, None]
        padded = F.pad(x, (0, -self.num_inputs % self.size))
        blocks = padded.unflatten(1, (-1, self.size))  # (num_tokens, num_blocks, q)
        if self.is_rotated:
            blocks = rotate_pairs(
                blocks, *(rotation or rotation_angles(self.size, self.num_blocks))
            )
        if blocks.shape[1] == self.num_vectors:
            return blocks
        blocks = F.pad(blocks, (0, 0, 0, -blocks.shape[1] % self.num_vectors))
        return blocks.unflatten(1, (-1, self.num_vectors)).sum(1)

    def unfold(self, z: Tensor, outputs: int) -> Tensor:
        """Return the outputs `(num_tokens, outputs)` of z `(num_tokens, num_vectors, q)`."""
        if self.is_sharing:
            run, num_longer = divmod(self.num_outputs, self.size)
            first, rest = z[:, 0, :, None].tensor_split([num_longer], 1)
            first = first.expand(-1, -1, run + 1).flatten(1)
            return torch.cat([first, rest.expand(-1, -1, run).flatten(1)], 1)
        times = math.ceil(self.num_outputs / (self.size * self.num_vectors))
        repeated = z.repeat(1, times, 1).flatten(1)[:, : self.num_outputs]
        return F.pad(repeated, (0, outputs - self.num_outputs))


@lru_cache(maxsize=256)
def rotation_angles(size: int, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, `(num_blocks, q / 2)` float32, of the rotations.

    Block I rotates the pair (j, j + q/2) by I / 10000^(2j/q).
    """
    frequencies = 10000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(num_blocks)[:, None] / frequencies
    return _padded(angles.cos().float()), _padded(angles.sin().float())


def _padded(t: Tensor) -> Tensor:
    """Return a copy after which 16 more elements can be read, as the kernels do."""
    return F.pad(t.flatten(), (0, 16))[: t.numel()].view(t.shape)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x `(..., q)` with pairs at distance q / 2 rotated; cos and sin are `(..., q / 2)`.

    The paper writes pairs of neighbors: equal but for the order of inputs, and 3 times slower
    (512 x 1024, bfloat16).
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat(
        [torch.addcmul(first * cos, second, -sin), torch.addcmul(first * sin, second, cos)], -1
    )


def grouped_mora(
    y: Tensor,  # (num_tokens, out)
    x: Tensor,  # (num_tokens, in)
    rows: Sequence[SegmentRow],
    layouts: Sequence[MoRALayout],
    m: Sequence[Tensor],  # each (q, q)
) -> Tensor:
    """Return y plus, on the tokens of each row, weight * unfold(M_k fold(x)).

    Gradients reach y, x and every M. Rows may overlap. M of another dtype (float32 parameters
    under bfloat16 activations) is rounded to that of x.

    Raises:
        ValueError: rows or shapes do not fit each other.
    """
    check_rows(rows, len(x), len(m))
    for layout, matrix in zip(layouts, m, strict=True):
        layout.check(x.shape[1], y.shape[1])
        if matrix.shape != (layout.size, layout.size):
            raise ValueError(f"M {tuple(matrix.shape)} does not fit {layout}")
    if len(y) != len(x):
        raise ValueError(f"y {tuple(y.shape)} does not fit x {tuple(x.shape)}")
    return _mora(y, x, *segment_table(rows), _to_ints(layouts), [t.to(x.dtype) for t in m])


def _to_ints(layouts: Sequence[MoRALayout]) -> list[int]:
    """Return the fields of the layouts, six each: torch.library takes no other types."""
    return [int(n) for layout in layouts for n in vars(layout).values()]


def _from_ints(numbers: Sequence[int]) -> list[MoRALayout]:
    fields = [numbers[start : start + 6] for start in range(0, len(numbers), 6)]
    return [MoRALayout(a, b, c, d, bool(e), bool(f)) for a, b, c, d, e, f in fields]


def pack_mora(m: Tensor, dtype: torch.dtype, transposed: bool = True) -> Tensor:
    """Return M `(q, q)` packed for products with rows of `dtype` in the current instruction set.

    The product of the forward pass reads M `transposed`, that of the gradients M itself.
    """
    size, width = len(m), kernels.library.panel_width(TYPES[dtype])
    packed = torch.empty(math.ceil(size / width) * size + 16, dtype=torch.int32)
    m = m.detach().float().contiguous()
    kernels.mora_units(data_pointer(m), TYPES[dtype], size, transposed, data_pointer(packed))
    return packed


class FusedMoRA(FusedKernel):
    """The kernel for one table of rows with packed weights, which are referenced and not copied."""

    def __init__(
        self,
        x: Tensor,  # (..., in)
        outputs: int,
        rows: Sequence[SegmentRow],
        layouts: Sequence[MoRALayout],
        packed: Sequence[Tensor],  # `pack_mora` of each M
    ) -> None:
        num_tokens, inputs = x.shape[:-1].numel(), x.shape[-1]
        check_rows(rows, num_tokens, len(layouts))
        for layout in layouts:
            layout.check(inputs, outputs)
        angles = [
            rotation_angles(layout.size, layout.num_blocks) if layout.is_rotated else None
            for layout in layouts
        ]
        ordered = sort_rows(rows)
        native = kernels.library.FusedMoRA(
            torch.get_num_threads(),
            TYPES[x.dtype],
            num_tokens,
            inputs,
            outputs,
            [n for row in ordered for n in row[:3]],
            [row[3] for row in ordered],
            [int(n) for layout in layouts for n in [*vars(layout).values()][:5]],
            [data_pointer(pair[0]) if pair else 0 for pair in angles],
            [data_pointer(pair[1]) if pair else 0 for pair in angles],
            [data_pointer(t) for t in packed],
        )
        super().__init__(
            kernels.mora, native, (packed, angles), (num_tokens, inputs, outputs), x.dtype
        )


class MoRAProducts(FusedKernel):
    """What `FusedMoRA` computes, by PyTorch's products, a row at a time."""

    def __init__(
        self,
        x: Tensor,  # (..., in)
        outputs: int,
        rows: Sequence[SegmentRow],
        layouts: Sequence[MoRALayout],
        m: Sequence[Tensor],  # each (q, q)
    ) -> None:
        num_tokens, inputs = x.shape[:-1].numel(), x.shape[-1]
        check_rows(rows, num_tokens, len(layouts))
        super().__init__(kernels.mora, None, m, (num_tokens, inputs, outputs), x.dtype)
        self.rows, self.layouts, self.m = rows, layouts, m

    def _add(self, y: Tensor, x: Tensor) -> None:
        y, x = y.flatten(0, -2), x.flatten(0, -2)
        for start, end, k, weight in self.rows:
            layout = self.layouts[k]
            low = F.linear(layout.fold(x[start:end]), self.m[k])
            y[start:end].add_(layout.unfold(low, y.shape[1]), alpha=weight)


class MoRAGroup(AdapterGroup):
    """MoRA layers of one module: the kernel reads M, `m` `(q, q)`, and the operator, `layout`."""

    @property
    def parameters(self) -> list[Tensor]:
        """Every M."""
        return [layer.m for layer in self.layers]

    def prepare(self, x: Tensor, outputs: int, weights: Sequence[Weights]) -> FusedKernel:
        """Return the kernel for inputs like `x` `(..., in)`; weights are those of `pack_mora`."""
        if prefers_products(self.rows, x.dtype):
            m = [t.detach().to(x.dtype) for t in self.parameters]
            return MoRAProducts(x, outputs, self.rows, self._layouts, m)
        return FusedMoRA(x, outputs, self.rows, self._layouts, [packed for (packed,) in weights])

    def saved_tensors(self, weights: Sequence[Weights]) -> list[Tensor]:
        """Return every M: the gradients read it in another layout than the forward pass."""
        return self.parameters

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, saved: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradient of every M, float32; that of x is added to `grad_x`."""
        if not prefers_products(self.rows, x.dtype):
            return _weight_gradients(grad, x, grad_x, self.rows, self._layouts, saved)
        table = segment_table(self.rows)
        added, grads = mora_backward_reference(grad, x, *table, _to_ints(self._layouts), [*saved])
        if grad_x is not None:
            grad_x += added.view(grad_x.shape)
        return [t.float() for t in grads]

    def apply(self, y: Tensor, x: Tensor) -> Tensor:
        """Return `grouped_mora`."""
        return grouped_mora(y, x, self.rows, self._layouts, self.parameters)

    @property
    def _layouts(self) -> list[MoRALayout]:
        return [layer.layout for layer in self.layers]


# ---- references; table (num_rows, 3) int64: start, end, adapter, sorted by adapter


def mora_reference(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, layouts: list[int], m: list[Tensor]
) -> Tensor:
    """Return the sum, in PyTorch."""
    y, operators = y.clone(), _from_ints(layouts)
    for start, end, k, weight in table_rows(table, weights):
        low = F.linear(operators[k].fold(x[start:end]), m[k])
        y[start:end] += weight * operators[k].unfold(low, y.shape[1])
    return y


def mora_backward_reference(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, layouts: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of x and of each M."""
    inputs = [t.detach() for t in (x, *m)]
    with torch.enable_grad():
        x, *m = (t.requires_grad_() for t in inputs)
        y = mora_reference(torch.zeros_like(grad), x, table, weights, layouts, m)
        if not y.requires_grad:  # no rows
            return torch.zeros_like(x), [torch.zeros_like(t) for t in m]
        grads = torch.autograd.grad(y, [x, *m], grad, materialize_grads=True)
    return grads[0], list(grads[1:])


# ---- the operations


def _weight_gradients(
    grad: Tensor,
    x: Tensor,
    grad_x: Tensor | None,
    rows: Sequence[SegmentRow],
    layouts: Sequence[MoRALayout],
    m: Sequence[Tensor],
) -> list[Tensor]:
    """Return the gradient of each M, float32; that of x is added to `grad_x`."""
    packed = [pack_mora(t, x.dtype, transposed=False) for t in m]
    kernel = FusedMoRA(x, grad.shape[-1], rows, layouts, packed)
    gradients = [torch.empty(t.shape) for t in m]
    kernels.mora_backward(
        kernel.native,
        data_pointer(x),
        data_pointer(grad),
        data_pointer(grad_x),
        [data_pointer(t) for t in gradients],
    )
    return gradients


def _run(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, layouts: list[int], m: list[Tensor]
) -> Tensor:
    if not kernels.cpp_accepts(x, y, *m):
        return mora_reference(y, x, table, weights, layouts, m)
    y, packed = y.clone(memory_format=torch.contiguous_format), [pack_mora(t, x.dtype) for t in m]
    rows = table_rows(table, weights)
    return FusedMoRA(x, y.shape[1], rows, _from_ints(layouts), packed).add(y, x)


def _run_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, layouts: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    if not kernels.cpp_accepts(x, grad, *m):
        return mora_backward_reference(grad, x, table, weights, layouts, m)
    grad, x, grad_x = grad.contiguous(), x.contiguous(), torch.zeros(x.shape, dtype=x.dtype)
    rows = table_rows(table, weights)
    grads = _weight_gradients(grad, x, grad_x, rows, _from_ints(layouts), m)
    return grad_x, [t.to(x.dtype) for t in grads]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, table, weights, layouts, m = inputs
    ctx.save_for_backward(x, table, weights, *m)
    ctx.layouts = layouts


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, table, weights, *m = ctx.saved_tensors
    grad_x, grad_m = _mora_backward(grad, x, table, weights, ctx.layouts, m)
    return grad, grad_x, None, None, None, grad_m


_ARGUMENTS = "Tensor table, Tensor weights, int[] layouts, Tensor[] m"
_mora = register_op(
    f"grouped_mora(Tensor y, Tensor x, {_ARGUMENTS}) -> Tensor",
    _run,
    lambda y, x, table, weights, layouts, m: torch.empty_like(y),
    _gradients,
    _keep,
)
_mora_backward = register_op(
    f"grouped_mora_backward(Tensor grad, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor[])",
    _run_backward,
    lambda grad, x, table, weights, layouts, m: (
        torch.empty_like(x),
        [torch.empty_like(t) for t in m],
    ),
)
