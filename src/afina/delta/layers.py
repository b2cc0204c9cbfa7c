"""The kinds of layers that a delta can act on, each seen as one matrix: out_features x in_features."""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Layer:
    """A frozen module and its place in the model; deltas see its matrix, whatever way it is stored."""

    path: str
    module: nn.Module

    @property
    def is_matrix(self) -> bool:
        """Whether the layer multiplies by one matrix (so that low-rank updates make sense)."""
        return isinstance(self.module, nn.Linear | Conv1D)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """The matrix W (out, in) of y = W x; a view, transposed where the module stores it so (GPT-2's Conv1D)."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if isinstance(self.module, Conv1D) else weight


def as_stored(module: nn.Module, weight: Tensor) -> Tensor:
    """The matrix (out, in) in the shape in which `module` keeps it."""
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
