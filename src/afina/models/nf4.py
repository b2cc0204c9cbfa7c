"""Linear modules in NF4, 4 bits per weight, and models of them: the base of qlora and its variants.

`quantize_model` replaces the Linear and Conv1D modules in layers by `NF4Linear`, and the matrices
of fused experts by `NF4Experts`; only this file does so. All else (embeddings, output layer, norms,
routers) keeps its dtype.
"""

import math
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afina.errors import BaseError
from afina.kernels.nf4 import NF4Weight, dequantize, errors, nf4_linear, quantize
from afina.models.experts import fused_experts
from afina.models.fast_llama import LINEAR_TYPES
from afina.models.frozen import full_tensor
from afina.models.nf4_experts import NF4Experts, NF4Module

# names of modules that are not quantized: few weights with a large effect
SKIP = ("lm_head", "router", "gate", "shared_expert_gate")
PARTS = ("codes", "scales", "superscales", "offset")  # tensors of an NF4 weight, also on disk


@dataclass(frozen=True)
class LayerQuantization:
    """Error of quantizing one module.

    Attributes:
        path: The module, or the parameter of fused experts.
        shape: (out, in), after the number of experts where they are fused.
        relative_error: |W - W'| / |W|; 0.092 for normally distributed weights.
        zeroed_ratio: Ratio of the weights that became zero.
        bytes: Bytes of the stored tensors.
    """

    path: str
    shape: tuple[int, ...]
    relative_error: float
    zeroed_ratio: float
    bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / math.prod(self.shape)

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        errors = f"error {100 * self.relative_error:.2f}%  zeroed {100 * self.zeroed_ratio:.3f}%"
        return f"nf4  {self.path}  {size}  {self.bits:.3f} bits  {errors}"


def print_quantization(error: LayerQuantization) -> None:
    """Print the error of one module to standard error."""
    print(error, file=sys.stderr, flush=True)


class NF4Linear(NF4Module):
    """y = W x + b with W (out, in) in NF4, dequantized during each product only.

    The stored tensors are frozen parameters, divided by complete rows, so that they are moved,
    saved and sharded like others. `dtype` is that of `weight`, and follows `.to(dtype)`; codes and
    scales keep theirs. Products are computed in the dtype of x.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: NF4Weight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.transposed = False  # whether the module was a Conv1D
        self.codes = nn.Parameter(weight.codes, requires_grad=False)  # (out, ceil(in / 2)) uint8
        self.scales = nn.Parameter(weight.scales, requires_grad=False)  # (out, ceil(in / 64)) uint8
        # (ceil(blocks / 256)) float32
        self.superscales = nn.Parameter(weight.superscales, requires_grad=False)
        self.offset = nn.Parameter(weight.offset, requires_grad=False)  # (1) float32
        # (out)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def from_linear(cls, module: nn.Linear | Conv1D) -> "NF4Linear":
        """Return the quantized module with its bias and dtype.

        Raises:
            BaseError: a weight is not finite.
        """
        return cls.in_place_of(
            module, _quantize(as_matrix(module, module.weight.detach()), type(module).__name__)
        )

    @classmethod
    def in_place_of(cls, module: nn.Linear | Conv1D, weight: NF4Weight) -> "NF4Linear":
        """Return a module with `weight` and the bias, dtype and mode of `module`."""
        quantized = cls(weight, module.bias, module.weight.dtype).train(module.training)
        quantized.transposed = isinstance(module, Conv1D)
        return quantized

    def to_linear(self, matrix: Tensor | None = None) -> nn.Linear | Conv1D:
        """Return a module of the original kind, in `dtype`.

        Args:
            matrix: Its weight `(out, in)`; None: the dequantized one.
        """
        matrix = (self.weight if matrix is None else matrix).to(self.dtype)
        sizes = (self.out_features, self.in_features)
        with torch.device("meta"):
            quantized = Conv1D(*sizes) if self.transposed else nn.Linear(*sizes[::-1], bias=False)
        quantized.bias = self.bias  # type: ignore[assignment]
        quantized.weight = nn.Parameter(
            matrix.T.contiguous() if self.transposed else matrix, requires_grad=False
        )
        return quantized.train(self.training)

    @property
    def quantized(self) -> NF4Weight:
        """The stored tensors."""
        codes, scales, superscales, offset = (full_tensor(getattr(self, name)) for name in PARTS)
        return NF4Weight(codes, scales, superscales, offset, self.in_features)

    @property
    def weight(self) -> Tensor:
        """W (out, in), dequantized at each access."""
        return self.dequantize()

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return W `(out, in)`, rounded once to `dtype`."""
        return dequantize(self.quantized, dtype or self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return y `(..., out)` of x `(..., in)`."""
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return nf4_linear(x, self.quantized, bias)

    def extra_repr(self) -> str:
        """Return the sizes that `print(model)` shows."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def as_matrix(module: nn.Linear | Conv1D, weight: Tensor) -> Tensor:
    """Return a stored weight as the matrix `(out, in)`: transformers' Conv1D has it transposed."""
    return weight.T if isinstance(module, Conv1D) else weight


def _quantize(matrix: Tensor, where: str) -> NF4Weight:
    try:
        return quantize(matrix)
    except ValueError as error:
        raise BaseError("this module cannot be quantized", where=where, why=str(error)) from error


def quantize_module(path: str, matrix: Tensor) -> tuple[NF4Weight, LayerQuantization]:
    """Return a matrix `(out, in)` in NF4, and its error."""
    weight = _quantize(matrix, path)
    relative_error, zeroed_ratio = errors(matrix, weight)
    return weight, LayerQuantization(
        path, weight.shape, relative_error, zeroed_ratio, weight.nbytes
    )


def quantize_experts(
    path: str, parameter: Tensor, is_transposed: bool
) -> tuple[NF4Experts, LayerQuantization]:
    """Return the parameter of fused experts in NF4, each expert by itself, and its error."""
    weights, lost, zeroed = [], [], 0.0
    matrices = parameter.mT if is_transposed else parameter
    squares = [float(matrix.float().square().sum()) for matrix in matrices]
    for expert, matrix in enumerate(matrices):
        weights.append(_quantize(matrix, f"{path}, expert {expert}"))
        relative_error, zeroed_ratio = errors(matrix, weights[-1])
        lost.append(relative_error**2 * squares[expert])
        zeroed += zeroed_ratio / len(matrices)
    quantized = NF4Experts(weights, is_transposed, parameter.dtype)
    total = (sum(lost) / sum(squares)) ** 0.5 if any(squares) else 0.0
    shape = (len(weights), *weights[0].shape)
    return quantized, LayerQuantization(path, shape, total, zeroed, quantized.nbytes)


def quantizable_experts(
    model: nn.Module, skip: Collection[str] = SKIP
) -> dict[str, tuple[nn.Module, str]]:
    """Return owner and name of each parameter of fused experts by path, without those in `skip`."""
    found = {path: (owner, name) for path, owner, name in fused_experts(model)}
    return {path: each for path, each in found.items() if not set(path.split(".")) & set(skip)}


def quantizable_modules(
    model: nn.Module, skip: Collection[str] = SKIP
) -> dict[str, nn.Linear | Conv1D]:
    """Return the modules to quantize by path: Linear and Conv1D in layers, without those in `skip`.

    A module is in a layer if its path has a number. Subclasses of Linear are not quantized, since
    they compute something else (Falcon's does not).

    Raises:
        BaseError: there is no such module.
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
        why = "its layers have no Linear module, or it is quantized already"
        raise BaseError("this model cannot be quantized", where=type(model).__name__, why=why)
    return found  # type: ignore[return-value]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set `module` at `path` of `model`."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    skip: Collection[str] = SKIP,
    report_module: Callable[[LayerQuantization], None] | None = None,
    experts: bool = True,
) -> list[LayerQuantization]:
    """Replace the `quantizable_modules` and `quantizable_experts` by NF4 ones in place.

    Args:
        model: The model.
        skip: Names of modules that are not quantized.
        report_module: Called with the error of each module.
        experts: Whether fused experts are quantized too.

    Returns:
        The errors of all modules.

    Raises:
        BaseError: no module can be quantized, or a weight is not finite.
    """
    report: list[LayerQuantization] = []
    quantized: dict[nn.Module, NF4Linear] = {}
    for path, module in quantizable_modules(model, skip).items():
        if module not in quantized:
            weight, error = quantize_module(path, as_matrix(module, module.weight.detach()))
            quantized[module] = NF4Linear.in_place_of(module, weight)
            report.append(error)
            if report_module:
                report_module(error)
        set_module(model, path, quantized[module])
    if experts:
        report += quantize_model_experts(model, skip, report_module)
    return report


@torch.no_grad()
def quantize_model_experts(
    model: nn.Module,
    skip: Collection[str] = SKIP,
    report_module: Callable[[LayerQuantization], None] | None = None,
) -> list[LayerQuantization]:
    """Replace the `quantizable_experts` by NF4 ones in place; return their errors."""
    report: list[LayerQuantization] = []
    for path, (owner, name) in quantizable_experts(model, skip).items():
        parameter = getattr(owner, name)
        if isinstance(parameter, NF4Experts):
            continue
        matrices, error = quantize_experts(path, parameter.detach(), bool(owner.is_transposed))
        matrices.put(owner, name)
        report.append(error)
        if report_module:
            report_module(error)
    return report


@torch.no_grad()
def dequantize_model(model: nn.Module) -> None:
    """Replace the 4-bit modules by Linear and Conv1D ones in the compute dtype, in place.

    Fused experts in 4 bits become parameters again.
    """
    for _, owner, name in list(fused_experts(model)):
        matrices = getattr(owner, name)
        if isinstance(matrices, NF4Experts):
            matrices.restore(owner, name)
    for path, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, module.to_linear())
