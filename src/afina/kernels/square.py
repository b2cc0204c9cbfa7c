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

from afina.kernels.lowrank import Row, as_table, check_rows
from afina.kernels.native import TYPES, address, kernels, operation


@dataclass(frozen=True)
class Form:
    """An operator at a layer: q, the vectors that M takes of a row, inputs and outputs it has to do with, from the first.

    Vectors are blocks of q neighbours added round and round, each block turned by its own angles first if `turned`; or,
    with `runs`, the one vector of the sums of q runs of neighbours, those in front longer by one where q does not divide.
    """

    size: int
    slots: int
    reads: int
    writes: int
    runs: bool = False
    turned: bool = False

    def fold(self, x: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (T, in) as vectors that M takes: (T, slots, q); `turns` are the `angles` on the device of x, if it is no CPU."""
        x = x[:, : self.reads]
        if self.runs:
            run, longer = divmod(self.reads, self.size)
            first, rest = x.tensor_split([longer * (run + 1)], 1)
            sums = first.unflatten(1, (longer, run + 1)).sum(2), rest.unflatten(1, (self.size - longer, run)).sum(2)
            return torch.cat(sums, 1)[:, None]
        blocks = F.pad(x, (0, -self.reads % self.size)).unflatten(1, (-1, self.size))  # (T, blocks, q)
        if self.turned:
            blocks = turn(blocks, *(turns or angles(self.size, blocks.shape[1])))
        if blocks.shape[1] == self.slots:
            return blocks
        return F.pad(blocks, (0, 0, 0, -blocks.shape[1] % self.slots)).unflatten(1, (-1, self.slots)).sum(1)

    def unfold(self, z: Tensor, out: int) -> Tensor:
        """Outputs (T, out) of what M gave, z (T, slots, q)."""
        if self.runs:
            run, longer = divmod(self.writes, self.size)
            first, rest = z[:, 0, :, None].tensor_split([longer], 1)
            return torch.cat([first.expand(-1, -1, run + 1).flatten(1), rest.expand(-1, -1, run).flatten(1)], 1)
        times = math.ceil(self.writes / (self.size * self.slots))
        return F.pad(z.repeat(1, times, 1).flatten(1)[:, : self.writes], (0, out - self.writes))


@lru_cache(maxsize=256)
def angles(size: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (blocks, q / 2) float32: block I turns the pair (j, j + q/2) by I / 10000^(2j/q)."""
    at = torch.arange(blocks)[:, None] / 10000 ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return _with_room(at.cos().float()), _with_room(at.sin().float())


def _with_room(t: Tensor) -> Tensor:
    """The same numbers where 16 more can be read."""
    return F.pad(t.flatten(), (0, 16))[: t.numel()].view(t.shape)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., q) with each pair, q / 2 apart, turned by its angle; cos and sin (..., q / 2).

    The paper writes pairs of neighbours: the same but for the order of inputs, and 3 times slower (512 x 1024, bf16).
    """
    first, second = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([torch.addcmul(first * cos, second, -sin), torch.addcmul(first * sin, second, cos)], -1)


def grouped_square(y: Tensor, x: Tensor, rows: Sequence[Row], forms: Sequence[Form], m: Sequence[Tensor]) -> Tensor:
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
    return _square(y, x, *as_table(rows), _numbers(forms), [t.to(x.dtype) for t in m])


def _check(form: Form, width: int, out: int) -> None:
    blocks = [-(-count // form.size) for count in (form.reads, form.writes)]
    whole = form.slots == 1 if form.runs else 0 < form.slots <= max(1, min(blocks))
    if not whole or not form.reads <= width or not form.writes <= out or (form.turned and form.size % 2):
        raise ValueError(f"{form} does not fit {width} inputs and {out} outputs")


def _numbers(forms: Sequence[Form]) -> list[int]:
    return [int(n) for f in forms for n in (f.size, f.slots, f.reads, f.writes, f.runs, f.turned)]


def _forms(numbers: Sequence[int]) -> list[Form]:
    sixes = zip(*[iter(numbers)] * 6, strict=True)
    return [Form(size, slots, reads, writes, bool(runs), bool(turned)) for size, slots, reads, writes, runs, turned in sixes]


def units(m: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """M (q, q), or its transpose, rounded to `dtype` and laid out as the kernel's products read it, in this instruction set."""
    size, beside = len(m), kernels.library.beside(TYPES[dtype])
    made = torch.empty(-(-size // beside) * size + 16, dtype=torch.int32)
    m = m.detach().float().contiguous()
    kernels.square_units(address(m), TYPES[dtype], size, transposed, address(made))
    return made


def table_of(
    x: Tensor, out: int, rows: Sequence[Row], forms: Sequence[Form], matrices: Sequence[Tensor]
) -> tuple[Any, list[Tensor]]:
    """The kernel's table for x (..., in), and what it points at.

    `matrices` are `units`: of M transposed for the product, of M for its gradients.
    """
    turns = [angles(f.size, -(-f.reads // f.size)) if f.turned else None for f in forms]
    rows = sorted(rows, key=lambda row: row[2])  # the kernel wants them in the order of the adapters
    made = kernels.library.Mora(
        torch.get_num_threads(), TYPES[x.dtype], x.shape[:-1].numel(), x.shape[-1], out, [n for row in rows for n in row[:3]],
        [row[3] for row in rows], [int(n) for f in forms for n in (f.size, f.slots, f.reads, f.writes, f.runs)],
        [address(t[0]) if t else 0 for t in turns], [address(t[1]) if t else 0 for t in turns],
        [address(t) for t in matrices],
    )  # fmt: skip
    return made, [*matrices, *(t for pair in turns if pair for t in pair)]


class Prepared:
    """The same for inference: one table with its matrices, ready for any number of x and y of one shape and dtype.

    `matrices` are `units` of each M transposed.
    """

    def __init__(self, x: Tensor, out: int, rows: Sequence[Row], forms: Sequence[Form], matrices: Sequence[Tensor]) -> None:
        tokens, width = x.shape[:-1].numel(), x.shape[-1]
        check_rows(rows, tokens, len(forms))
        for form in forms:
            _check(form, width, out)
        self.sizes, self.dtype = (tokens * width, tokens * out), x.dtype
        self._native, self._held = table_of(x, out, rows, forms, matrices)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., out), contiguous, to which the adapters' parts are added in place; x (..., in)."""
        if (x.numel(), y.numel()) != self.sizes or not x.dtype == y.dtype == self.dtype or not y.is_contiguous():
            raise ValueError(f"x {tuple(x.shape)} and y {tuple(y.shape)}, {x.dtype}, are not what was prepared for")
        x = x.contiguous()
        kernels.square(self._native, address(x), address(y))
        return y


@dataclass(frozen=True)
class Squares:
    """The parts of MoRA adapters as `adapted_linear` takes them: what acts where, their operators and matrices M (q, q)."""

    rows: Sequence[Row]
    forms: Sequence[Form]
    m: Sequence[Tensor]

    @property
    def adapters(self) -> int:
        """How many there are."""
        return len(self.m)

    @property
    def learned(self) -> list[Tensor]:
        """What gradients reach."""
        return [*self.m]

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """y (T, out) plus the parts: `grouped_square`."""
        return grouped_square(y, x, self.rows, self.forms, self.m)

    def add(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """y (T, out), to which the parts are added in place; what the way back wants to be kept."""
        matrices = [units(t, x.dtype, True) for t in self.m]
        table, _held = table_of(x, y.shape[-1], self.rows, self.forms, matrices)
        kernels.square(table, address(x), address(y))
        return self.learned

    def back(self, grad: Tensor, x: Tensor, grad_x: Tensor | None, kept: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of M, float32; that of x is added to `grad_x`."""
        matrices = [units(t, x.dtype, False) for t in kept]
        table, _held = table_of(x, grad.shape[-1], self.rows, self.forms, matrices)
        made = [torch.empty(t.shape) for t in kept]
        kernels.square_backward(table, address(x), address(grad), address(grad_x), [address(t) for t in made])
        return made


# ---- references; table (rows, 3) int64: start, end, adapter, in the order of the adapters


def square_reference(y: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]) -> Tensor:
    """The sum, in PyTorch."""
    y, known = y.clone(), _forms(forms)
    for (start, end, k), weight in zip(table.tolist(), weights.tolist(), strict=True):
        y[start:end] += weight * known[k].unfold(F.linear(known[k].fold(x[start:end]), m[k]), y.shape[1])
    return y


def square_backward_reference(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of each M."""
    with torch.enable_grad():
        x, m = x.detach().requires_grad_(), [t.detach().requires_grad_() for t in m]
        y = square_reference(torch.zeros_like(grad), x, table, weights, forms, m)
        made = torch.autograd.grad(y, [x, *m], grad, materialize_grads=True) if y.requires_grad else None
    grads = made or [torch.zeros_like(t) for t in (x, *m)]
    return grads[0], list(grads[1:])


# ---- the operations


def _rows(table: Tensor, weights: Tensor) -> list[Row]:
    return [(*row, weight) for row, weight in zip(table.tolist(), weights.tolist(), strict=True)]


def _run(y: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]) -> Tensor:
    if not kernels.take(x, y, *m):
        return square_reference(y, x, table, weights, forms, m)
    y = y.clone(memory_format=torch.contiguous_format)
    Squares(_rows(table, weights), _forms(forms), m).add(y, x.contiguous())
    return y


def _run_backward(
    grad: Tensor, x: Tensor, table: Tensor, weights: Tensor, forms: list[int], m: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    if not kernels.take(x, grad, *m):
        return square_backward_reference(grad, x, table, weights, forms, m)
    grad_x = torch.zeros(x.shape, dtype=x.dtype)
    grads = Squares(_rows(table, weights), _forms(forms), m).back(grad.contiguous(), x.contiguous(), grad_x, m)
    return grad_x, [t.to(x.dtype) for t in grads]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, table, weights, forms, m = inputs
    ctx.save_for_backward(x, table, weights, *m)
    ctx.forms = forms


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, table, weights, *m = ctx.saved_tensors
    grad_x, grad_m = _square_backward(grad, x, table, weights, ctx.forms, m)
    return grad, grad_x, None, None, None, grad_m


_ARGUMENTS = "Tensor table, Tensor weights, int[] forms, Tensor[] m"
_square = operation(
    f"grouped_square(Tensor y, Tensor x, {_ARGUMENTS}) -> Tensor",
    _run, lambda y, x, table, weights, forms, m: torch.empty_like(y), _gradients, _keep,
)  # fmt: skip
_square_backward = operation(
    f"grouped_square_backward(Tensor grad, Tensor x, {_ARGUMENTS}) -> (Tensor, Tensor[])",
    _run_backward,
    lambda grad, x, table, weights, forms, m: (torch.empty_like(x), [torch.empty_like(t) for t in m]),
)  # fmt: skip
