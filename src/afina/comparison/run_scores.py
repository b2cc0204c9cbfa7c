"""Scores of a finished run by row, as the statistics need them; the base is scored likewise, once.

losses     nats, summed over the target tokens of each row of test.jsonl, and their counts
train      losses on as many training rows
general    losses on general text
scores     each metric of each row, in percent; and the answers
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import detach
from afina.adapters.load_run import load_run
from afina.adapters.loading import load_adapter
from afina.adapters.presets import get_preset
from afina.adapters.segments import NO_ADAPTERS
from afina.comparison.split import ComparisonSplit
from afina.data.packing import group_by_length, pack_examples
from afina.data.renderer import Example, Renderer
from afina.data.schemas import LABELED, SFT, text_of
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.evaluation.evaluate import one_line
from afina.evaluation.metrics import METRICS
from afina.evaluation.retention import retention_examples
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.loading import load_base
from afina.objectives.classification import ClassificationObjective
from afina.objectives.labeled_data import tokenize_labeled_rows
from afina.objectives.language_data import tokenize_rows
from afina.settings import CompareSettings, EvalSettings

LONG = 12  # words: the median expected answer from which on chrF says more than an exact match
SCORES = ("exact_match", "accuracy", "chrf", "rouge")
ROWS = 32  # of a classifier in one pass


@torch.no_grad()
def row_losses(
    base: CausalLM, examples: Sequence[Example], batch_tokens: int, route: ActiveAdapters | None
) -> list[float]:
    """The loss of each example, summed over its labels, in nats."""
    found = [0.0] * len(examples)
    for indices in group_by_length(
        [len(e.token_ids) for e in examples], batch_tokens, range(len(examples))
    ):
        batch = pack_examples([examples[i] for i in indices]).to(base.device)
        with base.forward_context.use(
            NO_ADAPTERS if route is None else route.segments(batch.token_ids, batch.cu_seqlens)
        ):
            losses = base.token_losses(
                batch.token_ids, batch.positions, batch.cu_seqlens, batch.labels
            ).double()
        labelled = (batch.labels >= 0).nonzero()[:, 0]
        row = torch.bucketize(
            labelled, torch.tensor(batch.cu_seqlens[1:], device=base.device), right=True
        )
        sums = torch.zeros(len(indices), dtype=torch.float64, device=base.device).index_add_(
            0, row, losses
        )
        for i, value in zip(indices, sums.tolist(), strict=True):
            found[i] = value
    return found


def labels_of(examples: Sequence[Example]) -> list[int]:
    """Return the number of target tokens of each example."""
    return [sum(e.loss_mask) for e in examples]


class RunScorer:
    """Scorer of the runs of one comparison; caches the base that it used last."""

    def __init__(self, settings: CompareSettings, rows: ComparisonSplit) -> None:
        self.settings, self.rows = settings, rows
        self._kept: tuple[str, CausalLM] | None = None

    def metric(self) -> str:
        """Return the deciding metric: as set, or by the rows; chosen before any run is scored."""
        if self.settings.metric != "auto" or self.rows.objective in ("classify", "pretrain"):
            told = {"classify": "accuracy", "pretrain": "loss"}.get(
                self.rows.objective, self.settings.metric
            )
            return self.settings.metric if self.settings.metric == "loss" else told
        rows = read_table(self.rows.test, SFT).rows
        lengths = sorted(
            len((r.completion or (text_of(r.messages[-1]) if r.messages else "")).split()) for r in rows
        )
        return "exact_match" if lengths[len(lengths) // 2] <= LONG else "chrf"

    def base(self, quantization: Literal["none", "nf4"] = "none") -> dict[str, Any]:
        """Return the scores of the base; for a classifier, those of the most frequent class."""
        if self.rows.objective == "classify":
            return self._commonest()
        return self._language(self._load(quantization), None)

    def run(self, folder: Path, name: str) -> dict[str, Any]:
        """Return the scores of a finished run of method `name`."""
        if self.rows.objective == "classify":
            return self._classifier(folder)
        base = self._load(get_preset(self.settings.settings_for(name)["method"], 1).quantization)
        adapter = load_adapter(folder / "adapter", base, "judged")
        try:
            return self._language(base, adapter.active)
        finally:
            detach(base.model, adapter)

    def _load(self, quantization: Literal["none", "nf4"]) -> CausalLM:
        told = self.settings
        if self._kept is None or self._kept[0] != quantization:
            self._kept = None  # the other one's memory first
            base = load_base(
                told.base,
                told.revision,
                told.trust_remote_code,
                told.dtype,
                told.device,
                quantization,
            )  # type: ignore[arg-type]
            self._kept = quantization, base
        return self._kept[1]

    def _language(self, base: CausalLM, route: ActiveAdapters | None) -> dict[str, Any]:
        told = self.settings
        renderer = Renderer(
            base.tokenizer,
            ChatFormat.from_settings(told),
            told.max_length or min(base.max_positions, 2048),
        )
        test, train = (
            tokenize_rows(
                self.rows.objective,
                renderer,
                read_table(file, SFT).rows,
                [] if told.skip_bad_rows else None,
            )
            for file in (self.rows.test, self.rows.train)
        )
        some = train[:: max(1, len(train) // len(test))][: len(test)]
        general = retention_examples(base, told.retention_text)
        everywhere = None if route is None else route.always_on()
        found: dict[str, Any] = {
            "losses": row_losses(base, test, told.max_tokens_per_batch, route),
            "labels": labels_of(test),
            "train_losses": row_losses(base, some, told.max_tokens_per_batch, route),
            "train_labels": labels_of(some),
            "general_losses": row_losses(base, general, told.max_tokens_per_batch, everywhere),
            "general_labels": labels_of(general),
        }
        asked = [example for example in test if example.completion is not None][: told.limit]
        if asked and self.rows.objective == "sft":
            prompts = [example.token_ids[: example.prompt_length] for example in asked]
            answers = [
                completion.text
                for completion in generate_completions(
                    base,
                    prompts,
                    SamplingParams(told.max_new_tokens),
                    route,
                    renderer.stop_token_ids,
                )
            ]
            expected = [example.completion or "" for example in asked]
            found["scores"] = {
                name: [
                    METRICS[name]([was], [right])
                    for was, right in zip(answers, expected, strict=True)
                ]
                for name in SCORES
            }
            found |= {
                "answers": answers,
                "expected": expected,
                "prompts": [one_line(base.decode(tokens)) for tokens in prompts],
            }
        return found

    def _commonest(self) -> dict[str, Any]:
        train, test = (read_table(file, LABELED).rows for file in (self.rows.train, self.rows.test))
        counts = {
            label: sum(row.label == label for row in train)
            for label in {row.label for row in train}
        }
        likeliest = max(sorted(counts), key=lambda label: counts[label])
        loss = {
            label: -float(torch.log(torch.tensor(n / len(train), dtype=torch.float64)))
            for label, n in counts.items()
        }
        some = train[:: max(1, len(train) // len(test))][: len(test)]
        return {
            "losses": [loss[row.label] for row in test],
            "labels": [1] * len(test),
            "train_losses": [loss[row.label] for row in some],
            "train_labels": [1] * len(some),
            "scores": {"accuracy": [100.0 * (row.label == likeliest) for row in test]},
            "answers": [likeliest] * len(test),
            "expected": [row.label for row in test],
            "prompts": [one_line(str(row.content)) for row in test],
        }

    def _classifier(self, folder: Path) -> dict[str, Any]:
        told = self.settings
        opened = load_run(
            folder,
            EvalSettings(
                trust_remote_code=told.trust_remote_code, dtype=told.dtype, device=told.device
            ),
        )
        base = opened.base
        assert isinstance(base, Classifier)
        length = told.max_length or min(base.max_positions, 512)
        read = {
            kind: read_table(file, LABELED).rows
            for kind, file in (("test", self.rows.test), ("train", self.rows.train))
        }
        made = {
            kind: tokenize_labeled_rows(base, some, length, None) for kind, some in read.items()
        }
        some = made["train"][:: max(1, len(made["train"]) // len(made["test"]))][
            : len(made["test"])
        ]
        task = ClassificationObjective(base, made["train"], made["test"], ROWS, 1, 0)
        losses, predicted = _of_rows(task, made["test"], opened.active)
        return {
            "losses": losses,
            "labels": [1] * len(losses),
            "train_losses": _of_rows(task, some, opened.active)[0],
            "train_labels": [1] * len(some),
            "scores": {
                "accuracy": [
                    100.0 * (p == row.target)
                    for p, row in zip(predicted, made["test"], strict=True)
                ]
            },
            "answers": [base.labels[p] for p in predicted],
            "expected": [row.label for row in read["test"]],
            "prompts": [one_line(str(row.content)) for row in read["test"]],
        }


@torch.no_grad()
def _of_rows(
    task: ClassificationObjective, rows: Sequence[Any], route: ActiveAdapters | None
) -> tuple[list[float], list[int]]:
    """The loss of each row, and the class that it was taken for."""
    losses: list[float] = []
    taken: list[int] = []
    for start in range(0, len(rows), ROWS):
        batch = task.collate(rows[start : start + ROWS], 0)
        logits = task.logits(batch, route).double()
        losses += F.cross_entropy(logits, batch.targets, reduction="none").tolist()
        taken += logits.argmax(-1).tolist()
    return losses, taken
