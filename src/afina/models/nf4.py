"""A frozen layer held in four bits a weight, and a whole model of them: the base of qlora and its kin.

`quantize_model` puts `NF4Linear` in the places of the blocks' Linear and Conv1D layers, openly and in this one file.
Everything else (embeddings, output layer, norms, routers) stays as it is.
"""

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.errors import BaseError
from afina.kernels.nf4 import NF4Weight, dequantize, errors, nf4_linear, quantize
from afina.models.fast_llama import LINEAR_TYPES
from afina.models.frozen import full_tensor

# names of modules that stay as they are, wherever they lie: few weights, and those that decide most
SKIP = ("lm_head", "router", "gate", "shared_expert_gate")
PARTS = (
    "codes",
    "scales",
    "superscales",
    "offset",
)  # tensors of an NF4 weight, as named in the layer and on disk


@dataclass(frozen=True)
class LayerQuantization:
    """What quantising did to one layer."""

    path: str
    shape: tuple[int, int]  # (out, in)
    relative_error: float  # |W - W'| / |W|; normally distributed weights lose 0.092
    zeroed_ratio: float  # share of the weights that are zero now and were not before
    bytes: int

    @property
    def bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.bytes / (self.shape[0] * self.shape[1])

    def __str__(self) -> str:
        size = f"{self.shape[0]} x {self.shape[1]}"
        return (
            f"nf4  {self.path}  {size}  {self.bits:.3f} bits  error {100 * self.relative_error:.2f}%  "
            f"made zero {100 * self.zeroed_ratio:.3f}%"
        )


def print_quantization(done: LayerQuantization) -> None:
    """One line on standard error."""
    print(done, file=sys.stderr, flush=True)


class NF4Linear(nn.Module):
    """y = W x + b with W (out, in) in NF4, written out during each product only.

    The stored tensors are frozen parameters, split by whole rows, so that they move and are saved like any other.
    `dtype` is that of `weight`, and follows `.to(dtype)`; codes and scales keep their own. Products are made in the
    dtype of x.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: NF4Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.transposed = False  # whether the layer was a Conv1D
        self.codes = nn.Parameter(weight.codes, requires_grad=False)  # (out, ceil(in / 2)) uint8
        self.scales = nn.Parameter(weight.scales, requires_grad=False)  # (out, ceil(in / 64)) uint8
        self.superscales = nn.Parameter(
            weight.superscales, requires_grad=False
        )  # (blocks / 256) float32
        self.offset = nn.Parameter(weight.offset, requires_grad=False)  # (1) float32
        self.bias = (
            None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )  # (out)

    @classmethod
    def from_linear(cls, module: nn.Linear | Conv1D) -> "NF4Linear":
        """The layer in four bits, its bias and dtype kept; raises `BaseError` where a weight is not finite."""
        return cls.in_place_of(
            module, _quantize(as_matrix(module, module.weight.detach()), type(module).__name__)
        )

    @classmethod
    def in_place_of(cls, module: nn.Linear | Conv1D, weight: NF4Weight) -> "NF4Linear":
        """The layer that holds `weight`, with the bias, dtype and mode of `module`."""
        made = cls(weight, module.bias, module.weight.dtype).train(module.training)
        made.transposed = isinstance(module, Conv1D)
        return made

    def to_linear(self, matrix: Tensor | None = None) -> nn.Linear | Conv1D:
        """The layer as the model had it, in `dtype`: it holds `matrix` (out, in), by default the dequantised one."""
        matrix = (self.weight if matrix is None else matrix).to(self.dtype)
        sizes = (self.out_features, self.in_features)
        with torch.device("meta"):
            made = Conv1D(*sizes) if self.transposed else nn.Linear(*sizes[::-1], bias=False)
        made.bias = self.bias  # type: ignore[assignment]
        made.weight = nn.Parameter(
            matrix.T.contiguous() if self.transposed else matrix, requires_grad=False
        )
        return made.train(self.training)

    @property
    def quantized(self) -> NF4Weight:
        """The stored tensors."""
        codes, scales, superscales, offset = (full_tensor(getattr(self, name)) for name in PARTS)
        return NF4Weight(codes, scales, superscales, offset, self.in_features)

    @property
    def weight(self) -> Tensor:
        """W (out, in), written out anew at each call."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), rounded once to `dtype`."""
        return dequantize(self.quantized, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in)."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return nf4_linear(x, self.quantized, bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        exact = {name: getattr(self, name).detach() for name in ("superscales", "offset")}
        super()._apply(fn, recurse)
        for (
            name,
            before,
        ) in exact.items():  # .to(bfloat16) moves the scales, and leaves them in float32
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, nn.Parameter(before.to(after.device), requires_grad=False))
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def as_matrix(module: nn.Linear | Conv1D, weight: Tensor) -> Tensor:
    """A stored weight as the matrix (out, in): transformers' Conv1D keeps it transposed."""
    return weight.T if isinstance(module, Conv1D) else weight


def _quantize(matrix: Tensor, where: str) -> NF4Weight:
    try:
        return quantize(matrix)
    except ValueError as error:
        raise BaseError("this layer cannot be held in NF4", where=where, why=str(error)) from error


def quantize_module(path: str, matrix: Tensor) -> tuple[NF4Weight, LayerQuantization]:
    """A matrix (out, in) in NF4, and what that did to it."""
    weight = _quantize(matrix, path)
    relative_error, zero_share = errors(matrix, weight)
    return weight, LayerQuantization(path, weight.shape, relative_error, zero_share, weight.nbytes)


def quantizable_modules(
    model: nn.Module, skip: Collection[str] = SKIP
) -> dict[str, nn.Linear | Conv1D]:
    """The layers to quantise, by path: every Linear and Conv1D within a block, unless a part of its path is in `skip`.

    A block is a member of a list of modules: its path holds a number. Subclasses of Linear are left alone, since they
    compute something else (Falcon's does not). Raises `BaseError` where no layer is left.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if (type(module) in (*LINEAR_TYPES, Conv1D) or type(module).__name__ == "FalconLinear")
        and module is not output
        and any(part.isdigit() for part in path.split("."))
        and not set(path.split(".")) & set(skip)
    }
    if not found:
        why = "its blocks hold no Linear layer, or it is quantised already"
        raise BaseError(
            "no layer of this model can be held in NF4", where=type(model).__name__, why=why
        )
    return found  # type: ignore[return-value]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at `path` of `model`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    skip: Collection[str] = SKIP,
    tell: Callable[[LayerQuantization], None] | None = None,
) -> list[LayerQuantization]:
    """Replace the layers of `candidates` by NF4 ones, in place; returns what that did to each, and tells it as it goes.

    Raises `BaseError` where no layer can be quantised, or where one holds numbers that are not finite.
    """
    report: list[LayerQuantization] = []
    made: dict[nn.Module, NF4Linear] = {}
    for path, module in quantizable_modules(model, skip).items():
        if module not in made:
            weight, done = quantize_module(path, as_matrix(module, module.weight.detach()))
            made[module] = NF4Linear.in_place_of(module, weight)
            report.append(done)
            if tell:
                tell(done)
        set_module(model, path, made[module])
    return report


@torch.no_grad()
def dequantize_model(model: nn.Module) -> None:
    """Put ordinary Linear and Conv1D layers, in the compute dtype, in the places of the 4-bit ones."""
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())
