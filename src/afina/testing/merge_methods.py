"""Promises of a merge method, checked on random updates.

from afina.testing import check_merge_method

def test_mean() -> None:
    check_merge_method("mean")
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from afina.merging.entrywise import WeightedMatrix, random_numbers
from afina.merging.low_rank import LowRankUpdate, WeightedUpdate
from afina.merging.registry import MergeMethod, get_merge_method

NUM_OUTPUTS, NUM_INPUTS = 12, 9


def check_merge_method(name: str, **settings: Any) -> None:
    """Check the promises of a merge method on two random updates of one module.

    The result is a finite update `(out, in)`, equal inputs give equal results, and the inputs are
    not written into. Methods that search weights read adapters, not updates: for them only the
    registration is checked.

    Args:
        name: Name of the registered method.
        settings: Its settings; the defaults where not given.

    Raises:
        AssertionError: a promise does not hold.

    Example:
        check_merge_method("ties", density=0.5)
    """
    method = get_merge_method(name)
    assert method.summary, f"{name}: the function has no docstring, which is its line in the guide"
    if method.form == "weight_search":
        return
    group = method.settings_class(**settings)
    updates = _updates(method)
    first = _dense(method.function(updates, group))
    assert first.shape == (NUM_OUTPUTS, NUM_INPUTS), f"{name}: the result is {tuple(first.shape)}"
    assert first.isfinite().all(), f"{name}: the result is not finite"
    assert torch.equal(first, _dense(method.function(_updates(method), group))), (
        f"{name}: equal inputs give different results"
    )
    for given, known in zip(updates, _updates(method), strict=True):
        same = torch.equal(_dense(given[0]), _dense(known[0]))
        assert same, f"{name}: an input was written into"


def _updates(method: MergeMethod) -> Sequence[Any]:
    """Return two updates of rank 2 and 3, new objects with the same values at each call."""
    generator = torch.Generator().manual_seed(0)
    updates: list[Any] = []
    for rank, weight in ((2, 0.7), (3, 0.3)):
        b = torch.randn(NUM_OUTPUTS, rank, generator=generator, dtype=torch.float64)
        a = torch.randn(rank, NUM_INPUTS, generator=generator, dtype=torch.float64)
        if method.form == "entrywise":
            numbers = random_numbers(0, f"adapter {rank}", "layer")
            updates.append(WeightedMatrix((b @ a).float(), weight, numbers))
        else:
            updates.append(WeightedUpdate(LowRankUpdate(b, a), weight))
    return updates


def _dense(update: LowRankUpdate | Tensor) -> Tensor:
    return update if isinstance(update, Tensor) else update.dense()
