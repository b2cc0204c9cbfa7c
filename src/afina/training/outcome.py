"""What a run has reached: losses and scores before and after, a verdict, and the next command."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.registry import get_method
from afina.data.renderer import Example, Renderer
from afina.evaluation.answer_scores import generate_answers, score_answers, scored_examples
from afina.evaluation.cause import RunFigures, find_cause
from afina.evaluation.loss_report import measure_losses
from afina.evaluation.retention import retention_loss
from afina.evaluation.verdict import Verdict, forgetting_sentence, score_sentence, verdict
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.models.fsdp import is_sharded
from afina.objectives.base import perplexity
from afina.objectives.task_score import MIN_DECISIVE_ROWS, TaskScore
from afina.training.checkpoint import SETTINGS
from afina.training.setup.set_up import RunSetup, free_folder
from afina.training.trainer import Trainer, read_metrics

# of a run, in which the eval loss was lowest: from then on only the train loss fell
EARLY_BEST_RATIO = 0.5


def run_renderer(setup: RunSetup, base: CausalLM) -> Renderer:
    """Return the renderer of the run's prompts."""
    return Renderer(base.tokenizer, ChatFormat.from_settings(setup.settings), base.max_positions)


def evaluate_run(trainer: Trainer, best: ActiveAdapters) -> dict[str, Any]:
    """Return the losses of the best adapter and those before, scores, report and verdict."""
    task, baseline = trainer.setup.prepared.task, trainer.setup.prepared.baseline
    before = {"loss": trainer.progress.before["eval_loss"]}
    if task.report_key and task.has_baseline:
        before = task.evaluate(baseline)
    after = task.evaluate(best)
    report = task.report(before, after)
    sentences, score = report.pop("verdict"), report.pop("score", None)
    train_score = None
    if score is None:
        score, train_score = _answer_scores(trainer, best)
    losses = _policy_losses if task.maximizes_reward else _losses_with_intervals
    record, decided = losses(trainer, best, before["loss"], after["loss"], score, train_score)
    record["verdict"] = [*decided.sentences, *sentences, *decided.forgetting]
    record["cause"] = decided.cause and decided.cause.name
    record["next_command"] = _next_command(trainer, decided)
    for name, found in (("score", score), ("train_score", train_score)):
        record[name] = found and found.to_dict()
    if task.report_key:
        task.plot(report, trainer.run / "confusion.png", trainer.world.is_main_process)
        record[task.report_key] = report | task.run_facts()
    return record


def _answer_scores(
    trainer: Trainer, best: ActiveAdapters
) -> tuple[TaskScore | None, TaskScore | None]:
    """Return the scores of generated answers to eval prompts and, where these are few, of others.

    Those are training rows: an answer that is wrong there was not learned. A base that is sharded
    over processes generates nothing here.
    """
    setup, task, base = trainer.setup, trainer.setup.prepared.task, trainer.setup.prepared.base
    if not isinstance(base, CausalLM) or is_sharded(base):
        return None, None
    sides = {"before": setup.prepared.baseline, "after": best}
    stops = run_renderer(setup, base).stop_token_ids

    def score(examples: Sequence[Example], row_kind: str) -> TaskScore | None:
        chosen, longest = scored_examples(examples, base, trainer.progress.tokens)
        if not chosen:
            return None
        answers = generate_answers(base, chosen, sides, stops, longest)
        return score_answers(answers, [one.completion or "" for one in chosen], row_kind=row_kind)

    found = score(task.expected_completions(), "eval row")
    is_enough = found is None or len(task.eval_rows) >= MIN_DECISIVE_ROWS
    return found, None if is_enough else score(task.train, "training row")


def _run_figures(trainer: Trainer, overfits: bool) -> RunFigures:
    """Return the figures of the run that show the cause of what was not learned."""
    setup, task = trainer.setup, trainer.setup.prepared.task
    key, sign = ("reward", -1) if task.maximizes_reward else ("loss", 1)
    curve = [sign * line[key] for line in read_metrics(trainer.run) if key in line]
    is_full = get_method(setup.adapter.config.method).replaces_base
    return RunFigures(
        curve=curve,
        steps=trainer.progress.step,
        min_steps=task.min_default_steps,
        steps_per_epoch=task.steps_per_epoch,
        best_step=trainer.progress.best_step,
        overfits=overfits,
        learning_rate=setup.learning_rate,
        rank=None if is_full else setup.settings.rank,
        what="reward" if task.maximizes_reward else "train loss",
    )


def _next_command(trainer: Trainer, decided: Verdict) -> str | None:
    """Return the command to type next: the run again with the settings of its cause, or its use."""
    folder = trainer.run
    if decided.cause is None:
        return trainer.setup.prepared.task.next_command(folder)
    first = folder.with_name(re.sub(r"-\d+$", "", folder.name))
    free = free_folder(first if first.exists() else folder, False)
    changed = decided.cause.settings | {"output_dir": free}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in changed.items())
    return f"afina train --config {folder / SETTINGS} {flags}"


def _losses_with_intervals(
    trainer: Trainer,
    best: ActiveAdapters,
    before: float,
    after: float,
    score: TaskScore | None,
    train_score: TaskScore | None,
) -> tuple[dict[str, Any], Verdict]:
    """Return losses of eval rows, training rows and general text, with intervals, and a verdict."""
    prepared, progress = trainer.setup.prepared, trainer.progress
    now = {"eval_loss": after}
    if isinstance(base := prepared.base, CausalLM):
        now["retention_loss"] = retention_loss(base, best, trainer.setup.settings.retention_text)
    losses = replace(
        measure_losses(prepared.task, progress.before, now, prepared.baseline, best),
        best_step=progress.best_step,
        last_step=progress.step,
    )
    interval, forgetting = losses.eval_change.interval, losses.forgetting
    is_early = losses.best_step <= EARLY_BEST_RATIO * losses.last_step
    overfits = (losses.overfits or is_early) and not losses.has_few_rows
    figures = _run_figures(trainer, overfits)
    decided = verdict(losses, prepared.units, score, train_score, figures)
    return {
        "losses": asdict(losses) | {"eval_interval": interval, "forgetting": forgetting},
        "perplexity": {
            "before": perplexity(losses.eval_loss_before),
            "after": perplexity(losses.eval_loss_after),
        },
    }, decided


def _policy_losses(
    trainer: Trainer,
    best: ActiveAdapters,
    before: float,
    after: float,
    score: TaskScore,
    train_score: TaskScore | None,
) -> tuple[dict[str, Any], Verdict]:
    """Return minus the mean reward, as in metrics.jsonl, the loss on general text, a verdict."""
    progress, base = trainer.progress, trainer.setup.prepared.base
    assert isinstance(base, CausalLM)
    retention_before = progress.before["retention_loss"]
    retention_after = retention_loss(base, best, trainer.setup.settings.retention_text)
    is_earlier = progress.best_step < progress.step
    kept = [f"The best state, of step {progress.best_step}, was kept."] if is_earlier else []
    cause = None if score.outcome == "better" else find_cause(_run_figures(trainer, False))
    causes = [cause.sentence] if cause else []
    return {
        "losses": {
            "eval_loss_before": before,
            "eval_loss_after": after,
            "retention_loss_before": retention_before,
            "retention_loss_after": retention_after,
            "forgetting": retention_after - retention_before,
            "best_step": progress.best_step,
            "last_step": progress.step,
        },
    }, Verdict(
        [score_sentence(score), *causes, *kept],
        [forgetting_sentence(retention_before, retention_after)],
        cause,
    )
