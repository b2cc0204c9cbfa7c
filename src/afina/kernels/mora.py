"""The grouped square product: the parts of all MoRA adapters of a layer in one call, whatever their ranks and operators.

    y[rows] += weight * unfold(M_k fold(x[rows]))        M_k (q_k, q_k)

fold makes of a row `slots` vectors of q numbers, unfold a row of such vectors; neither learns anything (delta/mora.py
has the formulas). In C++ a tile of rows passes through all three steps in the cache, forwards and backwards, and what M
takes is made again for its gradient rather than kept.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from afina.kernels.dispatch import TYPES, data_pointer, kernels, register_op
from afina.kernels.lora import SegmentRow, check_rows, segment_table


@dataclass(frozen=True)
class MoRALayout:
    """An operator at a layer: q, the vectors that M takes of a row, inputs and outputs it has to do with, from the first.

    Vectors are blocks of q neighbours added round and round, each block turned by its own angles first if `turned`; or,
    with `runs`, the one vector of the sums of q runs of neighbours, those in front longer by one where q does not divide.
    """

    size: int
    num_vectors: int
    num_inputs: int
    num_outputs: int
    is_sharing: bool = False
    is_rotated: bool = False

    def fold(self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (T, in) as vectors that M takes: (T, slots, q); `turns` are the `angles` on the device of x, if it is no CPU."""
        x = x[:, : self.num_inputs]
        if self.is_sharing:
            run, longer = divmod(self.num_inputs, self.size)
            first, rest = x.tensor_split([longer * (run + 1)], 1)
            sums = (
                first.unflatten(1, (longer, run + 1)).sum(2),
                rest.unflatten(1, (self.size - longer, run)).sum(2),
            )
            return torch.cat(sums, 1)[:, None]
        blocks = F.pad(x, (0, -self.num_inputs % self.size)).unflatten(
            1, (-1, self.size)
        )  # (T, blocks, q)
        if self.is_rotated:
            blocks = rotate_pairs(blocks, *(turns or rotation_angles(self.size, blocks.shape[1])))
        if blocks.shape[1] == self.num_vectors:
            return blocks
        return (
            F.pad(blocks, (0, 0, 0, -blocks.shape[1] % self.num_vectors))
            .unflatten(1, (-1, self.num_vectors))
            .sum(1)
        )

    def unfold(self, z: Tensor, out: int) -> Tensor:
        """Outputs (T, out) of what M gave, z (T, slots, q)."""
        if self.is_sharing:
            run, longer = divmod(self.num_outputs, self.size)
            first, rest = z[:, 0, :, None].tensor_split([longer], 1)
            return torch.cat(
                [first.expand(-1, -1, run + 1).flatten(1), rest.expand(-1, -1, run).flatten(1)], 1
            )
        times = math.ceil(self.num_outputs / (self.size * self.num_vectors))
        return F.pad(
            z.repeat(1, times, 1).flatten(1)[:, : self.num_outputs], (0, out - self.num_outputs)
        )


@lru_cache(maxsize=256)
def rotation_angles(size: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (blocks, q / 2) float32: block I turns the pair (j, j + q/2) by I / 10000^(2j/q)."""
    at = torch.arange(blocks)[:, None] / 10000 ** (
        torch.arange(0, size, 2, dtype=torch.float64) / size
    )
    return _with_room(at.cos().float()), _with_room(at.sin().float())


def _with_room(t: Tensor) -> Tensor:
    """The same numbers where 16 more can be read."""
    return F.pad(t.flatten(), (0, 16))[: t.numel()].view(t.shape)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., q) with each pair, q / 2 apart, turned by its angle; cos and sin (..., q / 2).

    The paper writes pairs of neighbours: the same but for the order of inputs, and 3 times slower (512 x 1024, bf16).
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat(
        [torch.addcmul(first * cos, second, -sin), torch.addcmul(first * sin, second, cos)], -1
    )


def grouped_mora(
    y: Tensor,
    x: Tensor,
    rows: Sequence[SegmentRow],
    forms: Sequence[MoRALayout],
    m: Sequence[Tensor],
) -> Tensor:
    """y (T, out) plus, on each row's tokens of x (T, in), weight * unfold(M_k fold(x)); gradients reach y, x and every M.

    Rows may overlap. M (q, q) of another dtype (float32 parameters under bf16 activations) is rounded to that of x.
    """
    check_rows(rows, len(x), len(m))
    for form, matrix in zip(forms, m, strict=True):
        _check(form, x.shape[1], y.shape[1])
        if matrix.shape != (form.size, form.size):
            raise ValueError(f"M {tuple(matrix.shape)} does not fit {form}")
    if len(y) != len(x):
        raise ValueError(f"y {tuple(y.shape)} does not fit x {tuple(x.shape)}")
    return _mora(y, x, *segment_table(rows), _numbers(forms), [t.to(x.dtype) for t in m])


def _check(form: MoRALayout, width: int, out: int) -> None:
    blocks = [-(-count // form.size) for count in (form.num_inputs, form.num_outputs)]
    whole = (
        form.num_vectors == 1 if form.is_sharing else 0 < form.num_vectors <= max(1, min(blocks))
    )
    if (
        not whole
        or not form.num_inputs <= width
        or not form.num_outputs <= out
        or (form.is_rotated and form.size % 2)
    ):
        raise ValueError(f"{form} does not fit {width} inputs and {out} outputs")


def _numbers(forms: Sequence[MoRALayout]) -> list[int]:
    return [
        int(n)
        for f in forms
        for n in (f.size, f.num_vectors, f.num_inputs, f.num_outputs, f.is_sharing, f.is_rotated)
    ]


def _forms(numbers: Sequence[int]) -> list[MoRALayout]:
    sixes = zip(*[iter(numbers)] * 6, strict=True)
    return [
        MoRALayout(size, slots, reads, writes, bool(runs), bool(turned))
        for size, slots, reads, writes, runs, turned in sixes
    ]


def pack_weight(m: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """M (q, q), or its transpose, rounded to `dtype` and laid out as the kernel's products read it, in this instruction set."""
    size, width = len(m), kernels.library.panel_width(TYPES[dtype])
    packed = torch.empty(math.ceil(size / width) * size + 16, dtype=torch.int32)
    m = m.detach().float().contiguous()
    kernels.mora_units(data_pointer(m), TYPES[dtype], size, transposed, data_pointer(packed))
    return packed


def table_of(
    x: Tensor,
    out: int,
    rows: Sequence[SegmentRow],
    forms: Sequence[MoRALayout],
    matrices: Sequence[Tensor],
) -> tuple[Any, list[Tensor]]:
    """The kernel's table for x (..., in), and what it points at.

    `matrices` are `units`: of M transposed for the product, of M for its gradients.
    """
    turns = [
        rotation_angles(f.size, -(-f.num_inputs // f.size)) if f.is_rotated else None for f in forms
    ]
    rows = sorted(
        rows, key=lambda row: row[2]
    )  # the kernel wants them in the order of the adapters
    made = kernels.library.FusedMoRA(
        torch.get_num_threads(),
        TYPES[x.dtype],
        x.shape[:-1].numel(),
        x.shape[-1],
        out,
        [n for row in rows for n in row[:3]],
        [row[3] for row in rows],
        [
            int(n)
            for f in forms
            for n in (f.size, f.num_vectors, f.num_inputs, f.num_outputs, f.is_sharing)
        ],
        [data_pointer(t[0]) if t else 0 for t in turns],
        [data_pointer(t[1]) if t else 0 for t in turns],
        [data_pointer(t) for t in matrices],
    )
    return made, [*matrices, *(t for pair in turns if pair for t in pair)]


class FusedMoRA:
    """The same for inference: one table with its matrices, ready for any number of x and y of one shape and dtype.

    `matrices` are `units` of each M transposed.
    """

    def __init__(
        self,
        x: Tensor,
        out: int,
        rows: Sequence[SegmentRow],
        forms: Sequence[MoRALayout],
        matrices: Sequence[Tensor],
    ) -> None:
        tokens, width = x.shape[:-1].numel(), x.shape[-1]
        check_rows(rows, tokens, len(forms))
        for form in forms:
            _check(form, width, out)
        self.sizes, self.dtype = (tokens * width, tokens * out), x.dtype
        self._native, self._held = table_of(x, out, rows, forms, matrices)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., out), contiguous, to which the adapters' parts are added in place; x (..., in)."""
        if (
            (x.numel(), y.numel()) != self.sizes
            or not x.dtype == y.dtype == self.dtype
            or not y.is_contiguous()
        ):
            raise ValueError(
                f"x {tuple(x.shape)} and y {tuple(y.shape)}, {x.dtype}, are not what was prepared for"
            )
        x = x.contiguous()
        kernels.mora(self._native, data_pointer(x), data_pointer(y))
        return y


@dataclass(frozen=True)
class MoRAGroup:
    """The parts of MoRA adapters as `adapted_linear` takes them: what acts where, their operators and matrices M (q, q)."""

    rows: Sequence[SegmentRow]
    forms: Sequence[MoRALayout]
    m: Sequence[Tensor]

    @property
    def adapters(self) -> int:
        """How many there are."""
        return len(self.m)

    @property
    def learned(self) -> list[Tensor]:
        """What gradients reach."""
        return [*self.m]

    def apply(self, y: Tensor, x: Tensor) -> Tensor:
        """y (T, out) plus the parts: `grouped_mora`."""
        return grouped_mora(y, x, self.rows, self.forms, self.m)

    def add(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """y (T, out), to which the parts are added in place; what the way back wants to be kept."""
        matrices = [pack_weight(t, x.dtype, True) for t in self.m]
        table, _held = table_of(x, y.shape[-1], self.rows, self.forms, matrices)
        kernels.mora(table, data_pointer(x), data_pointer(y))
        return self.learned

    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, kept: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of M, float32; that of x is added to `grad_x`."""
        matrices = [pack_weight(t, x.dtype, False) for t in kept]
        table, _held = table_of(x, grad.shape[-1], self.rows, self.forms, matrices)
        made = [torch.empty(t.shape) for t in kept]
        kernels.mora_backward(
            table,
            data_pointer(x),
            data_pointer(grad),
            data_pointer(grad_x),
            [data_pointer(t) for t in made],
        )
        return made


# ---- references; table (rows, 3) int64: start, end, adapter, in the order of the adapters


def mora_reference(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> Tensor:
    """The sum, in PyTorch."""
    y, known = y.clone(), _forms(forms)
    for (start, end, k), weight in zip(table.tolist(), weights.tolist(), strict=True):
        y[start:end] += weight * known[k].unfold(
            F.linear(known[k].fold(x[start:end]), m[k]), y.shape[1]
        )
    return y


def mora_backward_reference(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of each M."""
    with torch.enable_grad():
        x, m = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in m]
        y = mora_reference(torch.zeros_like(grad), x, table, weights, forms, m)
        made = (
            torch.autograd.grad(y, [x, *m], grad, materialize_grads=True)
            if y.requires_grad
            else None
        )
    grads = made or [torch.zeros_like(t) for t in (x, *m)]
    return grads[0], list(grads[1:])


# ---- the operations


def _rows(table: Tensor, weights: Tensor) -> list[SegmentRow]:
    return [(*row, weight) for row, weight in zip(table.tolist(), weights.tolist(), strict=True)]


def _run(
    y: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> Tensor:
    if not kernels.cpp_accepts(x, y, *m):
        return mora_reference(y, x, table, weights, forms, m)
    y = y.clone(memory_format=torch.contiguous_format)
    MoRAGroup(_rows(table, weights), _forms(forms), m).add(y, x.contiguous())
    return y


def _run_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    if not kernels.cpp_accepts(x, grad, *m):
        return mora_backward_reference(grad, x, table, weights, forms, m)
    grad_x = torch.zeros(x.shape, dtype=x.dtype)
    grads = MoRAGroup(_rows(table, weights), _forms(forms), m).backward(
        grad.contiguous(), x.contiguous(), grad_x, m
    )
    return grad_x, [t.to(x.dtype) for t in grads]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, table, weights, forms, m = inputs
    ctx.save_for_backward(x, table, weights, *m)
    ctx.forms = forms


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, table, weights, *m = ctx.saved_tensors
    grad_x, grad_m = _mora_backward(grad, x, table, weights, ctx.forms, m)
    return grad, grad_x, None, None, None, grad_m


_ARGUMENTS = "Tensor table, Tensor weights, int[] forms, Tensor[] m"
_mora = register_op(
    f"grouped_mora(Tensor y, Tensor x, {_ARGUMENTS}) -> Tensor",
    _run,
    lambda y, x, table, weights, forms, m: torch.empty_like(y),
    _gradients,
    _keep,
)
_mora_backward = register_op(
    f"grouped_mora_backward(Tensor grad, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor[])",
    _run_backward,
    lambda grad, x, table, weights, forms, m: (
        torch.empty_like(x),
        [torch.empty_like(t) for t in m],
    ),
)
