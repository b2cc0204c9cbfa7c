"""Several adapters' batches in one pass over their base, each under its own route and with its own loss.

tokens     | batch of "a"      | batch of "b"  | batch of "c"          |      the base is multiplied once
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
from afina.objectives.language_modeling import LanguageModelingObjective

Part = tuple[Objective, Any, ActiveAdapters]


def multi_adapter_losses(parts: Sequence[Part]) -> list[Tensor]:
    """The summed loss of each (task, batch, route); in one pass where all are language models'."""
    if len(parts) == 1 or not all(
        isinstance(task, LanguageModelingObjective) for task, _, _ in parts
    ):
        return [task.loss(batch, route) for task, batch, route in parts]
    base = parts[0][0].base  # type: ignore[attr-defined]
    batches: list[PackedBatch] = [batch for _, batch, _ in parts]
    lengths = [len(batch.token_ids) for batch in batches]
    tables = [route.segments(batch.token_ids, batch.cu_seqlens) for _, batch, route in parts]
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
        losses = base.token_losses(tokens, positions, tuple(bounds), labels)  # type: ignore[attr-defined]
    return [part.sum() for part in losses.split([batch.num_targets for batch in batches])]
