"""A merge method: the unweighted mean."""

from typing import Any

import torch
from torch import Tensor

from afina.merging.registry import register_merge_method


@register_merge_method("mean", form="entrywise", precision="float32")
def mean(updates: Any, settings: Any) -> Tensor:
    """Unweighted mean of the updates."""
    return torch.stack([update.matrix for update in updates]).mean(0)
