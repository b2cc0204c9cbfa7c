"""What the training loop knows of an objective: batches for a step, the loss of a batch, how it stands.

Every objective is a class like this one; the loop is the same for all.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from afina.adapters.active import ActiveAdapters

Total = Callable[[Tensor], Tensor]  # from this process's numbers to their sum over all


def no_reduce(numbers: Tensor) -> Tensor:
    """The sum over one process."""
    return numbers


class Objective(Protocol):
    """An objective with its data, on a base.

    What a batch is, is its own affair; but batch.shard(number, of) is one of `of` parts of it, their losses and counts
    those of the batch when they are added up. Several processes take one each.
    """

    @property
    def train(self) -> Sequence[Any]:
        """The rows to learn from."""

    @property
    def eval_rows(self) -> Sequence[Any]:
        """The rows to judge by."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the data."""

    def step_batches(self, step: int) -> list[Any]:
        """The micro-batches of an optimizer step; a pure function of the step, so that runs resume."""

    def collate(self, rows: Sequence[Any], seed: int) -> Any:
        """A batch of some of the rows; `seed` decides what is random about them."""

    def row_locations(self, step: int) -> list[str]:
        """Names (file:line) of the rows of an optimizer step, for errors."""

    def num_targets(self, batch: Any) -> int:
        """What the batch's loss is a sum over: labelled tokens, rows or pairs."""

    def num_tokens(self, batch: Any) -> int:
        """Tokens (or rows, where there are none) that pass through the model."""

    def loss(self, batch: Any, route: ActiveAdapters | None) -> Tensor:
        """Sum of the losses of the batch, under `route` (None: the base alone)."""

    def eval_loss(self, route: ActiveAdapters | None) -> float:
        """Mean loss on the held-out rows."""

    def train_loss(self, route: ActiveAdapters | None) -> float:
        """Mean loss on as many of the rows that are learned from, those of `learned_rows`."""

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """What the last step, and the check after it, had to tell besides the loss; `total` adds up over processes."""


def train_sample(task: Objective) -> Sequence[Any]:
    """As many of the rows that are learned from as are held out, spread over all of them."""
    return task.train[:: max(1, len(task.train) // max(1, len(task.eval_rows)))][
        : len(task.eval_rows)
    ]
