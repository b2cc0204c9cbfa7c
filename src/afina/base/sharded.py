"""A frozen base split over several processes: each holds a part of every block, and gathers a block when its turn comes.

    block n            process 0            process 1
    held           | rows 0 .. 511  |   | rows 512 .. 1023 |       a weight by its rows, NF4 codes and scales too
    in use         | rows 0 .. 1023 |   | rows 0 .. 1023   |       during its forward, and again during its backward

Blocks hold nearly all of a model; what lies outside (embeddings, norms, the output layer) stays whole everywhere, and
so do adapters. PyTorch's `fully_shard` does the work.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from afina.base.frozen import Frozen
from afina.errors import BaseError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the model's lists of modules, without those within another."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        within = any(path.startswith(f"{block}.") for block in found)
        if name.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList) and not within:
            found[path] = module
    return list(found.values())


def shard(base: Frozen, kept: Iterable[nn.Parameter]) -> None:
    """Split the blocks of `base` over all processes, which must all call this; `kept`, adapters' parameters, stay whole.

    Raises `BaseError` where the model is no sequence of blocks.
    """
    found, whole = blocks(base.model), set(kept)
    if not found:
        raise BaseError("this model has no blocks to split", where=base.name, hint="--device auto")
    mesh = init_device_mesh(base.device.type, (dist.get_world_size(),))
    for block in found:
        fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
