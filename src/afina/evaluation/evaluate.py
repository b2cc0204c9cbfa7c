"""`afina eval`: the base and the adapter on the same rows, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.load_run import LoadedRun, load_run
from afina.data.renderer import Renderer
from afina.data.schemas import LABELED, SFT, LabeledRow, SFTRow
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.errors import DataError, SettingsError
from afina.evaluation.confusion import classify_held_out
from afina.evaluation.metrics import compute_metrics
from afina.evaluation.policy_eval import evaluate_policy
from afina.evaluation.preference_eval import HELD_OUT, eval_rows_file, evaluate_preferences
from afina.evaluation.results import EvalResult
from afina.evaluation.retention import BATCH_TOKENS, perplexity, retention_loss
from afina.models.classifier import Classifier
from afina.objectives.classification import (
    ClassificationObjective,
    MaskedLMObjective,
    chunk_texts,
    tokenize_labeled_rows,
)
from afina.objectives.language_modeling import infer_objective, mean_loss, tokenize_rows
from afina.settings import POLICIES, PREFERENCES, EvalSettings, make_settings


def evaluate(
    run: str | Path | EvalSettings | None = None, *, model: Classifier | None = None, **values: Any
) -> EvalResult:
    """Losses, metrics and forgetting of the base ("before") and of the adapter ("after"), with examples.

    Rows without an answer (plain text) have losses only; a classifier has accuracy, F1 and its confusion table. Losses
    are nats a token, metrics percent. `model` is the classifier made in Python that the run was trained on.
    """
    settings = (
        run
        if isinstance(run, EvalSettings)
        else make_settings(EvalSettings, {"adapter": run, **values})
    )
    opened = load_run(settings.adapter, settings, model=model)
    if isinstance(opened.base, Classifier):
        judge = _evaluate_classifier if opened.base.labels else _evaluate_masked
        return judge(opened.base, opened, settings)
    if opened.run.get("objective") in PREFERENCES:
        return evaluate_preferences(opened, settings)
    if opened.run.get("objective") in POLICIES:
        return evaluate_policy(opened, settings)
    base, rows = opened.causal_lm, _rows(settings)
    routes: dict[str, ActiveAdapters | None] = {"before": None} | (
        {"after": opened.active} if opened.active else {}
    )
    renderer = Renderer(base.tokenizer, opened.template, min(base.max_positions, 2048))
    examples = tokenize_rows(infer_objective("auto", rows), renderer, rows, None)
    asked = [example for example in examples if example.completion is not None][: settings.limit]
    result: dict[str, Any] = {
        "base": base.name,
        "run": str(settings.adapter) if settings.adapter else None,
        "rows": len(rows),
    }
    answers: dict[str, list[str]] = {}
    for when, route in routes.items():
        loss = mean_loss(base, examples, BATCH_TOKENS, route)
        result[when] = {
            "loss": loss,
            "perplexity": perplexity(loss),
            "general_loss": retention_loss(base, route),
        }
        if asked:
            prompts = [example.token_ids[: example.prompt_length] for example in asked]
            answers[when] = [
                completion.text
                for completion in generate_completions(
                    base,
                    prompts,
                    SamplingParams(settings.max_new_tokens),
                    route,
                    renderer.stop_token_ids,
                )
            ]
            result[when] |= compute_metrics(
                settings.metrics, answers[when], [example.completion or "" for example in asked]
            )
    if "after" in routes:
        result["forgetting"] = result["after"]["general_loss"] - result["before"]["general_loss"]
    result["examples"] = [
        {"prompt": one_line(base.decode(e.token_ids[: e.prompt_length])), "expected": e.completion}
        | {when: texts[i] for when, texts in answers.items()}
        for i, e in enumerate(asked)
    ]
    return EvalResult(**result)


def _evaluate_classifier(
    base: Classifier, opened: LoadedRun, settings: EvalSettings
) -> EvalResult:
    """Scores on labelled rows. The head belongs to the adapter, so there is no "before"."""
    if settings.adapter is None:
        raise SettingsError(
            "a classifier's head lies in its run", where="adapter", hint="afina eval RUN"
        )
    told = None if settings.data is None else read_table(settings.data, LABELED, settings.columns).rows
    length = opened.run["settings"]["max_length"] or min(base.max_positions, 512)
    rows = tokenize_labeled_rows(
        base, told if told is not None else _kept_rows(opened.run, settings.adapter), length, None
    )
    task = ClassificationObjective(base, rows, rows, 32, 1, 0)
    picture = settings.adapter / (
        "confusion.png" if settings.data is None else "confusion-eval.png"
    )
    return EvalResult(
        base=base.name,
        run=str(settings.adapter),
        rows=len(rows),
        loss=task.eval_loss(opened.active),
        classes=classify_held_out(task, opened.active, picture),
    )


def _kept_rows(story: Mapping[str, Any], run: Path) -> list[LabeledRow]:
    """The held-out rows of a classifier's run: texts are kept with it, pictures lie where they were."""
    if not (run / HELD_OUT).is_file():
        raise DataError(
            "this folder has no held-out rows of its own", where=str(run), hint="--data FILE"
        )
    if story["data"]["format"] == "text":
        return read_table(run / HELD_OUT, LABELED).rows
    wanted = {json.loads(line)["file"] for line in (run / HELD_OUT).read_text().splitlines()}
    trained = story["settings"]
    source = Path(trained["eval_data"] or trained["data"])
    if not source.exists():
        why = f"the run held out pictures of {source}, and it is not there"
        raise DataError(
            "the held-out pictures cannot be found", where=str(run), why=why, hint="--data FOLDER"
        )
    table = read_table(source, LABELED, trained["columns"])
    if trained["eval_data"] is None and table.digest != story["data"]["sha256"]:
        why = "its pictures are no longer those of the run, so which of them it has seen is unknown"
        raise DataError(
            "the data has changed", where=str(source), why=why, hint="--data FOLDER of new pictures"
        )
    return [row for row in table.rows if row.where in wanted]


def _evaluate_masked(base: Classifier, opened: LoadedRun, settings: EvalSettings) -> EvalResult:
    """Loss on hidden tokens, of the encoder as it was and with the adapter."""
    rows = _rows(settings)
    texts = chunk_texts(
        base, rows, opened.run["settings"]["max_length"] or min(base.max_positions, 128)
    )
    task = MaskedLMObjective(base, texts, texts, 32, 1, 0)
    result: dict[str, Any] = {"base": base.name, "run": str(settings.adapter), "rows": len(rows)}
    for when, route in {"before": None, "after": opened.active}.items():
        loss = task.eval_loss(route)
        result[when] = {"loss": loss, "perplexity": perplexity(loss)}
    return EvalResult(**result)


def one_line(text: str) -> str:
    """A rendered prompt on one line, for a table."""
    return " ".join(text.split())


def _rows(settings: EvalSettings) -> list[SFTRow]:
    if settings.data is not None:
        return read_table(settings.data, SFT, settings.columns).rows
    return read_table(eval_rows_file(settings), SFT).rows
