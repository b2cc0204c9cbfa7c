"""A frozen base sharded over processes, by layers, with PyTorch's `fully_shard`.

    layer n        process 0            process 1
    stored         | rows 0 .. 511  |   | rows 512 .. 1023 |   weights by rows, NF4 codes too
    in use         | rows 0 .. 1023 |   | rows 0 .. 1023   |   during its forward and its backward

Layers contain nearly all of a model; modules outside (embeddings, norms, the output layer) are
replicated, and so are adapters.
"""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from afina.errors import BaseError
from afina.models.frozen import FrozenModel


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the model's module lists by path, without nested ones."""
    layers: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        is_nested = any(path.startswith(f"{layer}.") for layer in layers)
        if (
            name.isdigit()
            and isinstance(model.get_submodule(parent), nn.ModuleList)
            and not is_nested
        ):
            layers[path] = module
    return layers


def shard_model(
    base: FrozenModel, kept: Iterable[nn.Parameter], device: torch.device, processes: int
) -> None:
    """Move `base` to `device`, its layers sharded over all processes, which must all call this.

    At most one layer at a time is complete on the device.

    Args:
        base: The base.
        kept: The adapters' parameters, which are replicated.
        device: The device of this process.
        processes: Their number.

    Raises:
        BaseError: the model has no list of layers.
    """
    layers, adapters = decoder_layers(base.model), set(kept)
    if not layers:
        raise BaseError(
            "this model has no list of layers to shard", where=base.name, hint="no --fsdp"
        )
    mesh = init_device_mesh(device.type, (processes,)) if processes > 1 else None
    for layer in layers.values():
        layer.to(device)
        if mesh is not None:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    for path, tensor in chain(base.model.named_parameters(), base.model.named_buffers()):
        if not any(path.startswith(f"{layer}.") for layer in layers):
            tensor.data = tensor.data.to(device)


def is_sharded(base: FrozenModel) -> bool:
    """Return whether the base's layers are sharded over processes."""
    return any(isinstance(module, FSDPModule) for module in base.model.modules())
