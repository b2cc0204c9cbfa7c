"""The contract of an objective: what is minimized, on which rows, and what is measured.

    prepare(settings, base)     read, tokenize and split the rows     class method, before training
    step_batches(step)          micro-batches of an optimizer step    a pure function of the step
    loss(batch, active)         sum over the targets of a batch       mean: divided by num_targets
    row_losses(rows, active)    losses of single rows                 for confidence intervals
    evaluate(active)            metrics of the eval rows              for run.json and `afina eval`
    report(before, after)       what changed, as keys and sentences

The trainer, the planner and `afina eval` know this class and no subclass of it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.models.frozen import FrozenModel

if TYPE_CHECKING:
    from afina.adapters.attach import Adapter
    from afina.adapters.load_run import LoadedRun
    from afina.data.renderer import Example
    from afina.objectives.prepared import PreparedData
    from afina.objectives.reference import ReferencePolicy
    from afina.objectives.workload import StepWorkload
    from afina.settings import EvalSettings, TrainSettings

Total = Callable[[Tensor], Tensor]  # from the values of this process to their sum over all


def no_reduce(values: Tensor) -> Tensor:
    """Return `values`: their sum over one process."""
    return values


@dataclass(frozen=True)
class Units:
    """Words of a report: losses are nats per `unit`, among `choices`; the model reads `piece`s."""

    unit: str = "token"
    choices: str = "tokens"  # empty where e to the loss is no perplexity
    piece: str = "token"


class LossSum(NamedTuple):
    """The loss of a row or batch, summed over its targets (nats), and how many targets it has."""

    total: float
    num_targets: int

    @staticmethod
    def mean(sums: Sequence["LossSum"]) -> float:
        """Return the mean loss per target."""
        return sum(one.total for one in sums) / max(1, sum(one.num_targets for one in sums))


class Objective:
    """An objective with its rows, on a base; subclasses are registered by `register_objective`.

    A batch is whatever the objective makes it; `batch.shard(number, of)` returns one of `of` parts,
    whose losses and target counts add up to those of the batch. Each process takes one.
    """

    name: ClassVar[str] = ""
    schema: ClassVar[str] = "sft"  # kind of row: the name of a row schema
    units: Units = Units()
    needs_reference: ClassVar[bool] = False  # compares with the policy that the run began with
    head: ClassVar[str | None] = None  # module that the objective adds to the base
    saves_head: ClassVar[bool] = True  # whether that module is part of the saved adapter
    default_learning_rate_factor: ClassVar[float] = 1.0
    min_default_steps: ClassVar[int] = 100  # of a run whose length is not given
    shares_base: ClassVar[bool] = True  # several runs can train on one loaded base
    shares_pass: ClassVar[bool] = False  # micro-batches of several runs can share a forward pass
    supports_processes: ClassVar[bool] = True  # runs under torchrun and FSDP
    maximizes_reward: ClassVar[bool] = False  # eval loss is minus the mean reward
    has_baseline: ClassVar[bool] = True  # the base without the adapter can be evaluated
    renders_chats: ClassVar[bool] = True  # rows are prompts and answers of a language model
    chunks_texts: ClassVar[bool] = False  # texts are trained in chunks, of any length
    planned_by_tokens: ClassVar[bool] = False  # steps can be planned without loading the base
    planned_by_trial: ClassVar[bool] = False  # the planner tries small passes, and counts no layers
    report_key: ClassVar[str | None] = None  # of what `report` returns, in run.json
    settings_class: ClassVar[Any] = None  # pydantic class of its own settings

    @classmethod
    def prepare(cls, settings: "TrainSettings", base: Any = None) -> "PreparedData":
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        raise NotImplementedError

    @classmethod
    def from_run(cls, opened: "LoadedRun", settings: "EvalSettings") -> "Objective":
        """Return the objective of a run with the rows that `afina eval` evaluates."""
        raise NotImplementedError

    base: FrozenModel
    train: Sequence[Any]
    eval_rows: Sequence[Any]
    options: Any = None  # its own settings
    num_rows: int = 0  # rows of the file that `from_run` read
    policy: ActiveAdapters = BASE_ONLY  # the adapter that is trained
    reference: "ReferencePolicy | None" = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        raise NotImplementedError

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between which there is no state to resume from."""
        return 1

    def step_batches(self, step: int) -> list[Any]:
        """Return the micro-batches of an optimizer step: a pure function of it, so runs resume."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Any], seed: int) -> Any:
        """Return a batch of some rows; `seed` decides what is random about them."""
        raise NotImplementedError

    def row_locations(self, step: int) -> list[str]:
        """Return `file:line` of the rows of an optimizer step, for errors."""
        raise NotImplementedError

    def num_targets(self, batch: Any) -> int:
        """Return what the loss of a batch is a sum over: target tokens, rows or pairs."""
        raise NotImplementedError

    def num_tokens(self, batch: Any) -> int:
        """Return the number of tokens (or images) that pass through the model."""
        raise NotImplementedError

    def loss(self, batch: Any, active: ActiveAdapters) -> Tensor:
        """Return the sum of the losses of a batch with `active` active (empty: the base alone)."""
        raise NotImplementedError

    def mean_loss(self, rows: Sequence[Any], active: ActiveAdapters) -> float:
        """Return the mean loss of some rows, per target."""
        return LossSum.mean(self.row_losses(rows, active))

    def eval_loss(self, active: ActiveAdapters) -> float:
        """Return the mean loss of the eval rows."""
        return self.mean_loss(self.eval_rows, active)

    def train_loss(self, active: ActiveAdapters) -> float:
        """Return the mean loss of `train_sample`."""
        return self.mean_loss(train_sample(self), active)

    def metrics(self, total: Total = no_reduce) -> dict[str, float]:
        """Return metrics of the last step and check; `total` adds up over processes."""
        return {}

    @torch.no_grad()
    def row_losses(self, rows: Sequence[Any], active: ActiveAdapters) -> list[LossSum]:
        """Return the loss of each row."""
        found = []
        for number, row in enumerate(rows):
            batch = self.collate([row], number)
            found.append(LossSum(self.loss(batch, active).item(), self.num_targets(batch)))
        return found

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return metrics of the eval rows with `active` active; `loss` is among them."""
        return {"loss": self.eval_loss(active)}

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Compare two results of `evaluate`: `before`, `after`, `verdict` (sentences), and more.

        `score`, a `TaskScore`, is among them where the objective has a score of its task.
        """
        return {"before": before, "after": after, "verdict": []}

    def plot(self, result: dict[str, Any], file: Path, write: bool) -> None:
        """Draw what `report` has to show into `file`, where `write`, and record its path."""

    def step_workload(self) -> "StepWorkload | None":
        """Return what an optimizer step computes, for the planner; None where it is not known."""
        return None

    def initialize(self, adapter: "Adapter") -> float | None:
        """Set what a new run starts from; return its eval loss where that state may be kept."""
        return None

    def start_run(self, folder: Path) -> None:
        """Write into a run folder what must be known before the first step."""

    def run_facts(self) -> dict[str, Any]:
        """Return what run.json records of this process in addition to the report."""
        return {}

    def next_command(self, folder: Path) -> str | None:
        """Return the command that uses the adapter of a finished run; None where there is none."""
        return f"afina chat {folder}"

    def expected_completions(self) -> "list[Example]":
        """Return the eval rows with a completion, for `afina eval` to generate and compare."""
        return []

    def profile_prompts(self) -> list[list[int]]:
        """Return the prompts (token ids) by which requests are routed to the adapter; or none."""
        return []


def perplexity(loss: float) -> float:
    """Return e to the loss (nats per token)."""
    return math.exp(min(loss, 700.0))


def train_sample(objective: Objective) -> Sequence[Any]:
    """Return as many training rows as there are eval rows, spread over all of them."""
    num_eval = len(objective.eval_rows)
    return objective.train[:: max(1, len(objective.train) // max(1, num_eval))][:num_eval]
