"""`afina demo`: the whole road in two minutes. Rows, a LoRA on the embedded base, judgement, examples, a curve.

The task is to correct simple sentences in English and Spanish. The held-out sentences share nothing with the
training ones, and at least a fifth of their words never occur there: the base knows those words, and what the
adapter learned has to reach them.
"""

import json
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.demo.lexicon import LANGUAGES
from afina.demo.sentences import EVERYTHING, TAUGHT, Clause, Vocabulary, corrupt, draw_clause, write
from afina.errors import SettingsError
from afina.evaluation.evaluate import evaluate
from afina.evaluation.results import example_tables
from afina.io.atomic import write_text
from afina.io.result import Content, Result, ResultTable, ResultText
from afina.settings import DemoSettings, TrainSettings, make_settings
from afina.training import train as training

TRAIN_ROWS, HELD_ROWS = 12000, 150
UNSEEN_SHARE = (
    0.3  # of each class of words; more than a fifth of the running words of the held-out sentences
)
ASK = {"en": "Correct: ", "es": "Corrige: "}


@dataclass(frozen=True, eq=False)
class DemoResult(Result):
    """Demo run: corrected sentences before and after in percent, costs, examples and verdict."""

    seconds: float
    metric: str
    metric_before: float
    metric_after: float
    chrf_before: float
    chrf_after: float
    held_out: int
    unseen_words: float
    forgetting: float
    peak_memory_mb: float
    adapter_kb: float
    train_seconds: float
    tokens_per_second: float
    verdict: Sequence[str]
    examples: Sequence[Mapping[str, Any]]
    curve: str
    run: str

    def content(self) -> list[Content]:
        """Return the figures, three examples, the verdict and the next command."""
        rows = [
            (
                "sentences corrected without error, before",
                f"{self.metric_before:.1f}% of {self.held_out} eval sentences",
            ),
            ("sentences corrected without error, after", f"{self.metric_after:.1f}%"),
            ("words of these that the train rows do not contain", f"{self.unseen_words:.1f}%"),
            ("forgetting (change of retention loss)", f"{self.forgetting:+.3f} nats per token"),
            ("time", f"{self.seconds:.0f} s ({self.train_seconds:.0f} s of training)"),
            ("peak memory", f"{self.peak_memory_mb:,.0f} MB"),
            ("adapter file", f"{self.adapter_kb:,.0f} kB"),
        ]
        title = "a LoRA on the embedded base: correcting sentences in English and Spanish"
        lines = [*(f"- {sentence}" for sentence in self.verdict), f"loss curve: {self.curve}"]
        example = "(for example: Correct: the dogs runs in the park)"
        command = ResultText(f"next: afina chat {self.run}      {example}", wraps=False)
        table = ResultTable(title, rows)
        return [table, *example_tables(self.examples), *map(ResultText, lines), command]


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


def demo(settings: DemoSettings | None = None, **values: Any) -> DemoResult:
    """Write the demo's rows, train a LoRA on the embedded base, and evaluate it."""
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
    return DemoResult(
        seconds=time.perf_counter() - start,
        metric="exact match, percent",
        metric_before=judged["before"]["exact_match"],
        metric_after=judged["after"]["exact_match"],
        chrf_before=judged["before"]["chrf"],
        chrf_after=judged["after"]["chrf"],
        held_out=len(held_rows),
        unseen_words=unseen,
        forgetting=run.record["losses"]["forgetting"],
        peak_memory_mb=run.record["peak_memory_mb"],
        adapter_kb=run.record["adapter_kb"],
        train_seconds=run.record["seconds"],
        tokens_per_second=run.record["tokens_per_second"],
        verdict=run.record["verdict"],
        examples=judged["examples"][:3],
        curve=str(run.folder / "curve.png"),
        run=str(run.folder),
    )


def _clear(out: Path) -> None:
    """The demo may be run again: it takes away what an earlier demo left, and nothing else."""
    run = out / "run"
    if run.exists():
        if not (out / "held.jsonl").exists():
            raise SettingsError(
                "this folder is not an earlier demo's", where=str(out), hint="choose another --output-dir"
            )
        shutil.rmtree(run)
