"""Rows of a comparison, split once, so that all methods and seeds use the same rows.

train.jsonl     training rows of every run
choose.jsonl    dev rows: select learning rates, and the checkpoint of a run that is kept
test.jsonl      test rows, evaluated once at the end: selection on rows biases their scores
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from afina.data.packing import train_eval_split
from afina.data.schemas import CLASSES, LABELED, SFT, LabeledRow, task_of, text_of
from afina.data.table import read_table, summarize_skipped
from afina.errors import DataError, SettingsError, pluralize
from afina.io.atomic import write_json, write_text
from afina.objectives.language_data import infer_objective
from afina.settings import CompareSettings, TrainSettings
from afina.training.setup.prepare import resolve_objective

PIECE = 800  # characters of a chunk of plain text, which is split and evaluated as a row
FEWEST = 10  # rows below which a comparison is an error
KINDS = ("train", "choose", "test")
Piece = TypeVar("Piece")


@dataclass(frozen=True)
class ComparisonSplit:
    """Objective and files of the split; `digest` is the sha256 of the data file.

    `skipped` describes the rows that were left out; empty for none.
    """

    objective: str
    format: str
    digest: str
    train: Path
    validation: Path
    test: Path
    counts: dict[str, int]
    skipped: str = ""  # comparisons of version 0.1 have none


def split_rows(settings: CompareSettings, folder: Path) -> ComparisonSplit:
    """Read the data and write the three files into `folder`, or find them there.

    Raises `DataError` for rows that cannot be used, and where the data has changed.
    """
    as_training = TrainSettings(
        data=settings.data, objective=settings.objective, columns=settings.columns
    )
    objective = resolve_objective(as_training)
    if objective not in ("auto", "sft", "pretrain", "classify"):
        raise SettingsError(
            f"compare cannot judge {objective} so far",
            where=str(settings.data),
            why="it judges answers, plain text and labels",
            hint="one column with the answer: --columns '{prompt: question, completion: answer}'",
        )
    table = _read(settings, objective)
    if objective != "classify":
        objective = infer_objective(settings.objective, table.rows)
    about = folder / "rows.json"
    files = {kind: folder / f"{kind}.jsonl" for kind in KINDS}
    paths = {"train": files["train"], "validation": files["choose"], "test": files["test"]}
    if about.is_file():
        known = json.loads(about.read_text())
        if known["digest"] != table.digest:
            why = "runs of the old rows and of the new ones cannot be compared"
            raise DataError(
                "the data has changed since this comparison began",
                where=str(settings.data),
                why=why,
                hint="another --output-dir",
            )
        return ComparisonSplit(**known | paths)
    records = (
        _labelled(table.rows, settings)
        if objective == "classify"
        else _language(table.rows, objective, settings)
    )
    for kind, file in files.items():
        write_text(
            file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records[kind])
        )
    facts = {
        "objective": objective,
        "format": table.format,
        "digest": table.digest,
        "skipped": summarize_skipped(table.skipped),
        "counts": {kind: len(records[kind]) for kind in KINDS},
    }
    write_json(about, facts)
    return ComparisonSplit(**facts | paths)


def _read(settings: CompareSettings, objective: str) -> Any:
    """Return the table of rows; an error about one row has the hint to leave it out."""
    if settings.data.is_dir():
        why = "compare reads rows of text so far"
        raise SettingsError(
            "this is a folder", where=str(settings.data), why=why, hint="name one file in it"
        )
    schema: Any = LABELED if objective == "classify" else SFT
    try:
        table = read_table(settings.data, schema, settings.columns, settings.skip_bad_rows)
    except DataError as error:
        # an error of one row, not of the file
        if error.hint is None and str(error.where) != str(settings.data):
            error.hint = "correct the row, or --skip-bad-rows to leave out all such rows"
        raise
    if table.format == "pictures":
        why = "compare reads rows of text so far"
        raise SettingsError(
            "these rows hold pictures",
            where=str(settings.data),
            why=why,
            hint=f"afina train {settings.data}",
        )
    if objective == "classify" and (task := task_of(table.rows)) != CLASSES:
        raise SettingsError(
            f"compare evaluates classes, and these labels are {task}",
            where=str(settings.data),
            why=f"the first label is {table.rows[0].label!r}",
            hint=f"afina train {settings.data}",
        )
    return table


def _three(
    rows: Sequence[Piece], settings: CompareSettings, key: Any = None
) -> dict[str, Sequence[Piece]]:
    """Rows for the three files; equal rows stay together."""
    rest, test = train_eval_split(rows, settings.test_size, settings.seed, key)
    train, chosen = train_eval_split(
        rest, settings.test_size / 2 / (1 - settings.test_size), settings.seed + 1, key
    )
    return {"train": train, "choose": chosen, "test": test}


def _enough(rows: Sequence[Any], settings: CompareSettings) -> None:
    if len(rows) < FEWEST:
        raise DataError(
            f"{pluralize(len(rows), 'row')}: too few to compare methods",
            where=str(settings.data),
            why="some are held out, to choose by and to judge by",
            hint=f"at least {FEWEST} rows; 200 give narrower intervals",
        )


def _language(
    rows: list[Any], objective: str, settings: CompareSettings
) -> Mapping[str, Sequence[dict[str, Any]]]:
    if objective == "pretrain":
        texts = [{"text": piece} for row in rows for piece in pieces(row.text or _joined(row))]
        _enough(texts, settings)
        return _three(texts, settings, key=lambda record: record["text"])
    _enough(rows, settings)
    return {kind: [row.record() for row in some] for kind, some in _three(rows, settings).items()}


def _joined(row: Any) -> str:
    """A row with an answer, as plain text."""
    return (
        "\n".join(map(text_of, row.messages)) if row.messages else f"{row.prompt}{row.completion}"
    )


def _labelled(
    rows: Sequence[LabeledRow], settings: CompareSettings
) -> dict[str, list[dict[str, Any]]]:
    """Return a stratified split; raise `DataError` for a class with under three different rows."""
    _enough(rows, settings)
    collected: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for label in sorted({row.label for row in rows}):
        own = [row for row in rows if row.label == label]
        if len({row.content for row in own}) < 3:
            why = "one is learned, one chooses, one judges"
            raise DataError(
                f"class {label!r} has fewer than three different rows", where=own[0].where, why=why
            )
        for kind, some in _three(own, settings, key=lambda row: row.content).items():
            collected[kind] += [{"text": row.content, "label": row.label} for row in some]
    return collected


def pieces(text: str) -> list[str]:
    """Return chunks of about PIECE characters, split after a line or sentence if possible."""
    collected, piece = [], ""
    for part in re.split(r"(?<=\n)|(?<=[.!?] )", text):
        if piece and len(piece) + len(part) > PIECE:
            collected.append(piece)
            piece = ""
        piece += part
    return [piece for piece in [*collected, piece] if piece.strip()]
