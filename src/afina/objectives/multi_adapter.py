"""Batches of several adapters in one pass over their base, each with its own segments and loss.

tokens     | batch of "a"      | batch of "b"  | batch of "c"          |   one product by the base
segments   | (0, 20, "a")      | (20, 35, "b") | (35, 60, "c")         |
losses     |  sum              |  sum          |  sum                  |
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.segments import Segments
from afina.data.packing import PackedBatch
from afina.objectives.base import Objective

Part = tuple[Objective, Any, ActiveAdapters]


def multi_adapter_losses(parts: Sequence[Part]) -> list[Tensor]:
    """Return the summed loss of each (task, batch, active); in one pass where all can share one."""
    if len(parts) == 1 or not all(task.shares_pass for task, _, _ in parts):
        return [task.loss(batch, active) for task, batch, active in parts]
    base: Any = parts[0][0].base
    batches: list[PackedBatch] = [batch for _, batch, _ in parts]
    lengths = [len(batch.token_ids) for batch in batches]
    tables = [active.segments(batch.token_ids, batch.cu_seqlens) for _, batch, active in parts]
    starts = accumulate(lengths, initial=0)
    bounds = [
        0,
        *(
            start + end
            for start, batch in zip(starts, batches, strict=False)
            for end in batch.cu_seqlens[1:]
        ),
    ]
    tokens, positions, labels = (
        torch.cat([getattr(b, name) for b in batches])
        for name in ("token_ids", "positions", "labels")
    )
    with base.forward_context.use(Segments.concat(tables, lengths)):
        losses = base.token_losses(tokens, positions, tuple(bounds), labels)
    return [part.sum() for part in losses.split([batch.num_targets for batch in batches])]
