"""Full fine-tuning of the listed modules: a trained copy replaces the base's module.

    D(x) = f_trained(x) - f_base(x)

The base's own tensors are unchanged, so that the adapter can be disabled. The copy is active on all
tokens or on none: another weight, or further adapters, would need both outputs.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afina.adapters.base import AdapterLayer, LayerCost, TargetModule
from afina.adapters.registry import register_method
from afina.errors import AdapterError, SettingsError
from afina.io.adapter_config import AdapterConfig


@register_method("full")
class Full(AdapterLayer):
    """A trained copy of a module in the base's dtype; the optimizer keeps float32 masters."""

    tensor_names: ClassVar[Mapping[str, str]] = {}  # those of the module
    replaces_base = True
    supported_modules = "any"

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        if spec.method == "full" and spec.dropout:
            raise SettingsError(
                "full fine-tuning has no input of its own to drop",
                where="dropout",
                hint="--dropout 0",
            )
        if any(True for child in layer.module.children() for _ in child.parameters()):
            why = f"{type(layer.module).__name__} contains other modules"
            raise AdapterError(
                "full fine-tuning applies to modules without children and to single parameters",
                where=layer.path,
                why=why,
                hint="name the modules in it",
            )
        if not all(p.is_floating_point() for p in layer.module.parameters(recurse=False)):
            why = f"{type(layer.module).__name__} stores codes, which have no gradient"
            raise AdapterError(
                "full fine-tuning cannot train a quantized module",
                where=layer.path,
                why=why,
                hint="--method lora",
            )
        trained = copy.deepcopy(layer.module).requires_grad_(True)
        for name, parameter in list(trained.named_parameters()):
            setattr(self, name, parameter)
        self._trained = [trained]  # in a list: its parameters are registered once, here

    def share(self, name: str, parameter: nn.Parameter) -> None:
        """Use `parameter` of another layer, so that tied embeddings stay tied."""
        setattr(self, name, parameter)
        setattr(self._trained[0], name, parameter)

    def forward(self, x: Tensor, y0: Tensor, weight: float, *others: Any, **named: Any) -> Tensor:
        """Return the trained module's output; y0 is ignored."""
        if weight != 1.0:
            raise SettingsError("full fine-tuning is active with weight 1 or not at all")
        return self._trained[0](x, *others, **named)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return the trained weight."""
        trained = self._trained[0].weight
        assert isinstance(trained, Tensor)
        return TargetModule("", self._trained[0]).weight.detach().to(weight)

    @classmethod
    def names_on_disk(cls, layer: TargetModule) -> Mapping[str, str]:
        """Return the module's own parameter names."""
        return {name: name for name, _ in layer.module.named_parameters(recurse=False)}

    @classmethod
    def tensor_shapes(
        cls, layer: TargetModule, config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the module's own parameters."""
        return {name: tuple(p.shape) for name, p in layer.module.named_parameters(recurse=False)}

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """Return the number of the module's parameters."""
        return sum(p.numel() for p in layer.module.parameters(recurse=False))

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """Return the cost: x is saved; the copy runs instead of the base."""
        return LayerCost(True, 0, 0.0)
