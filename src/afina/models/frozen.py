"""What all frozen bases have in common: modules that never change, an identity, a switchboard."""

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
    """A tensor of which this process may hold a part only (see sharded.py); all processes must ask for it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@dataclass
class FrozenModel:
    """A model to which adapters are attached and from which they are detached again."""

    model: PreTrainedModel
    name: str
    revision: str | None = None
    folder: Path | None = None
    files: list[Path] = field(default_factory=list)
    remote_code: bool = False
    forward_context: ForwardContext = field(default_factory=ForwardContext)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """How the weights are held."""
        return next(self.model.parameters()).dtype

    @cached_property
    def hash(self) -> str:
        """Identity of the base: sha256 of its published tensors; empty for a model made in memory."""
        return hash_tensor_files(self.files) if self.files else ""

    @contextmanager
    def gradient_checkpointing(self, every: int) -> Iterator[None]:
        """Within the block, each `every`-th block keeps its input only, and makes the rest again in the backward pass.

        1 means all blocks, 0 none. The first of each `every` is the one: its turn in the backward pass comes when what the
        others kept is free again.
        """
        if not every:
            yield
            return
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            raise BaseError(
                f"{self.name} cannot recompute its activations", hint="--checkpointing off"
            )
        layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)
        ][::every]
        modes = [(layer, layer.training) for layer in layers]
        for layer in layers:
            layer.training = True  # only the block's own flag, which is what turns recomputation on
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
        """Run a block under checkpoint; within, it is in eval again (some blocks look at `training` for their dropout)."""

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
