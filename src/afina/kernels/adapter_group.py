"""Adapters of one kind at one module, in the form that their kernel takes.

    x, y     | t t t t t | j j j | t t t t |        tokens of one packed batch
    rows       (0, 5, k=0, .5) (5, 8, k=1, 1.) (8, 12, k=0, 1.) (8, 12, k=1, 2.)

A row is a token range, the index of an adapter in the group, and the factor of its output. There is
one path: a group is *prepared* (`prepare`: the kernel's table of rows and the packed weights) and
*applied* (`FusedKernel.add`, in place). Inference keeps what was prepared, training prepares in
each forward pass. `apply` is the same operation, registered in torch.library, with a new
tensor as its result: for other devices and for torch.compile.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from afina.kernels.dispatch import data_pointer, kernels
from afina.kernels.varlen_attention import FAST_ISAS

# In float32 on AVX2, which has too few registers for the sums of a tile, PyTorch's products are
# faster with more tokens a row. 2,048 tokens, LoRA of rank 8 from 384 to 384: 0.8 and 2.7 ms
# (forward, backward), in C++ 12.9 and 32.9 ms; a step of MoRA on 22M parameters took 16.6 s.
MAX_AVX2_TOKENS = 4

SegmentRow = tuple[int, int, int, float]  # start, end, index of the adapter, weight
Weights = tuple[Tensor, ...]  # one adapter's weights, packed as its kernel reads them


class FusedKernel:
    """A C++ kernel with its table and weights, for any x and y of one shape and dtype."""

    def __init__(
        self,
        run: Callable[[Any, int, int], None],
        native: Any,
        referenced: object,  # what `native` points at
        shape: tuple[int, int, int],  # num_tokens, inputs, outputs
        dtype: torch.dtype,
    ) -> None:
        num_tokens, self.inputs, outputs = shape
        self.sizes, self.dtype = (num_tokens * self.inputs, num_tokens * outputs), dtype
        self._run, self.native, self._referenced = run, native, referenced

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Add the adapters' outputs to `y` in place.

        Args:
            y: `(..., outputs)`, contiguous.
            x: `(..., inputs)`.

        Returns:
            `y`.

        Raises:
            ValueError: the tensors are not of the prepared size and dtype.
        """
        fits = (x.numel(), y.numel()) == self.sizes and x.shape[-1] == self.inputs
        if not fits or not x.dtype == y.dtype == self.dtype or not y.is_contiguous():
            shapes = f"x {tuple(x.shape)} and y {tuple(y.shape)}, {x.dtype}"
            raise ValueError(f"{shapes}, are not what was prepared for")
        self._add(y, x.contiguous())
        return y

    def _add(self, y: Tensor, x: Tensor) -> None:
        """Add the adapters' outputs to `y`, both contiguous."""
        self._run(self.native, data_pointer(x), data_pointer(y))


class AdapterGroup(ABC):
    """Adapter layers of one kind with the rows on which they are active.

    Args:
        rows: The rows, in any order; they may overlap.
        layers: The layers that the rows number. Each has what the kernel reads, and
            `kernel_weights(dtype)`, which packs it.
    """

    def __init__(self, rows: Sequence[SegmentRow], layers: Sequence[Any]) -> None:
        self.rows, self.layers = rows, layers

    @property
    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """What gradients reach, in the order of `backward`."""

    @abstractmethod
    def prepare(self, x: Tensor, outputs: int, weights: Sequence[Weights]) -> FusedKernel:
        """Return the kernel for inputs like `x` `(..., inputs)` with each layer's packed weights.

        Raises:
            ValueError: rows, weights and inputs do not fit each other.
        """

    @abstractmethod
    def saved_tensors(self, weights: Sequence[Weights]) -> list[Tensor]:
        """Return what `backward` reads, as many tensors as there are `parameters`."""

    @abstractmethod
    def backward(
        self, grad: Tensor, x: Tensor, grad_x: Tensor | None, saved: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the gradients of `parameters`, float32; that of x is added to `grad_x`.

        Args:
            grad: Gradient of y `(num_tokens, outputs)`, contiguous.
            x: `(num_tokens, inputs)`, contiguous.
            grad_x: Gradient of x, or None where none is needed.
            saved: The `saved_tensors` of the forward pass.
        """

    @abstractmethod
    def apply(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y `(num_tokens, outputs)` plus the adapters' outputs, on any device.

        Gradients reach y, x `(num_tokens, inputs)` and `parameters`.
        """


def mean_tokens(rows: Sequence[SegmentRow]) -> float:
    """Return the mean number of tokens of a row."""
    return sum(end - start for start, end, *_ in rows) / max(1, len(rows))


def prefers_products(rows: Sequence[SegmentRow], dtype: torch.dtype) -> bool:
    """Return whether PyTorch's products, a row at a time, are faster than the C++ kernel."""
    is_narrow = kernels.isa not in FAST_ISAS and dtype == torch.float32
    return is_narrow and mean_tokens(rows) > MAX_AVX2_TOKENS


def check_rows(rows: Sequence[SegmentRow], num_tokens: int, num_adapters: int) -> None:
    """Raise `ValueError` where a row has another token or adapter than there are."""
    for start, end, adapter, _ in rows:
        if not 0 <= start <= end <= num_tokens or not 0 <= adapter < num_adapters:
            counts = f"{num_tokens} tokens and {num_adapters} adapters"
            raise ValueError(f"row ({start}, {end}, {adapter}) does not fit {counts}")


def segment_table(rows: Sequence[SegmentRow]) -> tuple[Tensor, Tensor]:
    """Return the rows by adapter: `(num_rows, 3)` int64 of start, end, adapter; weights float32."""
    ordered = sort_rows(rows)
    table = torch.tensor([row[:3] for row in ordered], dtype=torch.int64).view(-1, 3)
    return table, torch.tensor([row[3] for row in ordered], dtype=torch.float32)


def table_rows(table: Tensor, weights: Tensor) -> list[SegmentRow]:
    """Return the rows of a `segment_table`."""
    return [(*row, weight) for row, weight in zip(table.tolist(), weights.tolist(), strict=True)]


def sort_rows(rows: Sequence[SegmentRow]) -> list[SegmentRow]:
    """Return the rows in the order of their adapters, which kernels require."""
    return sorted(rows, key=lambda row: row[2])
