"""`afina eval`: the base and the adapter on the same rows, side by side."""

from pathlib import Path
from typing import Any

from afina.base.classifier import Classifier
from afina.config import EvalSettings, make_settings
from afina.data.formats import Row, read_table
from afina.data.labelled import read_labelled
from afina.data.template import Renderer
from afina.delta.opening import open_run
from afina.engine.generate import Sampling, answer
from afina.errors import DataError, SettingsError
from afina.judge.classes import classify_held_out
from afina.judge.losses import BATCH_TOKENS, general_loss, perplexity
from afina.judge.metrics import score
from afina.objective.classify import ClassifyTask, make_rows
from afina.objective.language import choose, make_examples, mean_loss
from afina.route.invocation import Route

HELD_OUT = "held_out.jsonl"


def evaluate(run: str | Path | EvalSettings | None = None, **values: Any) -> dict[str, Any]:
    """Losses, metrics and forgetting of the base ("before") and of the adapter ("after"), with examples.

    Rows without an answer (plain text) have losses only; a classifier has accuracy, F1 and its confusion table. Losses
    are nats a token, metrics percent.
    """
    settings = run if isinstance(run, EvalSettings) else make_settings(EvalSettings, {"run": run, **values})
    opened = open_run(settings.run, settings)
    if isinstance(opened.base, Classifier):
        return _evaluate_classifier(opened.base, opened.route, settings)
    base, rows = opened.language, _rows(settings)
    routes: dict[str, Route | None] = {"before": None} | ({"after": opened.route} if opened.route else {})
    renderer = Renderer(base.tokenizer, opened.template, min(base.context, 2048))
    examples = make_examples(choose("auto", rows), renderer, rows, None)
    asked = [example for example in examples if example.answer is not None][: settings.limit]
    result: dict[str, Any] = {"base": base.name, "run": str(settings.run) if settings.run else None, "rows": len(rows)}
    answers: dict[str, list[str]] = {}
    for when, route in routes.items():
        loss = mean_loss(base, examples, BATCH_TOKENS, route)
        result[when] = {"loss": loss, "perplexity": perplexity(loss), "general_loss": general_loss(base, route)}
        if asked:
            prompts = [example.tokens[: example.prompt_tokens] for example in asked]
            answers[when] = [a.text for a in answer(base, renderer, prompts, Sampling(settings.max_new_tokens), route)]
            result[when] |= score(settings.metrics, answers[when], [example.answer or "" for example in asked])
    if "after" in routes:
        result["forgetting"] = result["after"]["general_loss"] - result["before"]["general_loss"]
    result["examples"] = [
        {"prompt": question(base.text(e.tokens[: e.prompt_tokens])), "expected": e.answer}
        | {when: texts[i] for when, texts in answers.items()}
        for i, e in enumerate(asked)
    ]
    return result


def _evaluate_classifier(base: Classifier, route: Route | None, settings: EvalSettings) -> dict[str, Any]:
    """Scores on labelled rows. The head belongs to the adapter, so there is no "before"."""
    if settings.data is None or settings.run is None:
        raise SettingsError("a classifier is judged on labelled rows", where="data", hint="--data FILE")
    rows = make_rows(base, read_labelled(settings.data, settings.columns).rows, min(base.context, 512), None)
    task = ClassifyTask(base, rows, rows, 32, 1, 0)
    scores = classify_held_out(task, route, settings.run / "confusion-eval.png")
    return {
        "base": base.name,
        "run": str(settings.run),
        "loss": task.held_out_loss(route),
        "classes": scores,
        "rows": len(rows),
    }


def question(text: str) -> str:
    """A rendered prompt on one line, for a table."""
    return " ".join(text.split())


def _rows(settings: EvalSettings) -> list[Row]:
    if settings.data is not None:
        return read_table(settings.data, settings.columns).rows
    if settings.run is None:
        raise SettingsError("nothing to judge on", where="data", hint="--data FILE, or --run RUN for its own held-out rows")
    kept = settings.run / HELD_OUT
    if not kept.is_file():
        raise DataError("this folder has no held-out rows of its own", where=str(settings.run), hint="--data FILE")
    return read_table(kept).rows
