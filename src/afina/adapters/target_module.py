"""Kinds of modules that an adapter supports, each as one matrix (out_features, in_features).

    Linear, NF4           y = W x
    Conv1D (GPT-2)        the same, stored transposed
    Conv1d, Conv2d        y = W x for each patch of the image: (out, in * kernel)
    Embedding             columns of W, selected by the token: y = W onehot(x), W stored transposed
    fused experts         a matrix per expert in one parameter: W (experts, out, in)

So a method needs to know matrices only. `project` multiplies inputs by a low-rank matrix;
`unfold_inputs` returns the inputs as vectors, for methods that need them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from afina.io.adapter_formats import ModuleSizes
from afina.models.fast_llama import FastLinear
from afina.models.frozen import full_tensor
from afina.models.nf4 import NF4Linear
from afina.models.nf4_experts import NF4Experts

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class FreeParameter(nn.Module):
    """A parameter next to submodules (a class token, positions, a scale), as a module."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, frozen: Tensor) -> Tensor:
        """Return the parameter."""
        return self.weight


class ExpertMatrices(FreeParameter):
    """The parameter of fused experts, `(E, out, in)`, or `(E, in, out)` where it is transposed."""

    def __init__(self, weight: Any, is_transposed: bool) -> None:
        nn.Module.__init__(self)
        self.weight, self.is_transposed = weight, is_transposed


@dataclass(frozen=True)
class TargetModule:
    """A frozen module and its path; adapter layers see its matrix, however it is stored."""

    path: str
    module: nn.Module

    @property
    def is_matrix(self) -> bool:
        """Whether the module multiplies by one matrix, which methods other than full need."""
        module = self.module
        if isinstance(module, CONVOLUTIONS):
            return module.groups == 1 and module.padding_mode == "zeros"
        kinds = (FastLinear, nn.Linear, NF4Linear, Conv1D, nn.Embedding)
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        # a subclass may return more (Llama 4's router) or scale (Gemma's embedding); Falcon's has
        # the arithmetic of its parent
        return kind is not None and (
            type(module).forward is kind.forward or type(module).__name__ == "FalconLinear"
        )

    @property
    def is_experts(self) -> bool:
        """Whether it is a parameter with one matrix per expert."""
        return isinstance(self.module, ExpertMatrices)

    @property
    def num_experts(self) -> int:
        """Number of matrices: 1 but for fused experts."""
        return len(self.module.weight) if isinstance(self.module, ExpertMatrices) else 1

    @property
    def in_features(self) -> int:
        """Width of the input: of a patch for convolutions, of the vocabulary for embeddings."""
        module = self.module
        if isinstance(module, CONVOLUTIONS):
            return module.in_channels * math.prod(module.kernel_size)
        if isinstance(module, nn.Embedding):
            return module.num_embeddings
        if isinstance(module, ExpertMatrices):
            return int(module.weight.shape[1 if module.is_transposed else 2])
        width: Any = module.nx if isinstance(module, Conv1D) else module.in_features
        return int(width)

    @property
    def out_features(self) -> int:
        """Width of the output."""
        module = self.module
        if isinstance(module, CONVOLUTIONS):
            return module.out_channels
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
        if isinstance(module, ExpertMatrices):
            return int(module.weight.shape[2 if module.is_transposed else 1])
        width: Any = module.nf if isinstance(module, Conv1D) else module.out_features
        return int(width)

    def sizes(self, rank: int) -> ModuleSizes:
        """Return the sizes that shape rules of adapter tensors name, for an adapter of `rank`."""
        kernel: tuple[int, ...] = ()
        channels = self.in_features
        if isinstance(self.module, CONVOLUTIONS):
            kernel, channels = tuple(self.module.kernel_size), self.module.in_channels
        # the factors of all experts lie in one matrix each
        rank *= self.num_experts
        return ModuleSizes(self.in_features, self.out_features, rank, channels, kernel)

    @property
    def weight(self) -> Tensor:
        """The matrix W (out, in), or W (experts, out, in): a view, or dequantized from 4 bits."""
        if isinstance(self.module.weight, NF4Experts):
            return as_matrix(self.module, self.module.weight.dequantize())
        return as_matrix(self.module, full_tensor(self.module.weight))  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """Device of the module."""
        return next(iter([*self.module.parameters(), *self.module.buffers()])).device

    @property
    def channels_first(self) -> bool:
        """Whether outputs are (N, out, ...), as those of convolutions, and not (..., out)."""
        return isinstance(self.module, CONVOLUTIONS)

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """Return a `(r, in)` times the module's input: `(..., r)`, channels last for every kind."""
        module = self.module
        if isinstance(module, nn.Embedding):
            return a.T[x]
        if isinstance(module, CONVOLUTIONS):
            kernel = a.view(a.shape[0], module.in_channels, *module.kernel_size)
            convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
            return convolve(
                x, kernel, None, module.stride, module.padding, module.dilation
            ).movedim(1, -1)  # type: ignore[arg-type]
        return F.linear(x, a)

    def unfold_inputs(self, x: Tensor) -> Tensor:
        """Return the module's input as vectors `(..., in)`."""
        module = self.module
        if isinstance(module, nn.Embedding):
            return F.one_hot(x, module.num_embeddings).to(module.weight.dtype)
        if isinstance(module, nn.Conv1d):
            unfolded = F.unfold(
                x[:, :, None],
                (1, *module.kernel_size),
                (1, *module.dilation),
                _pad(module, 2),
                (1, *module.stride),
            )
            return unfolded.mT  # (N, length, in)
        if isinstance(module, nn.Conv2d):
            unfolded = F.unfold(
                x, module.kernel_size, module.dilation, _pad(module, 2), module.stride
            )
            height = _length(x.shape[2], module, 0)
            return unfolded.mT.unflatten(1, (height, -1))  # (N, height, width, in)
        return x

    def multiply(self, a: Tensor) -> Tensor:
        """Return a W^T `(r, out)` for a `(r, in)`, in the dtype of a."""
        return a @ self.weight.to(a.dtype).T

    def channels_last(self, y: Tensor) -> Tensor:
        """Return an output of the module with its channels last: `(..., out)`."""
        return y.movedim(1, -1) if self.channels_first else y

    def restore_layout(self, y: Tensor) -> Tensor:
        """Return an output of `channels_last` in the memory order of the frozen module.

        With a strided view as input of the next convolutions, PyTorch 2.13 crashed in their
        backward pass on a CPU (8 channels, 56 x 56 pixels, within ten steps).
        """
        return y.movedim(-1, 1).contiguous() if self.channels_first else y


def _pad(module: nn.Conv1d | nn.Conv2d, dims: int) -> tuple[int, ...]:
    """Return the zeros on each side per axis, also of "same" and "valid" padding.

    A Conv1d has a first axis of height 1.
    """
    if module.padding == "valid":
        pads: tuple[int, ...] = (0,) * len(module.kernel_size)
    elif module.padding == "same":
        pads = tuple(
            d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)
        )
    else:
        pads = tuple(module.padding)  # type: ignore[arg-type]
    return (0,) * (dims - len(pads)) + pads


def _length(size: int, module: nn.Conv2d, axis: int) -> int:
    """Return the number of outputs along an axis of `size` inputs."""
    reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
    return (size + 2 * _pad(module, 2)[axis] - reach) // module.stride[axis] + 1


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """Return the stored weight of `module` as the matrix `(out, in)`."""
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.T
    if isinstance(module, ExpertMatrices):
        return weight.mT if module.is_transposed else weight
    return weight.flatten(1) if isinstance(module, CONVOLUTIONS) else weight


def as_stored(module: nn.Module, matrix: Tensor) -> Tensor:
    """Return the matrix `(out, in)` in the shape in which `module` stores it."""
    if isinstance(module, Conv1D | nn.Embedding):
        return matrix.T.contiguous()
    if isinstance(module, ExpertMatrices) and module.is_transposed:
        return matrix.mT.contiguous()
    if isinstance(module, CONVOLUTIONS):
        return matrix.view(matrix.shape[0], module.in_channels, *module.kernel_size)
    return matrix
