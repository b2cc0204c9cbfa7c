"""`afina eval`: the base and the adapter on the same rows, side by side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afina.base.classifier import Classifier
from afina.config import POLICIES, PREFERENCES, EvalSettings, make_settings
from afina.data.batches import holdout_share
from afina.data.formats import Row, read_table
from afina.data.labelled import Labelled, read_labelled
from afina.data.template import Renderer
from afina.delta.opening import Opened, open_run
from afina.engine.generate import answer
from afina.engine.request import Sampling
from afina.errors import DataError, SettingsError
from afina.judge.classes import classify_held_out
from afina.judge.losses import BATCH_TOKENS, general_loss, perplexity
from afina.judge.metrics import score
from afina.judge.policy import evaluate_policy
from afina.judge.preferences import HELD_OUT, evaluate_preferences, held_out_file
from afina.objective.classify import ClassifyTask, MaskedTask, make_rows, make_texts
from afina.objective.language import choose, make_examples, mean_loss
from afina.route.invocation import Route


def evaluate(
    run: str | Path | EvalSettings | None = None, *, model: Classifier | None = None, **values: Any
) -> dict[str, Any]:
    """Losses, metrics and forgetting of the base ("before") and of the adapter ("after"), with examples.

    Rows without an answer (plain text) have losses only; a classifier has accuracy, F1 and its confusion table. Losses
    are nats a token, metrics percent. `model` is the classifier made in Python that the run was trained on.
    """
    settings = run if isinstance(run, EvalSettings) else make_settings(EvalSettings, {"run": run, **values})
    opened = open_run(settings.run, settings, model=model)
    if isinstance(opened.base, Classifier):
        judge = _evaluate_classifier if opened.base.labels else _evaluate_masked
        return judge(opened.base, opened, settings)
    if opened.run.get("objective") in PREFERENCES:
        return evaluate_preferences(opened, settings)
    if opened.run.get("objective") in POLICIES:
        return evaluate_policy(opened, settings)
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


def _evaluate_classifier(base: Classifier, opened: Opened, settings: EvalSettings) -> dict[str, Any]:
    """Scores on labelled rows. The head belongs to the adapter, so there is no "before"."""
    if settings.run is None:
        raise SettingsError("a classifier's head lies in its run", where="run", hint="afina eval RUN")
    told = None if settings.data is None else read_labelled(settings.data, settings.columns).rows
    length = opened.run["settings"]["max_length"] or min(base.context, 512)
    rows = make_rows(base, told if told is not None else _kept_rows(opened.run, settings.run), length, None)
    task = ClassifyTask(base, rows, rows, 32, 1, 0)
    picture = settings.run / ("confusion.png" if settings.data is None else "confusion-eval.png")
    return {
        "base": base.name,
        "run": str(settings.run),
        "loss": task.held_out_loss(opened.route),
        "classes": classify_held_out(task, opened.route, picture),
        "rows": len(rows),
    }


def _kept_rows(story: Mapping[str, Any], run: Path) -> list[Labelled]:
    """The held-out rows of a classifier's run: texts are kept with it, pictures lie where they were."""
    if not (run / HELD_OUT).is_file():
        raise DataError("this folder has no held-out rows of its own", where=str(run), hint="--data FILE")
    if story["data"]["format"] == "text":
        return read_labelled(run / HELD_OUT, {}).rows
    wanted = {json.loads(line)["file"] for line in (run / HELD_OUT).read_text().splitlines()}
    trained = story["settings"]
    share = holdout_share(trained["holdout"])
    source = Path(trained["data"] if share is not None else trained["holdout"])
    if not source.exists():
        why = f"the run held out pictures of {source}, and it is not there"
        raise DataError("the held-out pictures cannot be found", where=str(run), why=why, hint="--data FOLDER")
    table = read_labelled(source, trained["columns"])
    if share is not None and table.digest != story["data"]["sha256"]:
        why = "its pictures are no longer those of the run, so which of them it has seen is unknown"
        raise DataError("the data has changed", where=str(source), why=why, hint="--data FOLDER of new pictures")
    return [row for row in table.rows if row.where in wanted]


def _evaluate_masked(base: Classifier, opened: Opened, settings: EvalSettings) -> dict[str, Any]:
    """Loss on hidden tokens, of the encoder as it was and with the adapter."""
    rows = _rows(settings)
    texts = make_texts(base, rows, opened.run["settings"]["max_length"] or min(base.context, 128))
    task = MaskedTask(base, texts, texts, 32, 1, 0)
    result: dict[str, Any] = {"base": base.name, "run": str(settings.run), "rows": len(rows)}
    for when, route in {"before": None, "after": opened.route}.items():
        loss = task.held_out_loss(route)
        result[when] = {"loss": loss, "perplexity": perplexity(loss)}
    return result


def question(text: str) -> str:
    """A rendered prompt on one line, for a table."""
    return " ".join(text.split())


def _rows(settings: EvalSettings) -> list[Row]:
    if settings.data is not None:
        return read_table(settings.data, settings.columns).rows
    return read_table(held_out_file(settings)).rows
