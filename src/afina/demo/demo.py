"""`afina demo`: the whole road in two minutes. Rows, a LoRA on the embedded base, judgement, examples, a curve.

The task is to correct simple sentences in English and Spanish. The held-out sentences share nothing with the
training ones, and at least a fifth of their words never occur there: the base knows those words, and what the
adapter learned has to reach them.
"""

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

from afina.demo.lexicon import LANGUAGES
from afina.demo.sentences import EVERYTHING, TAUGHT, Clause, Vocabulary, corrupt, draw_clause, write
from afina.errors import SettingsError
from afina.evaluation.evaluate import evaluate
from afina.io.atomic import write_text
from afina.settings import DemoSettings, TrainSettings, make_settings
from afina.training import train as training

TRAIN_ROWS, HELD_ROWS = 12000, 150
UNSEEN_SHARE = (
    0.3  # of each class of words; more than a fifth of the running words of the held-out sentences
)
ASK = {"en": "Correct: ", "es": "Corrige: "}


def correction(rng: random.Random, clause: Clause, language: str) -> dict[str, Any]:
    """A chat row: a sentence with one mistake, and the sentence without it."""
    messages = [
        {"role": "user", "content": ASK[language] + corrupt(rng, clause, language, TAUGHT)},
        {"role": "assistant", "content": write(clause, language)},
    ]
    return {"messages": messages}


def words_of(row: dict[str, Any]) -> set[str]:
    """The words of a row's answer, in lower case."""
    return set(row["messages"][1]["content"].lower().rstrip(".").split())


def make_rows(
    seed: int, train: int = TRAIN_ROWS, held: int = HELD_ROWS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """(training rows, held-out rows, share of held-out words that are unseen in training, in percent)."""
    rng = random.Random(seed)
    seen, _ = EVERYTHING.split(rng, UNSEEN_SHARE)

    def draw(vocabulary: Vocabulary) -> dict[str, Any]:
        return correction(rng, draw_clause(rng, vocabulary), rng.choice(LANGUAGES))

    train_rows = [draw(seen) for _ in range(train)]
    known = set().union(*(words_of(row) for row in train_rows))
    answers = {row["messages"][1]["content"] for row in train_rows}
    held_rows: list[dict[str, Any]] = []
    while len(held_rows) < held:
        row = draw(EVERYTHING)
        text = row["messages"][1]["content"]
        if text not in answers and words_of(row) - known:
            answers.add(text)
            held_rows.append(row)
    running = [
        word
        for row in held_rows
        for word in row["messages"][1]["content"].lower().rstrip(".").split()
    ]
    return train_rows, held_rows, 100.0 * sum(word not in known for word in running) / len(running)


def demo(settings: DemoSettings | None = None, **values: Any) -> dict[str, Any]:
    """Make the rows, train, judge; returns the figures that the table shows."""
    settings = settings or make_settings(DemoSettings, values)
    start = time.perf_counter()
    _clear(settings.output_dir)
    train_rows, held_rows, unseen = make_rows(settings.seed)
    files = {
        "train": settings.output_dir / "train.jsonl",
        "held": settings.output_dir / "held.jsonl",
    }
    for file, rows in ((files["train"], train_rows), (files["held"], held_rows)):
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    plan = TrainSettings(
        data=files["train"],
        output_dir=settings.output_dir / "run",
        eval_data=files["held"],
        method="lora",
        rank=16,
        learning_rate=2e-3,
        max_steps=settings.max_steps,
        max_tokens_per_batch=2048,
        warmup_ratio=0.05,
        seed=settings.seed,
        eval_steps=max(1, settings.max_steps // 4),
    )
    run = training.train(plan, quiet=False)
    judged = evaluate(
        adapter=run.folder, metrics=["exact_match", "chrf"], max_new_tokens=48, limit=HELD_ROWS
    )
    return {
        "seconds": time.perf_counter() - start,
        "metric": "exact match, percent",
        "metric_before": judged["before"]["exact_match"],
        "metric_after": judged["after"]["exact_match"],
        "chrf_before": judged["before"]["chrf"],
        "chrf_after": judged["after"]["chrf"],
        "held_out": len(held_rows),
        "unseen_words": unseen,
        "forgetting": run.story["losses"]["forgetting"],
        "peak_memory_mb": run.story["peak_memory_mb"],
        "adapter_kb": run.story["adapter_kb"],
        "train_seconds": run.story["seconds"],
        "tokens_per_second": run.story["tokens_per_second"],
        "verdict": run.story["verdict"],
        "examples": judged["examples"][:3],
        "curve": str(run.folder / "curve.png"),
        "run": str(run.folder),
    }


def _clear(out: Path) -> None:
    """The demo may be run again: it takes away what an earlier demo left, and nothing else."""
    run = out / "run"
    if run.exists():
        if not (out / "held.jsonl").exists():
            raise SettingsError(
                "this folder is not an earlier demo's", where=str(out), hint="choose another --output-dir"
            )
        shutil.rmtree(run)
