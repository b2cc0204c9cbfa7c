"""The adapter layer: D_k of the equation, at one module.

    y[t] = y0[t] + sum over k of w_k[t] * D_k(x[t], y0[t])

A method is one file with one class, whose name no other file knows. It defines its parameters and
their initialization (`__init__`: the model's output must be unchanged), their number
(`num_parameters`), what they add (`forward`), the merged weight (`merged_weight`), the names of its
tensors on disk (`tensor_names`), and the cost of a pass (`layer_cost`). A method that can merge and
restart also defines `reset_parameters`, and calls `add_restart_delta` and `merge_restart_delta`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from afina.adapters.target_module import TargetModule
from afina.errors import SettingsError, did_you_mean
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_formats import evaluate_shapes
from afina.kernels.dispatch import kernels
from afina.settings.groups import MethodSettings

RESTART_KEYS = ("restart_every", "restarts")  # in afina.json: the interval, and the count


@dataclass(frozen=True)
class LayerCost:
    """Cost of an adapter layer in addition to its base module, for the planner.

    Attributes:
        saves_input: Whether backward reads x; layers that read the same x share it.
        saved_numel: Further elements saved for backward, per token.
        macs_per_token: Multiply-adds of the forward pass per token; backward has twice as many.
        macs_per_pass: Multiply-adds with the dense weight in each pass, for any number of tokens.
        workspace_numel: Elements allocated during the pass, per token, besides inputs, outputs and
            what is saved.
    """

    saves_input: bool
    saved_numel: int
    macs_per_token: float
    macs_per_pass: float = 0.0
    workspace_numel: float = 0.0


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
        fused_kernel: The kernel that computes what the method adds: "lora" reads `a`, `b` and
            `scale`, "mora" reads `layout`, `m` and `scale`; None: there is none.
        no_grad_terms: Methods without arguments whose value the gradient takes as constant.
        replaces_base: Whether the output is the layer's own, and the base need not run.
        is_method: False for a part that an adapter of any method may have.
        supported_modules: "matrix": modules with one weight matrix; "experts": these, and the
            parameters of fused experts, with one matrix per expert; "any": all with parameters.
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
        """Initialize float32 parameters that leave the output unchanged.

        Args:
            layer: The frozen module.
            spec: The adapter's configuration.
            generator: Source of random numbers, on the CPU.
        """
        super().__init__()
        self.layer, self.dropout = layer, spec.dropout
        self.disk_path = spec.wrapper_path(layer.path) if layer.is_experts else layer.path
        self._inference_cache: tuple[object, tuple[Tensor, ...]] | None = None
        self.restart_delta: Tensor | None  # (out, in) float32: what earlier restarts merged
        self.register_buffer("restart_delta", None)
        self.restarts = int(spec.method_settings.get("restarts", 0))  # number of restarts so far
        if self.restarts and type(self).reset_parameters is not AdapterLayer.reset_parameters:
            self.restart_delta = torch.zeros(
                layer.out_features, layer.in_features, device=layer.device
            )

    def forward(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 + weight * D(x, y0).

        Args:
            x: The module's input.
            y0: The base's output W x + bias `(..., out)`, which must not be changed.
            weight: Factor of the update.
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def expert_factors(self, dtype: torch.dtype, weight: float) -> list[tuple[Tensor, Tensor]]:
        """Return the factors of each expert's update, for methods that support "experts".

        Returns:
            A `(r, in)` and B transposed `(r, out)`, scaled by `weight` too, in `dtype`.
        """
        raise TypeError(f"{type(self).__name__} must define expert_factors")

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Return `weight` `(out, in)`, float32 or wider, with this layer merged."""
        raise TypeError(f"{type(self).__name__} must define merged_weight")

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters again, after `restart_delta` has taken their update."""
        raise SettingsError(
            f"{type(self).__name__} cannot merge and restart",
            where="restart_every",
            hint="--method lora",
        )

    @property
    def can_fuse(self) -> bool:
        """Whether `fused_kernel` computes all that the layer adds in its present mode."""
        drops = self.dropout and self.training
        return self.fused_kernel is not None and self.restart_delta is None and not drops

    def kernel_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the weights as `fused_kernel` reads them for inputs of `dtype`."""
        raise TypeError(f"{type(self).__name__} has no fused kernel")

    @torch.no_grad()
    def inference_weights(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return `kernel_weights`, kept until a parameter or the instruction set changes."""
        versions = (
            (t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.parameters()
        )
        state = (dtype, kernels.isa, *versions)
        if self._inference_cache is None or self._inference_cache[0] != state:
            self._inference_cache = (state, self.kernel_weights(dtype))
        return self._inference_cache[1]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, and drop cached weights: fused optimizers count no versions."""
        self._inference_cache = None
        return super().train(mode)

    def add_restart_delta(self, x: Tensor, y0: Tensor, weight: float) -> Tensor:
        """Return y0 `(..., out)` plus, weighted, what earlier restarts merged."""
        if self.restart_delta is None:
            return y0
        return y0 + weight * self.layer.project(x, self.restart_delta.to(y0.dtype))

    def merge_restart_delta(self, matrix: Tensor) -> Tensor:
        """Return the matrix `(out, in)` plus what earlier restarts merged."""
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
    def supports(cls, layer: TargetModule) -> bool:
        """Return whether the method adapts a module of this kind."""
        if layer.is_experts:
            return cls.supported_modules == "experts"
        return cls.supported_modules == "any" or layer.is_matrix

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
        """Return the number of trainable parameters at `layer`, by a formula."""
        raise TypeError(f"{cls.__name__} must define num_parameters")

    @classmethod
    def layer_cost(cls, layer: TargetModule, spec: AdapterConfig, device: str) -> LayerCost:
        """Return the cost at `layer` on a device type; by default, input and output are saved."""
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
