"""Sizes of each decoder layer of a model with its adapters, from the shapes of its modules."""

from dataclasses import dataclass

from torch import nn

from afina.adapters.attach import frozen_module
from afina.adapters.registry import get_method
from afina.adapters.target_module import TargetModule
from afina.adapters.target_selection import layer_index
from afina.models.experts import expert_matrices
from afina.models.fast_llama import MLPS, NORMS
from afina.planning.model_shape import AdapterSize, ModelShape

# Modules with the same input, which is saved once for the adapters of all of them.
SAME_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})


@dataclass
class LayerSizes:
    """Sizes of one decoder layer; elements per token unless stated otherwise.

    Attributes:
        weights: Weights in matrix products (of experts, those that a token passes).
        largest_matrix: Weights of the largest matrix.
        nf4_weights: Weights that are dequantized at each product.
        trained_weights: Weights with gradients of their own.
        norms: Inputs of the norms.
        mlp_width: Width of the feed-forward network.
        adapter_inputs: Inputs saved for adapters.
        adapter_saved: What adapters save in addition.
        adapter_macs: Multiply-accumulates of the adapters.
        adapter_macs_per_pass: Those of a pass, independent of its tokens.
        adapter_workspace: Temporaries of the adapters, at most.
        adapted_width: Inputs and outputs of adapted modules.
        adapter_outputs: Outputs of adapted modules that the update is added to.
        num_trainable: Trainable parameters.
        has_gradient: Whether gradients flow through the layer.
    """

    weights: float = 0.0
    largest_matrix: int = 0
    nf4_weights: int = 0
    trained_weights: int = 0
    norms: int = 0
    mlp_width: int = 0
    adapter_inputs: int = 0
    adapter_saved: float = 0
    adapter_macs: float = 0.0
    adapter_macs_per_pass: float = 0.0
    adapter_workspace: float = 0.0
    adapted_width: int = 0
    adapter_outputs: int = 0
    num_trainable: int = 0
    has_gradient: bool = False


def layer_sizes(
    shape: ModelShape, size: AdapterSize, quantized: set[str], output_paths: set[str], device: str
) -> list[LayerSizes]:
    """Return the sizes of each decoder layer.

    Args:
        shape: The model.
        size: The adapter on it.
        quantized: Paths of the matrices in NF4.
        output_paths: Paths of the modules above the layers.
        device: Kind of device; what an adapter saves depends on its kernels.
    """
    sizes = [LayerSizes() for _ in range(shape.num_layers)]
    saved_inputs: set[tuple[str, int]] = set()
    for path, module in shape.model.named_modules():
        if (number := layer_index(path)) is None:
            continue
        cost, name, target = sizes[number], type(module).__name__, TargetModule(path, module)
        if target.is_matrix and not isinstance(module, nn.Embedding):
            _add_matrix(cost, target, path in quantized)
            if path in size.layers:
                _add_adapter(cost, target, size, saved_inputs, device)
        elif "norm" in name.lower():
            _add_norm(cost, shape, path, module)
        elif name in MLPS or name.endswith("MLP"):
            matrices = (TargetModule("", m) for m in module.modules())
            width = max((m.out_features for m in matrices if m.is_matrix), default=0)
            cost.mlp_width += width if name in MLPS else 3 * width
        elif expert_matrices(module):
            _add_experts(cost, shape, path, size, quantized)
        else:
            cost.weights += _expert_weights(shape, module)
    below = {path for path in size.layers if layer_index(path) is None} - output_paths
    has_gradient = bool(below or size.config.trainable_tokens)
    adapted = {layer_index(path) for path in size.layers}
    for number, cost in enumerate(sizes):
        has_gradient = has_gradient or number in adapted
        cost.has_gradient = has_gradient
    for path, trainable in size.layers.items():
        if (number := layer_index(path)) is not None:
            sizes[number].num_trainable += trainable
    return sizes


def _add_matrix(cost: LayerSizes, target: TargetModule, is_quantized: bool) -> None:
    weights = target.in_features * target.out_features
    cost.weights += weights
    cost.largest_matrix = max(cost.largest_matrix, weights)
    cost.nf4_weights += weights if is_quantized else 0


def _add_adapter(
    cost: LayerSizes,
    target: TargetModule,
    size: AdapterSize,
    saved_inputs: set[tuple[str, int]],
    device: str,
) -> None:
    kind, (parent, _, leaf) = get_method(size.config.method), target.path.rpartition(".")
    own = kind.layer_cost(target, size.config, device)
    group = next((n for n, leaves in enumerate(SAME_INPUT) if leaf in leaves), None)
    if own.saves_input and (group is None or (parent, group) not in saved_inputs):
        cost.adapter_inputs += target.in_features
        if group is not None:
            saved_inputs.add((parent, group))
    cost.adapter_saved += own.saved_numel
    cost.adapter_workspace = max(cost.adapter_workspace, own.workspace_numel)
    cost.adapter_macs += own.macs_per_token
    cost.adapter_macs_per_pass += own.macs_per_pass
    cost.adapted_width += target.in_features + target.out_features
    if kind.replaces_base:
        cost.trained_weights += target.in_features * target.out_features
    else:
        cost.adapter_outputs += target.out_features


def _add_experts(
    cost: LayerSizes, shape: ModelShape, path: str, size: AdapterSize, quantized: set[str]
) -> None:
    """Add fused experts: a token passes some, all are dequantized, and each has its adapter."""
    kind = get_method(size.config.method)
    for name in expert_matrices(shape.model.get_submodule(path)):
        own = f"{path}.{name}"
        target = TargetModule(own, frozen_module(shape.model, own))
        active = min(getattr(shape.config, "num_experts_per_tok", 1), target.num_experts)
        one = target.in_features * target.out_features
        cost.weights += active * one
        cost.largest_matrix = max(cost.largest_matrix, one)
        cost.nf4_weights += target.num_experts * one if own in quantized else 0
        cost.mlp_width += active * target.in_features  # gathered inputs, and the gated ones
        if own in size.layers:
            added = kind.layer_cost(target, size.config, "cpu")
            cost.adapter_inputs += active * target.in_features
            cost.adapter_saved += active * added.saved_numel
            cost.adapter_macs += added.macs_per_token * active / target.num_experts
            cost.adapted_width += active * (target.in_features + target.out_features)
            cost.adapter_outputs += active * target.out_features


def _add_norm(cost: LayerSizes, shape: ModelShape, path: str, module: nn.Module) -> None:
    """Add the inputs of a norm: one per token, or of the heads, which are normed together."""
    own = sum(p.numel() for n, p in module.named_parameters(recurse=False) if n == "weight")
    is_of_heads = path.endswith(("q_norm", "k_norm")) and own < shape.hidden_size
    is_fast = type(module).__name__ in NORMS
    copies = 1 if is_fast else 1 + 12 // shape.dtype.itemsize  # others save float32 copies
    cost.norms += (shape.heads[1] if is_of_heads else own) * copies


def _expert_weights(shape: ModelShape, module: nn.Module) -> float:
    """Return the weights of experts of another kind that a token passes, of all they have."""
    active = getattr(shape.config, "num_experts_per_tok", 1)
    ratio = active / (getattr(shape.config, "num_local_experts", None) or 1)
    weights = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 3)
    return min(1.0, ratio) * weights
