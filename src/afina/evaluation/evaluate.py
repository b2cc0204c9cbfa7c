"""`afina eval`: metrics of the base and of the adapter on the same rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.load_run import LoadedRun, load_run
from afina.adapters.loading import load_adapter
from afina.data.renderer import Example
from afina.errors import DataError
from afina.evaluation.answer_scores import generate_answers, score_answers
from afina.evaluation.metrics import check_metrics, compute_metrics
from afina.evaluation.results import EvalResult
from afina.evaluation.retention import retention_loss
from afina.evaluation.verdict import forgetting_sentence, score_sentence
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.objectives.base import Objective
from afina.objectives.prepared import run_renderer, trained_settings
from afina.objectives.reference import select_reference
from afina.objectives.registry import get_objective
from afina.objectives.task_score import TaskScore
from afina.settings import EvalSettings, as_settings

DEFAULT_OBJECTIVE = "sft"  # of a base alone, or of an adapter without its run


def evaluate(
    run: str | Path | EvalSettings | None = None, *, model: Classifier | None = None, **values: Any
) -> EvalResult:
    """Return losses, metrics and forgetting of the base ("before") and the adapter ("after").

    Losses are nats per token, metrics percent. Rows without a completion (plain text) have losses
    only; a classifier has accuracy, F1 and its confusion table. `model` is the classifier built in
    Python that the run was trained on.
    """
    settings = as_settings(EvalSettings, run, "adapter", values)
    check_metrics(settings.metrics)
    opened = load_run(settings.adapter, settings, model=model)
    objective = get_objective(opened.run.get("objective", DEFAULT_OBJECTIVE)).from_run(
        opened, settings
    )
    result: dict[str, Any] = {
        "base": opened.base.name,
        "run": str(settings.adapter) if settings.adapter else None,
        "rows": objective.num_rows,
    }
    baseline = _connect(objective, opened)
    if not objective.has_baseline:
        return EvalResult(**result | _evaluate_alone(objective, opened, settings))
    routes = {"before": baseline} | ({"after": opened.active} if opened.active else {})
    sides = {when: objective.evaluate(route) for when, route in routes.items()}
    score, sentences = None, []
    if "after" in sides and objective.report_key:
        result |= {"objective": objective.name}
        report = objective.report(sides["before"], sides["after"])
        score, sentences = report.pop("score", None), report.pop("verdict")
        sides = {
            when: {"loss": sides[when]["loss"]} | report.pop(when) for when in ("before", "after")
        }
        result |= report
    if isinstance(base := opened.base, CausalLM):
        for when, route in routes.items():
            sides[when]["retention_loss"] = retention_loss(base, route)
    result |= sides
    if isinstance(base, CausalLM) and not objective.report_key:
        result["examples"], score = _completions(objective, opened, settings, routes, result)
    if "after" in sides:
        if isinstance(base, CausalLM):
            before, after = (sides[when]["retention_loss"] for when in ("before", "after"))
            result["forgetting"] = after - before
            sentences = [*sentences, forgetting_sentence(before, after)]
        result |= _decision(score, sentences, objective, opened, settings.adapter)
    return EvalResult(**result)


def _decision(
    score: TaskScore | None,
    sentences: Sequence[str],
    objective: Objective,
    opened: LoadedRun,
    adapter: Path | None,
) -> dict[str, Any]:
    """Return score, verdict and next command; that of the run where its task is not learned."""
    if score is None:
        return {"verdict": sentences}
    is_learned = score.outcome == "better" and score.mostly_right
    command = objective.next_command(Path(str(adapter))) if is_learned else None
    return {
        "score": score.to_dict(),
        "verdict": [score_sentence(score), *sentences],
        "next_command": command or opened.run.get("next_command"),
    }


def _connect(objective: Objective, opened: LoadedRun) -> ActiveAdapters:
    """Give an objective what it trained and compared with; return what was active before."""
    if "objective" not in opened.run or len(opened.adapters) != 1:
        return BASE_ONLY
    baseline, digest = reload_init_adapter(opened)
    objective.policy = opened.active
    if objective.needs_reference:
        objective.reference = select_reference(objective.options, baseline, digest, 0.0)
    return baseline


def _evaluate_alone(
    objective: Objective, opened: LoadedRun, settings: EvalSettings
) -> dict[str, Any]:
    """Return the metrics of a model that cannot be evaluated without its adapter."""
    after = objective.evaluate(opened.active)
    report = objective.report({}, after)
    score, sentences = report.pop("score", None), report.pop("verdict")
    name = "confusion.png" if settings.data is None else "confusion-eval.png"
    objective.plot(report, Path(str(settings.adapter)) / name, True)
    decision = _decision(score, sentences, objective, opened, settings.adapter)
    return {"loss": after["loss"], str(objective.report_key): report} | decision


def _completions(
    objective: Objective,
    opened: LoadedRun,
    settings: EvalSettings,
    routes: dict[str, ActiveAdapters],
    result: dict[str, Any],
) -> tuple[list[dict[str, Any]], TaskScore | None]:
    """Generate completions, add their metrics to `result`; return them and the task's score."""
    base = opened.causal_lm
    prompted = objective.expected_completions()[: settings.limit]
    if not prompted:
        return [], None
    renderer = run_renderer(opened, base)
    expected = [example.completion or "" for example in prompted]
    stops = renderer.stop_token_ids
    texts = generate_answers(base, prompted, routes, stops, settings.max_new_tokens)
    for when in routes:
        result[when] |= compute_metrics(settings.metrics, texts[when], expected)
    examples = [
        {"prompt": prompt_text(base, example), "expected": completion}
        | {when: texts[when][number] for when in routes}
        for number, (example, completion) in enumerate(zip(prompted, expected, strict=True))
    ]
    return examples, score_answers(texts, expected) if "after" in texts else None


def prompt_text(base: CausalLM, example: Example) -> str:
    """Return a prompt as the model reads it, with the marks of its template and its lines."""
    return str(base.tokenizer.decode(example.token_ids[: example.prompt_length]))


def reload_init_adapter(opened: LoadedRun) -> tuple[ActiveAdapters, str | None]:
    """Load what a run began with: the adapter that it continued, and the frozen one; with hashes.

    Raises:
        DataError: The adapter is not the one that the run recorded.
    """
    start = trained_settings(opened.run).init_adapter
    frozen = opened.frozen_adapter
    if start is None:
        return frozen, opened.run["frozen_adapter"] if frozen else None
    folder = adapter_folder(Path(str(start)))
    digest = str(read_metadata(folder).get("hash", ""))
    expected = opened.run.get("init_adapter")
    if expected and digest != expected:
        why = f"its hash was {str(expected)[:12]}, and is {digest[:12]}"
        raise DataError(
            "the adapter that the run continued has changed", where=str(folder), why=why
        )
    initial = load_adapter(folder, opened.base, "start").active
    return ActiveAdapters.combine([initial, frozen]), digest


def one_line(text: str) -> str:
    """Return a rendered prompt on one line, for a table."""
    return " ".join(text.split())
