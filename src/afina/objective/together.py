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

from afina.data.batches import FlatBatch
from afina.objective.language import LanguageTask
from afina.objective.task import Task
from afina.route.invocation import Route
from afina.segments import Segments

Part = tuple[Task, Any, Route]


def side_by_side(parts: Sequence[Part]) -> list[Tensor]:
    """The summed loss of each (task, batch, route); in one pass where all are language models'."""
    if len(parts) == 1 or not all(isinstance(task, LanguageTask) for task, _, _ in parts):
        return [task.loss(batch, route) for task, batch, route in parts]
    base = parts[0][0].base  # type: ignore[attr-defined]
    batches: list[FlatBatch] = [batch for _, batch, _ in parts]
    lengths = [len(batch.tokens) for batch in batches]
    tables = [route.segments(batch.tokens, batch.bounds) for _, batch, route in parts]
    starts = accumulate(lengths, initial=0)
    bounds = [0, *(start + end for start, batch in zip(starts, batches, strict=False) for end in batch.bounds[1:])]
    tokens, positions, labels = (torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "positions", "labels"))
    with base.board.route(Segments.joined(tables, lengths)):
        losses = base.losses(tokens, positions, tuple(bounds), labels)
    return [part.sum() for part in losses.split([batch.label_count for batch in batches])]
