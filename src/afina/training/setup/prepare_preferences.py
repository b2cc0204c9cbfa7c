"""From settings to a language model and preferences to learn on it."""

from dataclasses import replace
from pathlib import Path

from afina.adapters.presets import get_preset
from afina.data.packing import train_eval_split
from afina.data.renderer import Renderer
from afina.data.schemas import (
    LABELS,
    PAIRS,
    PREFERENCE,
    PreferenceRow,
    prompt_key,
    split_pairs,
)
from afina.data.table import Table, read_table
from afina.errors import DataError
from afina.models.causal_lm import CausalLM
from afina.models.loading import load_base
from afina.objectives.preference import (
    PairwiseObjective,
    PreferenceExample,
    PreferenceObjective,
    tokenize_preferences,
)
from afina.objectives.reward_model import RewardModelObjective
from afina.settings import TrainSettings
from afina.training.setup.prepared import (
    PreparedData,
    Units,
    describe_data,
    resolve_invocation,
)

Made = list[tuple[PreferenceRow, PreferenceExample]]


def prepare_preferences(settings: TrainSettings, base: CausalLM | None) -> PreparedData:
    """Load, read, render and check; raises the error of the first thing that is wrong."""
    objective, options = settings.objective, settings.group(settings.objective)
    table = _read(settings.data, settings)
    base = base or load_base(
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.place,
        get_preset(settings.method, 1).quantization,
    )
    own_tokens = base.add_tokens(settings.new_tokens)
    modules = (base.add_score_head(),) if objective == "reward" else ()
    renderer = Renderer(
        base.tokenizer, settings.chat_template, settings.max_length or min(base.max_positions, 2048)
    )
    invocation = (
        resolve_invocation(renderer, settings)
        if get_preset(settings.method, 1).is_activated
        else ()
    )
    skipped = list(table.skipped)
    train, held = _split(settings, table, renderer, invocation, skipped)
    given = (base, [choice for _, choice in train], [choice for _, choice in held])
    packing = (settings.max_tokens_per_batch, settings.gradient_accumulation_steps, settings.seed)
    task: PairwiseObjective = (
        RewardModelObjective(*given, *packing)
        if modules
        else PreferenceObjective(objective, options, *given, *packing)
    )
    return PreparedData(
        base=base,
        task=task,
        objective=objective,
        data_info=describe_data(table, len(held)),
        skipped=skipped,
        example=_show(renderer, task.train[0]),
        eval_records=[row.record() for row, _ in held],
        invocation=invocation,
        modules_to_save=modules,
        trainable_tokens=own_tokens,
        max_length=renderer.max_length,
        counts={
            "train": len(train),
            "held_out": len(held),
            "tokens": sum(len(choice.token_ids) for _, choice in train),
            "longest": max(len(e.token_ids) for _, c in train for e in (c.chosen, c.rejected) if e),
        },
        words=Units("answer" if objective == "kto" else "pair", ""),
    )


def _read(path: Path, settings: TrainSettings) -> Table[PreferenceRow]:
    """The rows that the objective learns from; KTO takes pairs apart."""
    table = read_table(path, PREFERENCE, settings.columns, settings.skip_bad_rows)
    if table.format == LABELS and settings.objective != "kto":
        hint = "--objective kto learns from labels"
        raise DataError(
            f"{settings.objective} compares two answers to one prompt",
            where=str(path),
            why="these rows have one answer and a label",
            hint=hint,
        )
    if settings.objective == "kto" and table.format == PAIRS:
        return replace(table, rows=split_pairs(table.rows))
    return table


def _split(
    settings: TrainSettings,
    table: Table[PreferenceRow],
    renderer: Renderer,
    invocation: tuple[int, ...],
    skipped: list[str],
) -> tuple[Made, Made]:
    """Rows to learn from and rows to judge by; those of one prompt are on one side."""
    leave_out = skipped if settings.skip_bad_rows else None
    renderer.check_template(
        [
            row.row(answer)
            for row in table.rows[:16]
            for answer in (row.chosen, row.rejected)
            if answer is not None
        ]
    )
    kto = settings.objective == "kto"
    if settings.eval_data is not None:
        other = _read(settings.eval_data, settings)
        skipped += other.skipped
        rows, held = table.rows, other.rows
    else:
        rows, held = train_eval_split(table.rows, settings.eval_size, settings.seed, prompt_key)
    return (
        tokenize_preferences(renderer, rows, leave_out, invocation, kto),
        tokenize_preferences(renderer, held, leave_out, invocation, kto),
    )


def _show(renderer: Renderer, choice: PreferenceExample) -> str:
    sides = (("better", choice.chosen), ("worse", choice.rejected))
    return "\n".join(
        f"{name}: {renderer.format_loss_mask(example)}"
        for name, example in sides
        if example is not None
    )
