"""Attach adapters to a model, and detach them so that it is as before.

Attaching replaces target modules by `ModuleWithAdapters`, which contain the frozen module and the
layers of any number of adapters; only this file does so. Detaching restores the original modules.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from afina.adapters.active import ActiveAdapter, ActiveAdapters
from afina.adapters.base import RESTART_KEYS, AdapterLayer, check_method_settings
from afina.adapters.experts import ExpertLayers, ExpertsWithAdapters
from afina.adapters.modules import ModuleWithAdapters, ParameterWithAdapters
from afina.adapters.registry import get_method
from afina.adapters.segments import ForwardContext
from afina.adapters.target_module import ExpertMatrices, FreeParameter, TargetModule
from afina.adapters.trainable_tokens import TrainableTokens
from afina.errors import AdapterError, SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.models.experts import EXPERT_MATRICES, expert_matrices

Wrapper = ModuleWithAdapters | ParameterWithAdapters | ExpertLayers


class Adapter:
    """An attached adapter.

    Attributes:
        name: Its name in the model.
        config: Its configuration.
        layers: Its layers by module path.
        frozen_companions: Adapters over which it was trained, and which are active with it.
    """

    def __init__(self, name: str, spec: AdapterConfig, layers: dict[str, AdapterLayer]) -> None:
        self.name, self.config, self.layers = name, spec, layers
        self.frozen_companions: tuple[ActiveAdapters, ...] = ()

    @property
    def active(self) -> ActiveAdapters:
        """The adapter and its companions, as they are active together."""
        own = ActiveAdapters((ActiveAdapter(self.name, self.config.invocation),))
        return ActiveAdapters.combine([own, *self.frozen_companions])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ("module path.parameter", parameter) in the model's order, a tied one once."""
        seen: set[int] = set()
        for path, delta in self.layers.items():
            for name, parameter in delta.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}", parameter

    def parameters(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [parameter for _, parameter in self.named_parameters()]

    def num_parameters(self) -> int:
        """Return the number of trainable parameters."""
        return sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> None:
        """Enable or disable dropout in the adapter's layers."""
        for delta in self.layers.values():
            delta.train(mode)


def frozen_module(model: nn.Module, path: str) -> nn.Module:
    """Return the base's module at `path`, without adapters; a parameter as a module.

    Raises:
        AdapterError: the base has no such module or parameter.
    """
    owner, name = frozen_experts(model, path)
    if owner is not None:
        return ExpertMatrices(getattr(owner, name), bool(owner.is_transposed))
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return FreeParameter(_loose(model, path))
    return module.base if isinstance(module, ModuleWithAdapters) else module


def frozen_experts(model: nn.Module, path: str) -> tuple[Any, str]:
    """Return the fused experts whose parameter is at `path`, without adapters, and its name.

    None and the name where `path` is no such parameter.
    """
    parent, _, name = path.rpartition(".")
    if name not in EXPERT_MATRICES:
        return None, name
    try:
        owner = model.get_submodule(parent)
    except AttributeError:
        return None, name
    owner = owner.base if isinstance(owner, ModuleWithAdapters) else owner
    return (owner if name in expert_matrices(owner) else None), name


def _loose(model: nn.Module, path: str) -> nn.Parameter:
    """Return the base's parameter at `path`."""
    parent, _, name = path.rpartition(".")
    try:
        owner: Any = model.get_submodule(parent)
        own = (
            owner.parametrizations[name].original
            if parametrize.is_parametrized(owner, name)
            else getattr(owner, name)
        )
    except AttributeError:
        own = None
    if not isinstance(own, nn.Parameter):
        raise AdapterError(
            "the base has no such module", where=path, why="the adapter is for another model"
        )
    return own


def find_wrapper(model: nn.Module, path: str) -> Wrapper | None:
    """Return the wrapper with the adapter layers at `path`; None without adapters."""
    if frozen_experts(model, path)[0] is not None:
        parent, _, name = path.rpartition(".")
        experts = model.get_submodule(parent)
        return experts.layers_at(name) if isinstance(experts, ExpertsWithAdapters) else None
    try:
        module = model.get_submodule(path)
    except AttributeError:
        owner: Any = model.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        return owner.parametrizations[name][0] if parametrize.is_parametrized(owner, name) else None
    return module if isinstance(module, ModuleWithAdapters) else None


def replaces_base_modules(model: nn.Module, name: str) -> bool:
    """Return whether the attached adapter `name` has a layer that replaces one of the base."""
    wrappers = (ModuleWithAdapters, ParameterWithAdapters, ExpertLayers)
    layers = [
        m.deltas[name] for m in model.modules() if isinstance(m, wrappers) and name in m.deltas
    ]
    return any(bool(layer.replaces_base) for layer in layers)


def insert_wrapper(model: nn.Module, layer: TargetModule, context: ForwardContext) -> Wrapper:
    """Insert a new wrapper into the model, for a module or a parameter, and return it."""
    if layer.is_experts:
        parent, _, name = layer.path.rpartition(".")
        experts = TargetModule(parent, frozen_module(model, parent))
        inserted = insert_wrapper(model, experts, context)
        assert isinstance(inserted, ExpertsWithAdapters)
        return inserted.layers_at(name)
    if expert_matrices(layer.module):
        _put(model, layer.path, wrapped := ExpertsWithAdapters(layer, context))
        return wrapped
    if not isinstance(layer.module, FreeParameter):
        _put(model, layer.path, wrapper := ModuleWithAdapters(layer, context))
        return wrapper
    parent, _, name = layer.path.rpartition(".")
    owner = model.get_submodule(parent)
    over = ParameterWithAdapters(context, list(owner._parameters))
    parametrize.register_parametrization(owner, name, over)
    return over


def remove_wrapper(model: nn.Module, path: str, wrapper: Wrapper) -> None:
    """Restore the original module or parameter at `path`."""
    if isinstance(wrapper, ExpertLayers):
        return remove_wrapper(model, wrapper.module, wrapper.owner)
    if isinstance(wrapper, ExpertsWithAdapters) and not wrapper.is_empty:
        return None
    if isinstance(wrapper, ModuleWithAdapters):
        return _put(model, path, wrapper.base)
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
    for known in [n for n in wrapper.order if n in owner._parameters]:
        owner._parameters[known] = owner._parameters.pop(known)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def create_layers(
    model: nn.Module, spec: AdapterConfig, seed: int = 0, name: str | None = None
) -> dict[str, AdapterLayer]:
    """Return new adapter layers by module path, not yet attached; `model` is unchanged.

    Args:
        model: The base.
        spec: The adapter's configuration.
        seed: Seed of the initialization, in the order of the targets.
        name: A name that no attached adapter may have.

    Raises:
        AdapterError: the name is taken, or a module is of a kind that the method does not support.
    """
    kind = get_method(spec.method)
    check_method_settings(kind, spec)
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, AdapterLayer] = {}
    tied: dict[int, nn.Parameter] = {}
    vocabulary = vocabulary_layers(model) if spec.trainable_tokens else []
    for path in [*spec.target_modules, *spec.modules_to_save, *vocabulary]:
        layer = TargetModule(path, frozen_module(model, path))
        own = (
            TrainableTokens
            if path in vocabulary
            else get_method("full")
            if path in spec.modules_to_save
            else kind
        )
        if not own.supports(layer):
            raise _unsupported(spec.method, layer)
        if layer.is_experts:
            _check_experts(spec, path)
        if name is not None and (at := find_wrapper(model, path)) is not None and name in at.deltas:
            raise AdapterError(f"an adapter named {name!r} is attached already", where=path)
        if path in deltas:
            raise AdapterError(
                "this module is a target, and has rows of new tokens too",
                where=path,
                why="these rows would be adapted twice",
                hint="remove it from --target-modules",
            )
        deltas[path] = own(layer, spec, generator)
        if deltas[path].replaces_base or path in vocabulary:
            _keep_ties(layer, deltas[path], tied)
    return deltas


def _unsupported(method: str, layer: TargetModule) -> AdapterError:
    if not layer.is_experts:
        what = f"{method} does not support a {type(layer.module).__name__}"
        return AdapterError(what, where=layer.path)
    what = f"{method} does not adapt the parameters of fused experts"
    return AdapterError(what, where=layer.path, hint="--method lora")


def _check_experts(spec: AdapterConfig, path: str) -> None:
    """Raise `SettingsError` for what a LoRA of fused experts cannot have, as in PEFT."""
    given = {"dropout": spec.dropout, "restart_steps": spec.method_settings.get(RESTART_KEYS[0])}
    for name, value in given.items():
        if value:
            what = f"{name} is not supported at fused experts"
            why = f"{path} has one matrix per expert"
            hint = f"leave {name} out, or other target modules"
            raise SettingsError(what, where=name, why=why, hint=hint)


def attach(
    model: nn.Module, context: ForwardContext, name: str, spec: AdapterConfig, seed: int = 0
) -> Adapter:
    """Attach a new adapter to `model`; it is inactive until a forward context names it.

    Args:
        model: The base.
        context: The base's forward context.
        name: The adapter's name.
        spec: Its configuration.
        seed: Seed of the initialization, in the order of the targets.

    Raises:
        AdapterError: the name is taken, or a module is of a kind that the method does not support.
    """
    deltas = create_layers(model, spec, seed, name)
    for path, delta in deltas.items():
        wrapper = find_wrapper(model, path) or insert_wrapper(model, delta.layer, context)
        wrapper.deltas[name] = delta
    return Adapter(name, spec, deltas)


def _keep_ties(layer: TargetModule, delta: AdapterLayer, tied: dict[int, nn.Parameter]) -> None:
    """Tie the layer's parameters whose originals are tied in the base."""
    originals = dict(layer.module.named_parameters(recurse=False))
    for name, own in list(delta.named_parameters(recurse=False)):
        if id(originals[name]) in tied:
            delta.share(name, tied[id(originals[name])])  # type: ignore[operator]
        else:
            tied[id(originals[name])] = own


def vocabulary_layers(model: Any) -> list[str]:
    """Return the paths of the embedding and of the output layer, tied or not."""
    wanted = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [
        path for path, module in model.named_modules() if any(module is layer for layer in wanted)
    ]


def detach(model: nn.Module, adapter: Adapter) -> None:
    """Detach an adapter; modules without any are restored."""
    for path in adapter.layers:
        wrapper = find_wrapper(model, path)
        assert wrapper is not None
        del wrapper.deltas[adapter.name]
        if not wrapper.deltas and not (
            isinstance(wrapper, ModuleWithAdapters) and wrapper.serving_layers
        ):
            remove_wrapper(model, path, wrapper)
