"""The outcome of preparing a run's rows, and what all objectives on text prepare alike."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.load_run import LoadedRun
from afina.adapters.presets import get_preset
from afina.data.columns import Columns
from afina.data.renderer import Example, Renderer
from afina.data.several_files import (
    HasLocation,
    describe_files,
)
from afina.data.table import Table
from afina.data.truncation import CutRows
from afina.errors import DataError, SettingsError
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.models.frozen import FrozenModel
from afina.models.loading import load_base
from afina.objectives.base import Objective, Units
from afina.settings import EvalSettings, TrainSettings

EVAL_ROWS = "eval.jsonl"  # the eval rows of a run, in its folder
PROFILE_TOKENS = 64  # first tokens of a text without a prompt, for the routing profile
BATCH_TOKENS = 2048  # tokens per forward pass of an evaluation
DEFAULT_MAX_LENGTH = 2048  # tokens of a sequence, where the base could read more

Piece = TypeVar("Piece", bound=HasLocation)
RowT = TypeVar("RowT")


@dataclass(frozen=True)
class ShownExample:
    """A training row as the model reads it.

    Attributes:
        where: Location of the row.
        tokens: Number of its tokens; None for an image.
        targets: Number of target tokens; None where a token is no target or targets are random.
        text: Its tokens as text, with the target tokens between « and ».
    """

    where: str
    tokens: int | None
    targets: int | None
    text: str


@dataclass
class PreparedData:
    """An objective with its rows on a base, and what a run records about its data.

    Attributes:
        task: The objective.
        data_info: The entry `data` of run.json.
        skipped: Rows that were left out, with the reason of each.
        show: Returns a training row as the model reads it.
        eval_records: The eval rows, to be read again by `afina eval`.
        invocation: Token ids that activate the adapter; empty for one that is always active.
        modules_to_save: Modules that the adapter contains completely.
        trainable_tokens: Number of new tokens by module.
        max_length: Longest sequence in tokens; None for images.
        counts: Figures of the rows, for `afina plan`.
        baseline: What the outcome is compared with; empty is the base without adapters.
        init_adapter: Hash of the adapter that the run continues.
        frozen_adapter: Hash of the adapter that it trains on top of.
        reward_hash: Content hash of the reward functions.
    """

    task: Objective
    data_info: dict[str, Any]
    skipped: list[str]
    show: Callable[[Any], ShownExample]
    eval_records: list[dict[str, Any]]
    invocation: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    trainable_tokens: dict[str, int] = field(default_factory=dict)
    max_length: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    baseline: ActiveAdapters = BASE_ONLY
    init_adapter: str | None = None
    frozen_adapter: str | None = None
    reward_hash: str | None = None

    @property
    def example(self) -> str:
        """The first training row as the model reads it, its target tokens marked."""
        return self.show(self.task.train[0]).text

    @property
    def base(self) -> FrozenModel:
        """The model."""
        return self.task.base

    @property
    def objective(self) -> str:
        """Name of the objective."""
        return self.task.name

    @property
    def units(self) -> Units:
        """Words of a report."""
        return self.task.units


def text_renderer(
    settings: TrainSettings,
    tokenizer: Any,
    max_positions: int,
    default_length: int = DEFAULT_MAX_LENGTH,
) -> Renderer:
    """Return the renderer of a run's rows, whose longest sequence is `max_length` or a default.

    Args:
        settings: The settings of the run.
        tokenizer: The base's tokenizer.
        max_positions: Longest sequence that the base can read, in tokens.
        default_length: Longest sequence in tokens, where the settings have no `max_length`.
    """
    length = settings.max_length or min(max_positions, default_length)
    return Renderer(tokenizer, ChatFormat.from_settings(settings), length, settings.truncate)


def run_renderer(opened: LoadedRun, base: Any) -> Renderer:
    """Return the renderer of rows on which a run, or a base alone, is evaluated.

    Rows are cut as they were in training, if they were.
    """
    default = min(base.max_positions, DEFAULT_MAX_LENGTH)
    trained = opened.run.get("settings") or {}
    length, truncates = trained.get("max_length") or default, bool(trained.get("truncate"))
    longest = length if truncates else max(length, default)
    return Renderer(base.tokenizer, opened.chat_format, longest, truncates)


@dataclass
class Preparation:
    """A language model with a renderer: what objectives on text need before they read rows.

    Attributes:
        settings: The settings of the run.
        base: The model, with its new tokens and the objective's head.
        renderer: Renders rows to token ids.
        invocation: Token ids of an activated method.
        modules_to_save: The objective's head, or nothing.
        trainable_tokens: Number of new tokens by module.
    """

    settings: TrainSettings
    base: CausalLM
    renderer: Renderer
    invocation: tuple[int, ...]
    modules_to_save: tuple[str, ...]
    trainable_tokens: dict[str, int]

    @classmethod
    def start(
        cls,
        settings: TrainSettings,
        base: CausalLM | None,
        head: str | None = None,
        default_length: int = DEFAULT_MAX_LENGTH,
    ) -> "Preparation":
        """Load the base, unless it is given, and add new tokens and a scalar head to it.

        Args:
            settings: The settings of the run.
            base: The model, if it is loaded already.
            head: Name of the head; None adds none.
            default_length: As of `text_renderer`.
        """
        base = base or load_base(
            settings.base,
            settings.revision,
            settings.trust_remote_code,
            settings.dtype,
            settings.load_device,
            get_preset(settings.method, 1).quantization,
        )
        own_tokens = base.add_tokens(settings.new_tokens)
        renderer = text_renderer(settings, base.tokenizer, base.max_positions, default_length)
        modules = (base.add_score_head(),) if head else ()
        invocation = activation_tokens(renderer, settings)
        return cls(settings, base, renderer, invocation, modules, own_tokens)

    @property
    def packing(self) -> tuple[int, int, int]:
        """Tokens of a micro-batch, micro-batches of a step, and the seed."""
        settings = self.settings
        return (
            settings.max_tokens_per_batch,
            settings.gradient_accumulation_steps,
            settings.seed,
        )

    def finish(
        self,
        task: Objective,
        table: Any,
        skipped: list[str],
        show: Callable[[Any], ShownExample],
        eval_records: list[dict[str, Any]],
        **counts: Any,
    ) -> PreparedData:
        """Return the objective with all facts; `counts` are added to those of `count_rows`."""
        cut_rows = self.renderer.cut_rows
        return PreparedData(
            task=task,
            data_info=describe_data(table, task) | describe_cut_rows(cut_rows),
            skipped=skipped,
            show=show,
            eval_records=eval_records,
            invocation=self.invocation,
            modules_to_save=self.modules_to_save,
            trainable_tokens=self.trainable_tokens,
            max_length=self.renderer.max_length,
            counts=count_rows(task.train, task.eval_rows) | counts | describe_cut_rows(cut_rows),
        )


def row_length(row: Any) -> int:
    """Return the tokens of a row by which rows are packed and compared; 0 for an image."""
    if hasattr(row, "texts"):
        return sum(map(len, row.texts))
    tokens = row.token_ids if hasattr(row, "token_ids") else getattr(row, "content", ())
    return 0 if hasattr(tokens, "shape") else len(tokens)


def show_example(renderer: Renderer, example: Example) -> ShownExample:
    """Return an example as text, its target tokens marked."""
    tokens, targets = len(example.token_ids), sum(example.loss_mask)
    return ShownExample(example.where, tokens, targets, renderer.format_loss_mask(example))


def count_rows(train: Sequence[Any], eval_rows: Sequence[Any]) -> dict[str, Any]:
    """Return the number of training rows, of eval rows, and of tokens in training rows."""
    tokens = sum(len(row.token_ids) for row in train)
    return {"train": len(train), "held_out": len(eval_rows), "tokens": tokens}


def activation_tokens(renderer: Renderer, settings: TrainSettings) -> tuple[int, ...]:
    """Return the invocation of an activated method; empty for the others."""
    if not get_preset(settings.method, 1).is_activated:
        return ()
    return resolve_invocation(renderer, settings)


def resolve_invocation(renderer: Renderer, settings: TrainSettings) -> tuple[int, ...]:
    """Return the tokens that activate an adapter: as set, or the template's before an answer.

    Raises:
        SettingsError: The template writes nothing there, and none is set.
    """
    tokens = renderer.invocation(settings.invocation)
    if not tokens:
        why = "the template writes nothing between a prompt and its completion"
        raise SettingsError(
            "an activated adapter needs an invocation",
            where="invocation",
            why=why,
            hint="--invocation TEXT",
        )
    return tuple(tokens)


def describe_data(table: Table[Any], task: Objective) -> dict[str, Any]:
    """Return the entry `data` of run.json for a table from which `task` has its rows."""
    several = describe_files(task.train, table.files, row_length) if table.files else []
    return {
        "path": ", ".join(file.path for file in table.files) or str(table.path),
        "format": table.format,
        "sha256": table.digest,
        "rows": len(table.rows),
        "held_out": len(task.eval_rows),
        "unused_columns": table.unused_columns,
    } | {name: v for name, v in (("rule", table.rule), ("files", several)) if v}


def describe_cut_rows(cut_rows: CutRows | None) -> dict[str, Any]:
    """Return what run.json records of rows that were cut; nothing where none may be."""
    return {} if cut_rows is None else cut_rows.counts


def to_jsonl(records: Sequence[dict[str, Any]]) -> str:
    """Return records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def eval_rows_file(settings: EvalSettings) -> Path:
    """Return the file of a run's eval rows; raise `SettingsError` or `DataError` without one."""
    if settings.adapter is None:
        raise SettingsError(
            "there are no rows to evaluate",
            where="data",
            hint="--data FILE, or --adapter RUN for the eval rows of that run",
        )
    kept = recorded_eval_rows(settings.adapter)
    if not kept.is_file():
        hint = "--data FILE"
        raise DataError("this folder has no eval rows", where=str(settings.adapter), hint=hint)
    return kept


def recorded_eval_rows(run: Path) -> Path:
    """Return where the eval rows of a run are; a run of format version 1 has `held_out.jsonl`."""
    old = run / "held_out.jsonl"
    return old if old.is_file() else run / EVAL_ROWS


def eval_source(settings: EvalSettings) -> tuple[Path, Columns]:
    """Return the file that `afina eval` reads and the names of its columns."""
    if settings.data is None:
        return eval_rows_file(settings), {}
    return settings.data, settings.columns


def trained_settings(record: Mapping[str, Any]) -> TrainSettings:
    """Return the settings of a run from its run.json."""
    return TrainSettings(**record["settings"] | {"objective": record["objective"]})
