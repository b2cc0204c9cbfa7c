"""What a run learns, and on what: the outcome of preparing it, and the helpers that all ways of preparing share."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from afina.adapters.active import ActiveAdapters
from afina.adapters.presets import get_preset
from afina.data.columns import Columns
from afina.data.renderer import Renderer
from afina.errors import DataError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.frozen import FrozenModel
from afina.models.loading import load_base
from afina.objectives.base import Objective, Units
from afina.settings import EvalSettings, TrainSettings

Piece = TypeVar("Piece")


@dataclass
class PreparedData:
    """A base and what is to be learned on it; `source` are the facts about the data for run.json."""

    base: FrozenModel
    task: Objective
    data_info: dict[str, Any]
    skipped: list[str]
    example: str  # one row as the model reads it, what is learned marked
    eval_records: list[dict[str, Any]]  # the held-out rows, to be read again by `afina eval`
    invocation: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()  # modules that the adapter owns whole
    trainable_tokens: dict[str, int] = field(default_factory=dict)  # tokens whose rows it owns
    max_length: int | None = (
        None  # longest sequence in tokens; None where there are none (pictures)
    )
    counts: dict[str, Any] = field(default_factory=dict)  # for `afina plan`
    units: Units = field(default_factory=Units)
    baseline: ActiveAdapters | None = (
        None  # what the outcome is compared with: None is the base alone
    )
    init_adapter: str | None = None  # hash of the adapter that the run goes on from
    frozen_adapter: str | None = None  # hash of the adapter that it learns over
    reward_hash: str | None = None  # content hash of the reward functions

    @property
    def objective(self) -> str:
        """Name of the objective."""
        return self.task.name


def load_language_model(
    settings: TrainSettings, base: CausalLM | None
) -> tuple[CausalLM, dict[str, int]]:
    """Return the base, loaded unless it is given, and the rows of its new tokens by module."""
    base = base or load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.place,
        get_preset(settings.method, 1).quantization,
    )
    return base, base.add_tokens(settings.new_tokens)


def activation_tokens(renderer: Renderer, settings: TrainSettings) -> tuple[int, ...]:
    """Return the invocation of an activated method; empty for the others."""
    if not get_preset(settings.method, 1).is_activated:
        return ()
    return resolve_invocation(renderer, settings)


def resolve_invocation(renderer: Renderer, settings: TrainSettings) -> tuple[int, ...]:
    """The tokens that switch an activated adapter on: as told, or what the template puts before an answer."""
    tokens = renderer.invocation(settings.invocation)
    if not tokens:
        why = "the template writes nothing between a question and its answer"
        raise SettingsError(
            "an activated adapter needs an invocation",
            where="invocation",
            why=why,
            hint="--invocation TEXT",
        )
    return tuple(tokens)


def describe_data(table: Any, held: int) -> dict[str, Any]:
    """The facts about a table of rows, of which so many are held out."""
    return {
        "path": str(table.path),
        "format": table.format,
        "sha256": table.digest,
        "rows": len(table.rows),
        "held_out": held,
        "unused_columns": table.unused_columns,
    } | ({"rule": table.rule} if table.rule else {})


def to_jsonl(records: Sequence[dict[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def hold_out_every_nth(
    pieces: list[Piece], share: float, where: Path
) -> tuple[list[Piece], list[Piece]]:
    """Pieces of a text to learn from, and every n-th one to judge by."""
    if len(pieces) < 2:
        raise DataError(
            "too little text to hold some out",
            where=str(where),
            hint="a smaller --max-length, or --eval-data FILE",
        )
    step = min(len(pieces), max(2, round(1 / share)))
    held = pieces[step - 1 :: step]
    return [piece for number, piece in enumerate(pieces) if number % step != step - 1], held


EVAL_ROWS = "eval.jsonl"  # the eval rows of a run, in its folder
PROFILE_TOKENS = 64  # first tokens of a text without a prompt, for the routing profile
BATCH_TOKENS = 2048  # tokens per forward pass of an evaluation


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
