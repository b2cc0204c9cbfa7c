"""From settings to a language model and preferences to learn on it."""

from pathlib import Path

from afina.base.load import load_base
from afina.base.model import Base
from afina.config import TrainSettings
from afina.data.batches import holdout_share, split
from afina.data.preferences import LABELS, PAIRS, Preference, PreferenceTable, as_labels, prompt_key, read_preferences
from afina.data.template import Renderer
from afina.delta.presets import preset
from afina.errors import DataError
from afina.objective.choices import Choice, ChoiceTask, PreferenceTask, make_choices
from afina.objective.preference import preference_options
from afina.objective.reward import RewardTask
from afina.training.prepared import Prepared, Words, find_invocation, new_tokens, source_of

Made = list[tuple[Preference, Choice]]


def prepare_preferences(settings: TrainSettings, base: Base | None) -> Prepared:
    """Load, read, render and check; raises the error of the first thing that is wrong."""
    objective, options = settings.objective, preference_options(settings)
    table = _read(settings.data, settings)
    base = base or load_base(
        settings.base, settings.revision, settings.trust_remote_code, settings.dtype, settings.place,
        preset(settings.method, 1).storage,
    )  # fmt: skip
    own_tokens = base.add_tokens(new_tokens(settings))
    modules = (base.add_score(),) if objective == "reward" else ()
    renderer = Renderer(base.tokenizer, settings.template, settings.max_length or min(base.context, 2048))
    invocation = find_invocation(renderer, settings) if preset(settings.method, 1).activated else ()
    skipped = list(table.skipped)
    train, held = _split(settings, table, renderer, invocation, skipped)
    given = (base, [choice for _, choice in train], [choice for _, choice in held])
    packing = (settings.batch_tokens, settings.accumulate, settings.seed)
    task: ChoiceTask = RewardTask(*given, *packing) if modules else PreferenceTask(objective, options, *given, *packing)
    return Prepared(
        base=base,
        task=task,
        objective=objective,
        source=source_of(table, len(held)),
        skipped=skipped,
        example=_show(renderer, task.train[0]),
        held_records=[row.record() for row, _ in held],
        invocation=invocation,
        modules=modules,
        tokens=own_tokens,
        max_length=renderer.max_length,
        counts={"train": len(train), "held_out": len(held), "tokens": sum(len(choice.tokens) for _, choice in train),
                "longest": max(len(e.tokens) for _, c in train for e in (c.good, c.bad) if e)},
        words=Words("answer" if objective == "kto" else "pair", ""),
    )  # fmt: skip


def _read(path: Path, settings: TrainSettings) -> PreferenceTable:
    """The rows that the objective learns from; KTO takes pairs apart."""
    table = read_preferences(path, settings.columns, settings.skip_bad_rows)
    if table.format == LABELS and settings.objective != "kto":
        hint = "--objective kto learns from labels"
        raise DataError(f"{settings.objective} compares two answers to one prompt", where=str(path),
                        why="these rows have one answer and a label", hint=hint)  # fmt: skip
    if settings.objective == "kto" and table.format == PAIRS:
        return PreferenceTable(table.path, table.format, as_labels(table.rows), table.skipped, table.digest)
    return table


def _split(
    settings: TrainSettings, table: PreferenceTable, renderer: Renderer, invocation: tuple[int, ...], skipped: list[str]
) -> tuple[Made, Made]:
    """Rows to learn from and rows to judge by; those of one prompt are on one side."""
    share, leave_out = holdout_share(settings.holdout), skipped if settings.skip_bad_rows else None
    renderer.check([row.row(answer) for row in table.rows[:16] for answer in (row.good, row.bad) if answer is not None])
    kto = settings.objective == "kto"
    if share is None:
        other = _read(Path(str(settings.holdout)), settings)
        skipped += other.skipped
        rows, held = table.rows, other.rows
    else:
        rows, held = split(table.rows, share, settings.seed, prompt_key)
    return (
        make_choices(renderer, rows, leave_out, invocation, kto),
        make_choices(renderer, held, leave_out, invocation, kto),
    )


def _show(renderer: Renderer, choice: Choice) -> str:
    sides = (("better", choice.good), ("worse", choice.bad))
    return "\n".join(f"{name}: {renderer.show(example)}" for name, example in sides if example is not None)
