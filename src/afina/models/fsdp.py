"""A frozen base split over several processes: each holds a part of every block, and gathers a block when its turn comes.

    block n            process 0            process 1
    held           | rows 0 .. 511  |   | rows 512 .. 1023 |       a weight by its rows, NF4 codes and scales too
    in use         | rows 0 .. 1023 |   | rows 0 .. 1023   |       during its forward, and again during its backward

Blocks hold nearly all of a model; what lies outside (embeddings, norms, the output layer) stays whole everywhere, and
so do adapters. PyTorch's `fully_shard` does the work.
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
    """The members of the model's lists of modules by path, without those within another."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        within = any(path.startswith(f"{block}.") for block in found)
        if name.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList) and not within:
            found[path] = module
    return found


def shard_model(
    base: FrozenModel, kept: Iterable[nn.Parameter], device: torch.device, processes: int
) -> None:
    """Move `base` to `device`, its blocks split over all processes, which must all call this.

    `kept`, adapters' parameters, stay whole. No more than one block of it is ever whole on the device. Raises `BaseError`
    where the model is no sequence of blocks.
    """
    found, adapters = decoder_layers(base.model), set(kept)
    if not found:
        raise BaseError("this model has no blocks to split", where=base.name, hint="--device auto")
    mesh = init_device_mesh(device.type, (processes,)) if processes > 1 else None
    for block in found.values():
        block.to(device)
        if mesh is not None:
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    for path, tensor in chain(base.model.named_parameters(), base.model.named_buffers()):
        if not any(path.startswith(f"{block}.") for block in found):
            tensor.data = tensor.data.to(device)


def is_sharded(base: FrozenModel) -> bool:
    """Whether the base's blocks are split over processes."""
    return any(isinstance(module, FSDPModule) for module in base.model.modules())
