"""Fused experts in NF4: each expert's matrix is quantized by itself, and dequantized where it runs.

The parameter becomes a module of the same name; the experts' own forward pass, which multiplies by
entire parameters, is replaced by `experts_forward` through transformers' table of implementations.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from afina.kernels.nf4 import NF4Weight, dequantize, nf4_linear
from afina.models.experts import experts_forward

IMPLEMENTATION = "afina"
PARTS = ("codes", "scales", "superscales", "offset")
ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)


class NF4Module(nn.Module):
    """A module with NF4 codes; `dtype`, that of dequantized weights, follows `.to(dtype)`."""

    dtype: torch.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name).detach() for name in ("superscales", "offset")}
        super()._apply(fn, recurse)
        for name, before in exact.items():  # .to(bfloat16) moves the scales and keeps float32
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, nn.Parameter(before.to(after.device), requires_grad=False))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class NF4Experts(NF4Module):
    """The matrices `(out, in)` of all experts in NF4, in place of a parameter `(E, ..., ...)`.

    Attributes:
        dtype: That of dequantized matrices.
        is_transposed: Whether the parameter was `(E, in, out)`.
    """

    ndim = 3
    codes: Tensor
    scales: Tensor
    superscales: Tensor
    offset: Tensor

    def __init__(
        self, weights: list[NF4Weight], is_transposed: bool, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.in_features, self.dtype = weights[0].in_features, dtype
        self.is_transposed = is_transposed
        self.implementation: str | None = None  # of the forward pass that `put` replaced
        for part in PARTS:
            stacked = torch.stack([getattr(weight, part) for weight in weights])
            setattr(self, part, nn.Parameter(stacked, requires_grad=False))

    @property
    def shape(self) -> tuple[int, int, int]:
        """The parameter's shape."""
        sizes = (self.codes.shape[1], self.in_features)
        return (len(self.codes), *(sizes[::-1] if self.is_transposed else sizes))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(getattr(self, part).nbytes for part in PARTS)

    def quantized(self, expert: int) -> NF4Weight:
        """Return the stored tensors of one expert."""
        codes, scales, superscales, offset = (getattr(self, part)[expert] for part in PARTS)
        return NF4Weight(codes, scales, superscales, offset, self.in_features)

    def product(self, expert: int, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return W[expert] x + bias `(n, out)` of x `(n, in)`."""
        return nf4_linear(x, self.quantized(expert), bias)

    def dequantize(self) -> Tensor:
        """Return the parameter in `dtype`."""
        matrices = [dequantize(self.quantized(n), self.dtype) for n in range(len(self.codes))]
        stacked = torch.stack(matrices)
        return stacked.mT.contiguous() if self.is_transposed else stacked

    def put(self, owner: Any, name: str) -> None:
        """Replace the parameter `name` of the experts `owner`."""
        delattr(owner, name)
        setattr(owner, name, self)
        if owner.config._experts_implementation == IMPLEMENTATION:
            return
        self.implementation = owner.config._experts_implementation
        # a configuration of its own: that of the model, which is saved, stays as it is
        owner.config = copy.copy(owner.config)
        owner.config._experts_implementation = IMPLEMENTATION

    def restore(self, owner: Any, name: str) -> None:
        """Replace this module by the dequantized parameter."""
        delattr(owner, name)
        setattr(owner, name, nn.Parameter(self.dequantize(), requires_grad=False))
        if self.implementation is not None:
            owner.config._experts_implementation = self.implementation
