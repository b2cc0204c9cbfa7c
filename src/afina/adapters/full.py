"""Full fine-tuning of the listed modules: the trained copy takes the base module's place.

    D(x) = f_trained(x) - f_base(x)

The base's own tensors stay as they are, so that the adapter can be switched off; freezing is the list. A full
delta acts everywhere or nowhere: a weight in between, or other adapters beside it, would need both outputs.
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
    """A trained copy of the whole module, in the dtype of the base (the optimizer keeps float32 masters)."""

    tensor_names: ClassVar[Mapping[str, str]] = {}  # those of the module itself
    replaces_base = True
    supported_modules = "any"

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        super().__init__(layer, spec, generator)
        if spec.method == "full" and spec.dropout:
            raise SettingsError(
                "full has no path of its own to drop inputs from",
                where="dropout",
                hint="--dropout 0",
            )
        if any(True for child in layer.module.children() for _ in child.parameters()):
            why = f"{type(layer.module).__name__} holds other layers"
            raise AdapterError(
                "full acts on layers and loose parameters",
                where=layer.path,
                why=why,
                hint="name its layers",
            )
        if not all(p.is_floating_point() for p in layer.module.parameters(recurse=False)):
            why = f"{type(layer.module).__name__} holds codes, of which there is no gradient"
            raise AdapterError(
                "full cannot train a quantised layer",
                where=layer.path,
                why=why,
                hint="--method lora",
            )
        trained = copy.deepcopy(layer.module).requires_grad_(True)
        for name, parameter in list(trained.named_parameters()):
            setattr(self, name, parameter)
        self._trained = [trained]  # in a list: its parameters are registered once, here

    def share(self, name: str, parameter: nn.Parameter) -> None:
        """Use `parameter` of another delta in place of the own one: how tied embeddings stay tied."""
        setattr(self, name, parameter)
        setattr(self._trained[0], name, parameter)

    def forward(self, x: Tensor, y0: Tensor, weight: float, *others: Any, **named: Any) -> Tensor:
        """The trained module's output; y0 is not looked at."""
        if weight != 1.0:
            raise SettingsError("full acts with weight 1 or not at all", where="route")
        return self._trained[0](x, *others, **named)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The trained weight itself."""
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
        """All numbers of the module."""
        return sum(p.numel() for p in layer.module.parameters(recurse=False))

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """x is kept; forwards the trained copy takes the place of the base, backwards there is the weight's gradient."""
        return LayerCost(True, 0, 0.0)
