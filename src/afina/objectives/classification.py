"""Classification: one class per row, on padded batches.

loss = - sum over rows of log p(class | row)   /   rows
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.data.packing import IGNORE_INDEX
from afina.data.row_store import SelectedRows
from afina.data.schemas import CLASSES, LABELED, REGRESSION, LabeledRow
from afina.data.several_files import check_one_kind, file_number, mix_rows
from afina.data.table import Table, read_table
from afina.data.truncation import CutRows
from afina.data.unread import list_unused
from afina.errors import DataError, SettingsError
from afina.evaluation.confusion import draw_confusion
from afina.models.classifier import Classifier, TokenPair, load_classifier
from afina.objectives.base import LossSum, Units
from afina.objectives.label_tasks import LabelTask, balanced_weights
from afina.objectives.labeled_data import (
    ClassificationExample,
    check_encoder_settings,
    known_rows,
    rows_of_frequent_classes,
    split_labels,
    split_rows,
    tokenize_labeled_rows,
)
from afina.objectives.linear_probe import (
    MAX_PROBE_ROWS,
    ProbedObjective,
    head_features,
)
from afina.objectives.padded import EVAL_BATCH_TOKENS, PaddedBatch
from afina.objectives.prepared import (
    PreparedData,
    ShownExample,
    describe_cut_rows,
    describe_data,
    eval_rows_file,
    trained_settings,
)
from afina.objectives.registry import register_objective
from afina.objectives.run_rows import read_files, with_split_folders
from afina.settings import EvalSettings, TrainSettings
from afina.settings.objectives import ClassifySettings


@register_objective("classify")
class ClassificationObjective(ProbedObjective):
    """One class per row; the head is new, and saved with the adapter."""

    schema = "labeled"
    units = Units("row", "classes")
    has_baseline = False
    report_key = "classes"
    # The head starts as a probe. At the full rate the eval loss of 600 rows of SST-2 on
    # all-MiniLM-L6-v2 only rose from there: 0.597 to 0.615 in 20 steps, with a train loss of 0.03.
    default_learning_rate_factor = 0.25
    settings_class = ClassifySettings

    @cached_property
    def task(self) -> LabelTask:
        """Task of the base's head; `prepare` sets the one of the rows and the settings."""
        return LabelTask(self.base.task, self.base.labels)

    def next_command(self, folder: Path) -> str:
        """Return the command that classifies an image, a text or a pair of texts."""
        given = '"some text"' if self.base.images is None else "FILE.png"
        if any(isinstance(row.content, TokenPair) for row in self.train[:1]):
            given = "$'first text\\tsecond text'"
        return f"afina generate {given} --adapter {folder}"

    @classmethod
    def prepare(cls, settings: TrainSettings, base: Classifier | None = None) -> PreparedData:
        """Read, tokenize, check and split the rows; load the base, unless it is given."""
        check_encoder_settings(settings)
        table = read_files(settings, LABELED)
        check_one_kind(table)
        pictures = table.format == "pictures"
        _check_truncate(settings, pictures)
        options, skipped = settings.group("classify"), list(table.skipped)
        named = split_labels(table.rows, options.label_separator)
        all_rows, rare = rows_of_frequent_classes(named, options.min_class_rows, skipped)
        label_task = _label_task(all_rows, options)
        labels = label_task.labels
        rows, eval_labeled = _split(settings, all_rows, label_task, table, skipped)
        base = base or load_classifier(
            settings.base,
            labels,
            pictures,
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
            label_task.kind,
        )
        leave_out = skipped if settings.skip_bad_rows else None
        length = settings.max_length or min(base.max_positions, 512)
        cut_rows = CutRows() if settings.truncate else None
        train = tokenize_labeled_rows(base, rows, length, leave_out, cut_rows)
        eval_rows = tokenize_labeled_rows(base, eval_labeled, length, leave_out, cut_rows)
        train = mix_rows(train, table.files, settings.seed)
        if options.class_weights == "balanced":
            weights = balanced_weights([row.target for row in train], len(base.labels))
            label_task = replace(label_task, weights=weights)
        label_task = replace(label_task, labels=base.labels)
        not_evaluated = _not_evaluated(label_task, rows, eval_labeled)
        tokens, accumulation = settings.max_tokens_per_batch, settings.gradient_accumulation_steps
        task = cls(base, train, eval_rows, tokens, accumulation, settings.seed)
        task.task, task.options = label_task, options
        choices = "classes" if label_task.kind == CLASSES else ""
        task.units = Units("row", choices, "picture" if pictures else "token")
        return PreparedData(
            task=task,
            data_info=describe_data(table, task)
            | describe_cut_rows(cut_rows)
            | ({"eval_path": str(settings.eval_data)} if settings.eval_data else {})
            | {"labels": list(labels)}
            | ({} if label_task.kind == CLASSES else {"task": label_task.kind})
            | ({"not_evaluated": not_evaluated} if not_evaluated else {})
            | ({"rare_classes": rare} if rare else {})
            | ({"pairs": True} if any(row.pair is not None for row in rows) else {}),
            skipped=skipped,
            show=partial(show_example, task),
            eval_records=[row.record() for row in eval_labeled],
            modules_to_save=base.new_modules,
            max_length=length if base.images is None else None,
            counts={"train": len(train), "held_out": len(eval_rows), "classes": len(labels)}
            | describe_cut_rows(cut_rows)
            | ({} if label_task.kind == CLASSES else {"task": label_task.kind})
            | ({"not_evaluated": list_unused(not_evaluated)} if not_evaluated else {})
            | ({"rare_classes": list_unused(rare)} if rare else {}),
        )

    @classmethod
    def from_run(cls, opened: LoadedRun, settings: EvalSettings) -> "ClassificationObjective":
        """Return the objective with the rows that `afina eval` evaluates."""
        if settings.adapter is None:
            raise SettingsError(
                "a classifier's head is saved in its run", where="adapter", hint="afina eval RUN"
            )
        base: Any = opened.base
        if settings.data is None:
            labeled = _recorded_rows(opened.run, settings)
        else:
            options = trained_settings(opened.run).group("classify")
            labeled = read_table(settings.data, LABELED, settings.columns).rows
            labeled = split_labels(labeled, getattr(options, "label_separator", None))
        length = opened.run["settings"]["max_length"] or min(base.max_positions, 512)
        cut_rows = CutRows() if opened.run["settings"].get("truncate") else None
        rows = tokenize_labeled_rows(base, labeled, length, None, cut_rows)
        objective = cls(base, rows, rows, EVAL_BATCH_TOKENS, 1, 0)
        objective.num_rows = len(rows)
        return objective

    def length(self, row: ClassificationExample) -> int:
        """Return the tokens of a row; a patch of 16 x 16 pixels counts as one."""
        if self.base.images is None:
            return len(row.content)
        height, width = self.base.images.size
        return max(16, height * width // 256)

    def collate(self, rows: Sequence[ClassificationExample], seed: int) -> PaddedBatch:
        """Return padded tokens or stacked pixels, and the classes `(num_rows,)`."""
        targets = torch.tensor([row.target for row in rows], device=self.base.device)
        return PaddedBatch(self.base.batch([row.content for row in rows]), targets)

    def num_targets(self, batch: PaddedBatch) -> int:
        """Return the number of rows with a label."""
        targets = batch.targets
        if targets.is_floating_point():
            return int(targets.isfinite().all(-1).sum())
        return int((targets != IGNORE_INDEX).sum())

    def loss(self, batch: PaddedBatch, active: ActiveAdapters) -> Tensor:
        """Return the sum of the losses of a batch, in nats; squared errors of a regression."""
        return self.task.losses(self.logits(batch, active), batch.targets).sum()

    @torch.no_grad()
    def row_losses(
        self, rows: Sequence[ClassificationExample], active: ActiveAdapters
    ) -> list[LossSum]:
        """Return the loss of each row."""
        found: list[LossSum] = []
        for batch in self.batches(rows):
            losses = self.task.losses(self.logits(batch, active).double(), batch.targets)
            found += [LossSum(loss, 1) for loss in losses.tolist()]
        return found

    @torch.no_grad()
    def row_logits(
        self, rows: Sequence[ClassificationExample], active: ActiveAdapters
    ) -> tuple[Tensor, float]:
        """Return the scores of rows `(num_rows, num_outputs)`, on the CPU, and their mean loss."""
        logits, losses = [], []
        for batch in self.batches(rows):
            scores = self.logits(batch, active)
            total = self.task.losses(scores, batch.targets).sum().item()
            losses.append(LossSum(total, self.num_targets(batch)))
            logits.append(scores.cpu())
        return torch.cat(logits), LossSum.mean(losses)

    def predictions(
        self, rows: Sequence[ClassificationExample], active: ActiveAdapters
    ) -> list[int]:
        """Return the most probable class of each row."""
        return self.row_logits(rows, active)[0].argmax(-1).tolist()

    def evaluate(self, active: ActiveAdapters) -> dict[str, Any]:
        """Return the loss of the eval rows (nats per row), and in `classes` the task's scores."""
        logits, loss = self.row_logits(self.eval_rows, active)
        scores = self.task.scores(logits, [row.target for row in self.eval_rows])
        scores |= {"labels": list(self.base.labels), "rows": len(self.eval_rows)}
        scores |= {} if self.task.kind == CLASSES else {"task": self.task.kind}
        return {"loss": loss, "classes": scores}

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Return the scores of the trained classifier and, in a run, those of the linear probe."""
        scores = after["classes"] | self.task.score(after["classes"])
        if not self.probe:
            return {**scores, "verdict": []}
        sentence = (
            f"A linear probe of the frozen base is right on {self.probe['accuracy']:.1f}% of the "
            f"eval rows; after training, {scores['accuracy']:.1f}% are right."
        )
        return {**scores, "probe": self.probe, "verdict": [sentence]}

    def probe_examples(self, path: str) -> tuple[Tensor, Tensor]:
        """Return features and classes of training rows, spread over all of them."""
        every = -(-len(self.train) // MAX_PROBE_ROWS)
        rows = sorted(self.train[::every], key=self.length)  # rows of one length need no padding
        features = head_features(self.base, path, (batch.inputs for batch in self.batches(rows)))
        targets = torch.tensor([row.target for row in rows], device=features.device)
        return features, targets.flatten()

    def has_probe(self) -> bool:
        """Whether labels are classes, or 0 and 1: the probe is a logistic regression."""
        if self.task.kind == CLASSES:
            return True
        is_binary = all(row.target in ([0.0], [1.0]) for row in self.train)
        return len(self.base.labels) == 1 and self.task.kind != REGRESSION and is_binary

    def plot(self, result: dict[str, Any], file: Path, write: bool) -> None:
        """Draw the confusion matrix of classes into `file`, where `write`, and record its path."""
        if "confusion" not in result:
            return
        if write:
            draw_confusion(result["confusion"], self.base.labels, file)
        result["picture"] = str(file)


def _check_truncate(settings: TrainSettings, pictures: bool) -> None:
    """Raise `SettingsError` where pictures are to be cut."""
    if pictures and settings.truncate:
        why = "pictures have no length: they are resized"
        raise SettingsError("truncate has no effect here", where="truncate", why=why)


def _split(
    settings: TrainSettings,
    rows: Sequence[LabeledRow],
    task: LabelTask,
    table: Table[LabeledRow],
    skipped: list[str],
) -> tuple[Sequence[LabeledRow], Sequence[LabeledRow]]:
    """Return training and eval rows, the latter of `eval_data` where it is given."""
    if settings.eval_data is None:
        number = file_number(table.files)
        return split_rows(rows, task, settings.eval_size, settings.seed, number)
    other = read_table(settings.eval_data, LABELED, settings.columns, settings.skip_bad_rows)
    separator = settings.group("classify").label_separator
    return rows, known_rows(split_labels(other.rows, separator), task, skipped)


def _label_task(rows: Sequence[LabeledRow], options: ClassifySettings) -> LabelTask:
    """Return the task of rows under the settings; raises `DataError` or `SettingsError`."""
    if not rows:
        raise DataError("no class has enough rows", why=f"min_class_rows: {options.min_class_rows}")
    task = LabelTask.of(rows)
    set_names = options.model_fields_set - {"label_separator"}
    given = sorted(name for name in set_names if not _is_default(options, name))
    if task.kind != CLASSES and given:
        raise SettingsError(
            f"classify.{given[0]} has no effect: the labels are {task.kind}",
            where=f"classify.{given[0]}",
            why=f"the first label is {rows[0].label!r}",
            hint="leave it out",
        )
    return replace(task, smoothing=options.label_smoothing)


def _is_default(options: ClassifySettings, name: str) -> bool:
    return getattr(options, name) == ClassifySettings.model_fields[name].default


def _not_evaluated(
    task: LabelTask, rows: Sequence[LabeledRow], eval_rows: Sequence[LabeledRow]
) -> dict[str, int]:
    """Return the classes that no eval row has, with the number of their training rows."""
    if task.kind != CLASSES:
        return {}
    counts, evaluated = Counter(str(row.label) for row in rows), {row.label for row in eval_rows}
    return {label: counts[label] for label in task.labels if label not in evaluated}


def show_example(task: ClassificationObjective, row: ClassificationExample) -> ShownExample:
    """Return a row as the model reads it, with its label; an image by its file."""
    label = task.task.format_target(row.target)
    if task.base.images is not None:
        height, width = task.base.images.size
        return ShownExample(row.where, None, None, f"{row.where} ({width} x {height}) -> «{label}»")
    tokens = row.content.token_ids if isinstance(row.content, TokenPair) else row.content
    assert task.base.tokenizer is not None
    text = task.base.tokenizer.decode(tokens)
    return ShownExample(row.where, len(tokens), None, f"{text} -> «{label}»")


def _recorded_rows(record: Mapping[str, Any], settings: EvalSettings) -> Sequence[LabeledRow]:
    """Return the eval rows of a run: texts are kept with it, images are read where they were."""
    file = eval_rows_file(settings)
    if record["data"]["format"] == "text":
        return read_table(file, LABELED).rows
    wanted = {json.loads(line)["file"] for line in file.read_text().splitlines()}
    trained = with_split_folders(trained_settings(record))
    folders = [trained.eval_data] if trained.eval_data else [f.path for f in trained.data_files]
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        why = f"the eval images of the run are in {missing[0]}, which does not exist"
        raise DataError(
            "the eval images cannot be found",
            where=str(settings.adapter),
            why=why,
            hint="--data FOLDER",
        )
    if trained.eval_data is not None:
        table = read_table(trained.eval_data, LABELED, trained.columns)
    else:
        table = read_files(trained, LABELED)
    if trained.eval_data is None and table.digest != record["data"]["sha256"]:
        why = "its images are not those of the run: some may have been used for training"
        hint = "--data FOLDER of new images"
        raise DataError("the data has changed", where=str(table.path), why=why, hint=hint)
    kept = (index for index, row in enumerate(table.rows) if row.where in wanted)
    return SelectedRows(table.rows, kept)
