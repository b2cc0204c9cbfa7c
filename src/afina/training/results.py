"""Results of `afina train`: one run, or the runs of a sweep."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.data.several_files import summarize_file
from afina.data.unread import list_unused
from afina.errors import pluralize
from afina.evaluation.results import (
    TableRows,
    class_scores,
    preferences,
    reference_line,
    reward_rows,
)
from afina.io.result import Content, Result, ResultTable, ResultText, next_command
from afina.objectives.task_score import TaskScore


@dataclass(frozen=True, eq=False)
class TrainResult(Result):
    """Finished run: its folder, and `record`, the content of run.json; keys are those of both.

    Attributes:
        next_command: The command that uses the adapter; None where there is none.
    """

    folder: Path
    record: Mapping[str, Any]
    next_command: str | None = None

    def __getitem__(self, key: str) -> Any:
        """Return `folder` as text, or a value of run.json."""
        return str(self.folder) if key == "folder" else self.record[key]

    def __iter__(self) -> Iterator[str]:
        """Iterate over `folder` and the keys of run.json."""
        return iter(("folder", *self.record))

    def __len__(self) -> int:
        """Return the number of keys."""
        return 1 + len(self.record)

    @property
    def verdict(self) -> Sequence[str]:
        """Sentences about what the run changed."""
        return self.record["verdict"]  # type: ignore[no-any-return]

    def content(self) -> list[Content]:
        """Return losses or rewards before and after, verdict, figures and the next command."""
        record = self.record
        return [
            *measured(record, f"run {self.folder}"),
            *map(ResultText, data_notes(record["data"])),
            *(ResultText(f"skipped {line}") for line in record["data"]["skipped"]),
            *(ResultText(f"- {sentence}") for sentence in self.verdict),
            ResultText(self._figures()),
            *next_command(self.next_command),
        ]

    def to_markdown(self) -> str:
        """Return the model card, README.md of the adapter."""
        from afina.training.run_card import model_card

        return model_card(self.record)

    def _figures(self) -> str:
        record, speed = self.record, f"{self.record['tokens_per_second']:,.0f} per second"
        return (
            f"{pluralize(record['steps'], 'optimizer step')}, "
            f"{pluralize(record['tokens'], record['units']['piece'])} in {record['seconds']:.0f} s "
            f"({speed}), peak memory {record['peak_memory_mb']:,.0f} MB, "
            f"adapter {record['adapter_kb']:,.0f} kB"
        )


@dataclass(frozen=True, eq=False)
class SweepResult(Result):
    """Runs of a sweep: `runs` has a mapping for each, with "failed" where it stopped."""

    folder: str
    runs: Sequence[Mapping[str, Any]]

    def content(self) -> list[Content]:
        """Return one table with a row per finished run, and a line per failed one."""
        head = (
            "run",
            "method",
            "rank",
            "learning rate",
            "eval loss before",
            "after",
            "forgetting",
            "trainable parameters",
        )
        finished = [_sweep_row(run) for run in self.runs if "failed" not in run]
        failed = [run for run in self.runs if "failed" in run]
        return [
            ResultTable(f"runs {self.folder}, nats per token", finished, head),
            *(ResultText(f"{run['name']} failed: {run['failed']}") for run in failed),
        ]


def _sweep_row(run: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        run["name"],
        run["method"],
        str(run["rank"]),
        f"{run['learning_rate']:.3g}",
        f"{run['eval_loss_before']:.4f}",
        f"{run['eval_loss_after']:.4f}",
        "" if run["forgetting"] is None else f"{run['forgetting']:+.3f}",
        f"{run['trainable_parameters']:,}",
    )


def measured(record: Mapping[str, Any], title: str) -> list[Content]:
    """Return what a run measured before and after, from run.json: losses or rewards, and scores."""
    policy = record.get("policy")
    if policy is None:
        rows, first = loss_rows(record["losses"]), f"nats per {record['units']['unit']}"
    else:
        rows, first = reward_rows(policy), pluralize(policy["rows"], "eval prompt")
    rows = [*score_rows(record), *rows, *retention_rows(record["losses"])]
    parts: list[Content] = [ResultTable(title, rows, (first, "before", "after"))]
    if policy is not None:
        parts += reference_line(policy.get("reference"))
    for key in ("preferences", "embedding"):
        if key in record:
            parts += preferences(record[key])
    if "classes" in record:
        parts += class_scores(record["classes"], "eval row")
    return parts


def score_rows(record: Mapping[str, Any]) -> TableRows:
    """Return the rows of the task's own score; those of rewards and preferences are elsewhere."""
    elsewhere = {"policy", "preferences", "embedding"} & record.keys()
    if record.get("score") is None or elsewhere:
        return []
    found = [TaskScore.from_dict(record["score"]).cells()]
    if record["train_score"] is not None:
        name, before, after = TaskScore.from_dict(record["train_score"]).cells()
        found.append((f"{name}, training rows", before, after))
    return list(found)


def data_notes(data: Mapping[str, Any]) -> list[str]:
    """Return lines about what of the rows was not used, not evaluated or cut, from run.json."""
    unused, rare, left_out = (
        list_unused(data.get(name) or {})
        for name in ("unused_columns", "not_evaluated", "rare_classes")
    )
    lines = [f"columns not used: {unused}"] if unused else []
    folders = ", ".join(data.get("unread_folders", ()))
    lines += [f"folders not read: {folders}"] if folders else []
    lines += [f"classes left out: {left_out}"] if left_out else []
    lines += [f"classes trained and not evaluated: {rare}"] if rare else []
    lines += [summarize_file(file) for file in data.get("files", ())]
    if data.get("truncated_rows"):
        cut, answers = data["truncated_rows"], data["truncated_answers"]
        of = f", {pluralize(answers, 'answer')} without the end" if answers else ""
        lines += [f"cut to max_length: {pluralize(cut, 'row')}{of}"]
    return lines


def loss_rows(losses: Mapping[str, Any]) -> TableRows:
    """Return rows (what, before, after) of eval and train loss."""
    return [
        (label, f"{losses[f'{name}_before']:.4f}", f"{losses[f'{name}_after']:.4f}")
        for name, label in (("eval_loss", "eval loss"), ("train_loss", "train loss"))
    ]


def retention_rows(losses: Mapping[str, Any]) -> TableRows:
    """Return the row of the retention loss (general text, nats per token); none of a classifier."""
    if losses["retention_loss_before"] is None:
        return []
    return [
        (
            "retention loss",
            f"{losses['retention_loss_before']:.4f}",
            f"{losses['retention_loss_after']:.4f}",
        )
    ]
