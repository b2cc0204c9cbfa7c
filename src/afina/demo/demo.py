"""`afina demo`: a LoRA on the embedded base that learns to correct sentences, in two minutes.

`rows.jsonl` has the rows, in English and Spanish; `recipes/demo_rows.py` makes them. The eval
sentences contain words that the train rows do not: the base knows those words, and what the adapter
learned has to generalize to them.
"""

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.errors import SettingsError
from afina.evaluation.evaluate import evaluate
from afina.evaluation.results import example_tables
from afina.io.jsonl import read_jsonl, write_jsonl
from afina.io.result import Content, Result, ResultTable, ResultText, next_command
from afina.settings import DemoSettings, TrainSettings, make_settings
from afina.training.train import train

ROWS_FILE = Path(__file__).with_name("rows.jsonl")
EVAL_FILE = "eval.jsonl"


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
        lines.append("a prompt to try: Correct: the dogs runs in the park")
        return [
            ResultTable(title, rows),
            *example_tables(self.examples),
            *map(ResultText, lines),
            *next_command(f"afina chat {self.run}"),
        ]


def load_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the train rows and the eval rows, as chats."""
    train_rows: list[dict[str, Any]] = []
    eval_rows: list[dict[str, Any]] = []
    for row in read_jsonl(ROWS_FILE):
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
        (eval_rows if row.get("eval") else train_rows).append({"messages": messages})
    return train_rows, eval_rows


def _words(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the words of the completions, in lower case."""
    answers = (row["messages"][1]["content"] for row in rows)
    return [word for answer in answers for word in answer.lower().rstrip(".").split()]


def demo(settings: DemoSettings | None = None, **values: Any) -> DemoResult:
    """Write the demo's rows, train a LoRA on the embedded base, and evaluate it."""
    settings = settings or make_settings(DemoSettings, values)
    start = time.perf_counter()
    _remove_earlier_demo(settings.output_dir)
    train_rows, eval_rows = load_rows()
    train_file, eval_file = (settings.output_dir / name for name in ("train.jsonl", EVAL_FILE))
    write_jsonl(train_file, train_rows)
    write_jsonl(eval_file, eval_rows)
    train_settings = TrainSettings(
        data=train_file,
        output_dir=settings.output_dir / "run",
        eval_data=eval_file,
        method="lora",
        rank=16,
        learning_rate=2e-3,
        max_steps=settings.max_steps,
        max_tokens_per_batch=2048,
        warmup_ratio=0.05,
        seed=settings.seed,
        eval_steps=max(1, settings.max_steps // 4),
    )
    run = train(train_settings, quiet=False)
    scores = evaluate(
        adapter=run.folder,
        metrics=["exact_match", "chrf"],
        max_new_tokens=48,
        limit=len(eval_rows),
    )
    known, words = set(_words(train_rows)), _words(eval_rows)
    return DemoResult(
        seconds=time.perf_counter() - start,
        metric="exact match, percent",
        metric_before=scores["before"]["exact_match"],
        metric_after=scores["after"]["exact_match"],
        chrf_before=scores["before"]["chrf"],
        chrf_after=scores["after"]["chrf"],
        held_out=len(eval_rows),
        unseen_words=100.0 * sum(word not in known for word in words) / len(words),
        forgetting=run.record["losses"]["forgetting"],
        peak_memory_mb=run.record["peak_memory_mb"],
        adapter_kb=run.record["adapter_kb"],
        train_seconds=run.record["seconds"],
        tokens_per_second=run.record["tokens_per_second"],
        verdict=run.record["verdict"],
        examples=scores["examples"][:3],
        curve=str(run.folder / "curve.png"),
        run=str(run.folder),
    )


def _remove_earlier_demo(output_dir: Path) -> None:
    """Remove the run of an earlier demo; raise `SettingsError` where the folder is not a demo's."""
    run = output_dir / "run"
    if run.exists():
        if not (output_dir / EVAL_FILE).exists():
            raise SettingsError(
                "this folder is not an earlier demo's",
                where=str(output_dir),
                hint="choose another --output-dir",
            )
        shutil.rmtree(run)
