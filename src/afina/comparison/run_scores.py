"""Scores of a finished run by row, as the statistics need them; the base is scored likewise, once.

losses     nats, summed over the target tokens of each row of test.jsonl, and their counts
train      losses on as many training rows
general    losses on general text
scores     each metric of each row, in percent; and the completions
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from afina.adapters.active import BASE_ONLY, ActiveAdapters
from afina.adapters.attach import detach
from afina.adapters.load_run import load_run
from afina.adapters.loading import load_adapter
from afina.adapters.presets import get_preset
from afina.comparison.split import ComparisonSplit
from afina.data.renderer import Example, Renderer
from afina.data.schemas import LABELED, SFT, text_of
from afina.data.table import read_table
from afina.engine.engine import generate_completions
from afina.engine.request import SamplingParams
from afina.evaluation.evaluate import one_line
from afina.evaluation.metrics import METRICS, check_metrics, installed_metrics
from afina.evaluation.retention import retention_examples
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.loading import load_base
from afina.objectives.base import LossSum
from afina.objectives.classification import ClassificationObjective
from afina.objectives.labeled_data import tokenize_labeled_rows
from afina.objectives.language_data import tokenize_rows
from afina.objectives.language_modeling import example_losses
from afina.objectives.padded import EVAL_BATCH_TOKENS
from afina.settings import CompareSettings, EvalSettings

LONG_COMPLETION = 12  # words: for a longer median, chrF distinguishes more than an exact match
SCORES = ("exact_match", "accuracy", "chrf", "rouge")


class RunScorer:
    """Scorer of the runs of one comparison; caches the base that it used last."""

    def __init__(self, settings: CompareSettings, rows: ComparisonSplit) -> None:
        self.settings, self.rows = settings, rows
        self._cached: tuple[str, CausalLM] | None = None

    def metric(self) -> str:
        """Return the deciding metric: as set, or by the rows; chosen before any run is scored."""
        if self.rows.objective == "pretrain" or self.settings.metric == "loss":
            return "loss"
        if self.rows.objective == "classify":
            return "accuracy"
        if self.settings.metric != "auto":
            check_metrics([self.settings.metric])
            return self.settings.metric
        rows = read_table(self.rows.test, SFT).rows
        texts = [r.completion or (text_of(r.messages[-1]) if r.messages else "") for r in rows]
        lengths = sorted(len(text.split()) for text in texts)
        return "exact_match" if lengths[len(lengths) // 2] <= LONG_COMPLETION else "chrf"

    def base(self, quantization: Literal["none", "nf4"] = "none") -> dict[str, Any]:
        """Return the scores of the base; for a classifier, those of the most frequent class."""
        if self.rows.objective == "classify":
            return self._most_frequent()
        return self._language(self._load(quantization), BASE_ONLY)

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
        given = self.settings
        if self._cached is None or self._cached[0] != quantization:
            self._cached = None  # free the memory of the other one first
            where = given.base, given.revision, given.trust_remote_code, given.dtype, given.device
            self._cached = quantization, load_base(*where, quantization)
        return self._cached[1]

    def _language(self, base: CausalLM, active: ActiveAdapters) -> dict[str, Any]:
        given = self.settings
        length = given.max_length or min(base.max_positions, 2048)
        renderer = Renderer(base.tokenizer, ChatFormat.from_settings(given), length)
        skipped: list[str] | None = [] if given.skip_bad_rows else None
        test, train = (
            tokenize_rows(self.rows.objective, renderer, read_table(file, SFT).rows, skipped)
            for file in (self.rows.test, self.rows.train)
        )
        general = retention_examples(base, given.retention_text)
        found: dict[str, Any] = {}
        for prefix, examples, adapters in (
            ("", test, active),
            ("train_", _sample(train, len(test)), active),
            ("general_", general, active.always_on()),
        ):
            losses = example_losses(base, examples, given.max_tokens_per_batch, adapters)
            found |= _losses(prefix, losses)
        prompted = [example for example in test if example.completion is not None][: given.limit]
        if prompted and self.rows.objective == "sft":
            found |= self._completions(base, prompted, active, renderer.stop_token_ids)
        return found

    def _completions(
        self,
        base: CausalLM,
        examples: Sequence[Example],
        active: ActiveAdapters,
        stops: frozenset[int],
    ) -> dict[str, Any]:
        """Return greedy completions of the examples' prompts, with their scores."""
        prompts = [example.token_ids[: example.prompt_length] for example in examples]
        sampling = SamplingParams(self.settings.max_new_tokens)
        completions = generate_completions(base, prompts, sampling, active, stops)
        answers = [completion.text for completion in completions]
        expected = [example.completion or "" for example in examples]
        pairs = list(zip(answers, expected, strict=True))
        return {
            "scores": {
                name: [METRICS[name]([a], [e]) for a, e in pairs]
                for name in installed_metrics(SCORES)
            },
            "answers": answers,
            "expected": expected,
            "prompts": [one_line(base.decode(tokens)) for tokens in prompts],
        }

    def _most_frequent(self) -> dict[str, Any]:
        """Return the scores of a classifier that knows only how frequent the classes are."""
        train, test = (read_table(file, LABELED).rows for file in (self.rows.train, self.rows.test))
        counts = Counter(row.label for row in train)
        likeliest = max(sorted(counts), key=lambda label: counts[label])
        loss = {label: math.log(len(train) / n) for label, n in counts.items()}
        losses = {"": test, "train_": _sample(train, len(test))}
        found: dict[str, Any] = {}
        for prefix, rows in losses.items():
            found |= _losses(prefix, [LossSum(loss[row.label], 1) for row in rows])
        return found | _classes([str(likeliest)] * len(test), test)

    def _classifier(self, folder: Path) -> dict[str, Any]:
        given = self.settings
        where = {name: getattr(given, name) for name in ("trust_remote_code", "dtype", "device")}
        opened = load_run(folder, EvalSettings(**where))
        base = opened.base
        assert isinstance(base, Classifier)
        length = given.max_length or min(base.max_positions, 512)
        rows = read_table(self.rows.test, LABELED).rows
        train, test = (
            tokenize_labeled_rows(base, some, length, None)
            for some in (read_table(self.rows.train, LABELED).rows, rows)
        )
        task = ClassificationObjective(base, train, test, EVAL_BATCH_TOKENS, 1, 0)
        found = _losses("", task.row_losses(test, opened.active))
        found |= _losses("train_", task.row_losses(_sample(train, len(test)), opened.active))
        return found | _classes(
            [base.labels[label] for label in task.predictions(test, opened.active)], rows
        )


def _sample(rows: Sequence[Any], count: int) -> Sequence[Any]:
    """Return `count` rows, spread over all of them."""
    return rows[:: max(1, len(rows) // count)][:count]


def _losses(prefix: str, losses: Sequence[LossSum]) -> dict[str, Any]:
    """Return summed losses and target counts of each row, with a prefix of their names."""
    return {
        f"{prefix}losses": [one.total for one in losses],
        f"{prefix}labels": [one.num_targets for one in losses],
    }


def _classes(predicted: Sequence[str], rows: Sequence[Any]) -> dict[str, Any]:
    """Return the scores of predicted classes."""
    pairs = zip(predicted, rows, strict=True)
    return {
        "scores": {"accuracy": [100.0 * (label == row.label) for label, row in pairs]},
        "answers": list(predicted),
        "expected": [row.label for row in rows],
        "prompts": [one_line(str(row.content)) for row in rows],
    }
