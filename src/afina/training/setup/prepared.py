"""What a run learns, and on what: the outcome of preparing it, and the helpers that all ways of preparing share."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.data.renderer import Renderer
from afina.errors import SettingsError
from afina.models.frozen import FrozenModel
from afina.objectives.base import Objective
from afina.settings import TrainSettings


@dataclass(frozen=True)
class Units:
    """How to speak of a run: a loss is nats a `unit`, a model hesitates between `choices` and reads `piece`s."""

    unit: str = "token"
    choices: str = "tokens"
    piece: str = "token"


@dataclass
class PreparedData:
    """A base and what is to be learned on it; `source` are the facts about the data for run.json."""

    base: FrozenModel
    task: Objective
    objective: str
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
    words: Units = field(default_factory=Units)
    baseline: ActiveAdapters | None = (
        None  # what the outcome is compared with: None is the base alone
    )
    init_adapter: str | None = None  # hash of the adapter that the run goes on from
    frozen_adapter: str | None = None  # hash of the adapter that it learns over
    reward_hash: str | None = None  # what tells that the same judges give the rewards


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
        "unused_columns": table.unused_columns,
        "held_out": held,
    }


def to_jsonl(records: Sequence[dict[str, Any]]) -> str:
    """Records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
