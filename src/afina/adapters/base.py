"""What a delta is: D_k in the one equation, at one layer.

    y[t] = y0[t] + sum over k of w_k[t] * D_k(x[t], y0[t])

A method is one file in this folder with one class. It says how many numbers it learns (`count`), how they start
(`__init__`: the model must be unchanged), what it adds (`forward`), what a weight becomes that has taken it in
(`merged`), under which names its tensors lie on disk (`keys`), and what a pass costs (`cost`). No other file knows its
name. A method that can merge and restart also says how it begins anew (`restart`), and calls `carried` and
`with_carried`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError, did_you_mean
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_formats import evaluate_shapes
from afina.settings.groups import MethodSettings

RESTART_KEYS = ("restart_every", "restarts")  # in afina.json: the interval, and how many there were


@dataclass(frozen=True)
class LayerCost:
    """What a delta costs at one layer, for the plan: a token in numbers kept and multiply-adds, besides those of the base."""

    saves_input: bool  # whether the backward pass needs x; layers that read the same x share it
    saved_numel: int  # further numbers kept for the backward pass, a token
    macs_per_token: float  # multiply-adds forward, a token; the backward pass has twice as many
    macs_per_pass: float = (
        0.0  # multiply-adds with the written-out weight in each pass, however many tokens there are
    )
    workspace_numel: float = 0.0  # numbers that live while it works, a token, besides inputs and outputs and what is kept


class AdapterLayer(nn.Module):
    """One adapter's part at one module; subclasses are registered by `register_method`.

    Inputs x have the module's own layout (`layer.project` and `layer.unfold_inputs` make vectors
    of them), outputs y0 always have their features last, so a method needs to know matrices only.

    Attributes:
        tensor_names: Name on disk of each parameter, after the module's path.
        shape_rules: Rule of each parameter's shape on disk, see `afina.io.adapter_formats`.
        embedding_names: Names on disk at an embedding, where PEFT has others.
        name_aliases: Further names of a tensor on disk that the audit accepts.
        peft_fields: Fields of a PEFT LoraConfig that select the method; None: not in PEFT.
        low_rank_tensors: The parameters that are A (r, in) and B (out, r), where scale * B A of
            them, as they lie on disk, is all that the method adds; None otherwise.
        fused_kernel: The fused operation that computes what the method adds: "lora" reads `a`,
            `b` and `scale`, "mora" reads `layout`, `m` and `scale`; None: there is none.
        no_grad_terms: Methods without arguments whose value the gradient takes as constant.
        replaces_base: Whether the output is the layer's own, and the base need not run.
        is_method: False for a part that an adapter of any method may have.
        supported_modules: "matrix": modules with one weight matrix; "any": all with parameters.
        settings_class: The method's settings group, whose values are in `method_settings`.
    """

    tensor_names: ClassVar[Mapping[str, str]]
    shape_rules: ClassVar[Mapping[str, str]] = {}
    embedding_names: ClassVar[Mapping[str, str]] = {}
    name_aliases: ClassVar[Mapping[str, str]] = {}
    peft_fields: ClassVar[Mapping[str, Any] | None] = None
    low_rank_tensors: ClassVar[tuple[str, str] | None] = None
    fused_kernel: ClassVar[str | None] = None
    settings_class: ClassVar[type[MethodSettings]] = MethodSettings
    no_grad_terms: ClassVar[tuple[str, ...]] = ()
    replaces_base: ClassVar[bool] = False
    is_method: ClassVar[bool] = True
    supported_modules: ClassVar[str] = "matrix"

    def __init__(
        self, layer: TargetModule, spec: AdapterConfig, generator: torch.Generator
    ) -> None:
        """Parameters, float32, that leave the layer's output unchanged; random numbers come from `generator` (CPU)."""
        super().__init__()
        self.layer = layer
        self.restart_delta: Tensor | None  # (out, in) float32: what earlier restarts merged
        self.register_buffer("restart_delta", None)
        self.restarts = int(spec.method_settings.get("restarts", 0))  # how many there were
        if self.restarts and type(self).reset_parameters is not AdapterLayer.reset_parameters:
            self.restart_delta = torch.zeros(
                layer.out_features, layer.in_features, device=layer.device
            )

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 + weight * D(x, y0): x the layer's input, y0 = W x + bias (..., out), not to be written into."""
        raise TypeError(f"{type(self).__name__} must say what it adds")

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The matrix (out, in), float32 or wider, of the layer that has taken this delta in."""
        raise TypeError(f"{type(self).__name__} must say what a merged weight is")

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Set the parameters back to where they start, once `accumulated` holds what they said (see restart.py)."""
        raise SettingsError(
            f"{type(self).__name__} cannot merge and restart",
            where="restart_every",
            hint="--method lora",
        )

    def add_restart_delta(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """y0 and, weighted, what earlier restarts merged: (..., out)."""
        if self.restart_delta is None:
            return y0
        return y0 + weight * self.layer.project(x, self.restart_delta.to(y0.dtype))

    def merge_restart_delta(self, matrix: Tensor) -> Tensor:
        """The matrix (out, in) and what earlier restarts merged."""
        return matrix if self.restart_delta is None else matrix + self.restart_delta.to(matrix)

    def as_low_rank(self) -> tuple[Tensor, Tensor] | None:
        """Return B (out, r), scaled, and A (r, in) whose product is all that this layer adds.

        None where the update has full rank or depends on the base's weight.
        """
        if self.low_rank_tensors is None or self.restart_delta is not None:
            return None
        a, b = (getattr(self, name) for name in self.low_rank_tensors)
        return self.scale * b, a  # type: ignore[operator]

    @classmethod
    def names_on_disk(cls, layer: TargetModule) -> Mapping[str, str]:
        """Return the name on disk of each parameter at `layer`, after the module's path."""
        if isinstance(layer.module, nn.Embedding):
            return {n: cls.embedding_names.get(n, name) for n, name in cls.tensor_names.items()}
        return cls.tensor_names

    @classmethod
    def tensor_shapes(
        cls, layer: TargetModule, config: AdapterConfig
    ) -> dict[str, tuple[int, ...]]:
        """Return the shape on disk of each parameter at `layer`."""
        sizes = layer.sizes(config.rank_of(layer.path))
        rules = cls.shape_rules
        return {name: evaluate_shapes(rules[name], sizes)[0] for name in cls.tensor_names}

    @classmethod
    def num_parameters(cls, layer: TargetModule, spec: AdapterConfig) -> int:
        """How many numbers this delta learns at `layer`, by its formula."""
        raise TypeError(f"{cls.__name__} must say how many numbers it learns")

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """What it costs at `layer` on a kind of device; unless a method says better, its input and output are kept."""
        return LayerCost(
            True, layer.in_features + layer.out_features, float(cls.num_parameters(layer, spec))
        )


def check_method_settings(method: type[AdapterLayer], config: AdapterConfig) -> None:
    """Raise `SettingsError` where `config` has a setting that `method` does not read."""
    fields = [name for name in method.settings_class.model_fields if name != "restart_steps"]
    for name in config.method_settings:
        if name not in (*fields, *RESTART_KEYS):
            raise SettingsError(
                f"{config.method} has no setting {name!r}",
                where=config.method,
                hint=did_you_mean(name, [*fields, RESTART_KEYS[0]]),
            )
