"""The frozen base: modules that never change, a hash, and the context of active adapters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from afina.adapters.segments import ForwardContext
from afina.errors import BaseError
from afina.io.hashing import hash_tensor_files


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a complete tensor, also where this process has a shard (`afina.models.fsdp`).

    All processes must call it together.
    """
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def hidden_size(config: Any) -> int | None:
    """Return the width of the (last) hidden states by a model's configuration; None if unknown."""
    sizes = getattr(config, "hidden_sizes", None)
    return sizes[-1] if sizes else getattr(config, "hidden_size", None)


@dataclass
class FrozenModel:
    """A frozen model to which adapters are attached, and from which they are detached.

    Attributes:
        model: The model.
        name: Its path or name on the hub.
        revision: Revision on the hub.
        folder: Its local folder.
        files: Its weight files.
        remote_code: Whether its own Python code runs.
        forward_context: The active adapters of a forward pass.
    """

    model: PreTrainedModel
    name: str
    revision: str | None = None
    folder: Path | None = None
    files: list[Path] = field(default_factory=list)
    remote_code: bool = False
    forward_context: ForwardContext = field(default_factory=ForwardContext)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states (of the last ones, where they differ); None if unknown."""
        return hidden_size(getattr(self.model, "config", None))

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the published tensors; empty for a model that was built in memory."""
        return hash_tensor_files(self.files) if self.files else ""

    @contextmanager
    def gradient_checkpointing(self, every: int) -> Iterator[None]:
        """Recompute the activations of each `every`-th layer in the backward pass, within `with`.

        1 means all layers, 0 none. Of `every` layers it is the first: backward reaches it when what
        the others saved is freed.

        Raises:
            BaseError: the model does not support it.
        """
        if not every:
            yield
            return
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise BaseError(
                f"{self.name} does not support gradient checkpointing (recompute activations)",
                hint="--gradient-checkpointing off",
            )
        layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ][::every]
        modes = [(layer, layer.training) for layer in layers]
        for layer in layers:
            layer.training = True  # only the layer's own flag, which enables recomputation
            layer.gradient_checkpointing, layer._gradient_checkpointing_func = (
                True,
                partial(self._recompute, layer),
            )
        try:
            yield
        finally:
            for layer, mode in modes:
                layer.gradient_checkpointing, layer.training = False, mode

    def _recompute(self, layer: nn.Module, call: Callable[..., Any], *inputs: Any) -> Any:
        """Run a layer under checkpoint, in eval mode: some read `training` for their dropout."""

        def quiet(*again: Any) -> Any:
            mode, layer.training = layer.training, False
            try:
                return call(*again)
            finally:
                layer.training = mode

        return checkpoint(
            quiet,
            *inputs,
            use_reentrant=False,
            context_fn=self.forward_context.checkpoint_contexts(),
        )
