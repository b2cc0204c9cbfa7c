"""From settings to everything a run needs: base, adapter, labelled examples, rates. `plan` stops here."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from afina.base.load import load_base
from afina.base.model import Base
from afina.config import TrainSettings
from afina.data.batches import split
from afina.data.formats import Row, Table, read_table
from afina.data.template import Example, Renderer
from afina.delta.attach import Adapter, attach
from afina.delta.contract import Spec
from afina.delta.presets import preset
from afina.delta.targets import block_number, by_pattern, resolve_targets
from afina.errors import DataError, SettingsError
from afina.objective.language import LanguageTask, choose, make_examples
from afina.objective.task import Task

NAME = "adapter"


@dataclass
class Setup:
    """A run that has not begun."""

    settings: TrainSettings
    base: Base
    adapter: Adapter
    renderer: Renderer
    table: Table
    objective: str
    task: Task
    train: list[Example]
    held: list[Example]
    held_rows: list[Row]
    skipped: list[str]
    learning_rate: float
    rates: dict[str, float]
    steps: int

    @property
    def check_every(self) -> int:
        """Steps between checks."""
        return self.settings.check_every or max(1, self.steps // 10)


def default_out(settings: TrainSettings) -> Path:
    """The run folder: as told, or named after the data and the method."""
    return settings.out or Path("runs") / f"{settings.data.stem}-{settings.method}"


def make_spec(base: Base, renderer: Renderer, settings: TrainSettings) -> Spec:
    """The adapter that the settings mean, its targets resolved to paths of the base's modules."""
    blocks = 1 + max((block_number(path) or 0 for path, _ in base.model.named_modules()), default=0)
    meant = preset(settings.method, blocks)
    targets = settings.targets if settings.targets is not None else meant.targets
    layers = settings.layers if settings.layers is not None else meant.layers
    paths = resolve_targets(base.model, targets, layers, any_kind=meant.targets == "all")
    return Spec(
        method=meant.delta,
        targets=paths,
        rank=settings.rank,
        alpha=settings.alpha if settings.alpha is not None else 2.0 * settings.rank,
        scaling=settings.scaling,
        dropout=settings.dropout,
        ranks=by_pattern(settings.ranks, paths, "ranks"),
        invocation=_invocation(renderer, settings) if meant.activated else (),
        options=settings.options,
    )


def _invocation(renderer: Renderer, settings: TrainSettings) -> tuple[int, ...]:
    """The tokens that switch an activated adapter on: as told, or what the template puts before an answer."""
    tokens = renderer.invocation(settings.invocation)
    if not tokens:
        why = "the template writes nothing between a question and its answer"
        raise SettingsError("an activated adapter needs an invocation", where="invocation", why=why, hint="--invocation TEXT")
    return tuple(tokens)


def set_up(settings: TrainSettings) -> Setup:
    """Load, read, render, check and attach; raises the error of the first thing that is wrong."""
    table = read_table(settings.data, settings.columns, settings.skip_bad_rows)
    storage = preset(settings.method, 1).storage
    base = load_base(settings.base, settings.revision, settings.trust_remote_code, settings.dtype, settings.device, storage)
    torch.manual_seed(settings.seed)
    renderer = Renderer(base.tokenizer, settings.template, settings.max_length or min(base.context, 2048))
    objective = choose(settings.objective, table.rows)
    skipped = list(table.skipped)
    spec = make_spec(base, renderer, settings)
    train, held, held_rows = _split_and_render(settings, table, renderer, objective, skipped, spec.invocation)
    rate = settings.learning_rate or (2e-5 if spec.method == "full" else 2e-4)
    task = LanguageTask(base, train, held, settings.batch_tokens, settings.accumulate, settings.seed)
    return Setup(
        settings=settings,
        base=base,
        adapter=attach(base.model, base.board, NAME, spec, settings.seed),
        renderer=renderer,
        table=table,
        objective=objective,
        task=task,
        train=train,
        held=held,
        held_rows=held_rows,
        skipped=skipped,
        learning_rate=rate,
        rates=by_pattern(settings.learning_rates, spec.targets, "learning_rates"),
        steps=settings.steps or max(1, round(settings.epochs * task.steps_per_epoch)),
    )


def _split_and_render(
    settings: TrainSettings, table: Table, renderer: Renderer, objective: str, skipped: list[str], invocation: tuple[int, ...]
) -> tuple[list[Example], list[Example], list[Row]]:
    """Examples to learn from, examples to judge by, and the rows of the latter."""
    leave_out = skipped if settings.skip_bad_rows else None
    share = _as_share(settings.holdout)
    if objective == "sft":
        renderer.check(table.rows)
    if share is None:
        held_table = read_table(Path(settings.holdout), settings.columns, settings.skip_bad_rows)  # type: ignore[arg-type]
        rows, held_rows = table.rows, held_table.rows
        choose(objective, held_rows)
    elif objective == "pretrain":  # one long text is one row: hold out chunks of it instead
        chunks = make_examples(objective, renderer, table.rows, leave_out, invocation)
        if len(chunks) < 2:
            raise DataError("too little text to hold some out", where=str(table.path), hint="--max-length, or --holdout FILE")
        every = max(2, round(1 / share)) if share else 0
        held = [c for i, c in enumerate(chunks) if every and i % every == every - 1]
        return [c for i, c in enumerate(chunks) if not (every and i % every == every - 1)], held, []
    else:
        rows, held_rows = split(table.rows, share, settings.seed)
    return (
        make_examples(objective, renderer, rows, leave_out, invocation),
        make_examples(objective, renderer, held_rows, leave_out, invocation),
        held_rows,
    )


def _as_share(holdout: float | Path) -> float | None:
    """The share of rows held out, or None where `holdout` is a file."""
    try:
        share = float(os.fspath(holdout)) if isinstance(holdout, Path) else float(holdout)
    except ValueError:
        return None
    if not 0.0 < share < 1.0:
        raise SettingsError(f"holdout cannot be {holdout}", hint="a share between 0 and 1, or a file of rows")
    return share
