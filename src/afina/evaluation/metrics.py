"""Metrics of completions, in percent.

Exact match and accuracy are computed here, chrF and BLEU by sacrebleu, ROUGE by rouge-score.
"""

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from afina.errors import SettingsError, did_you_mean
from afina.io.extras import import_extra


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the percentage of answers that equal the expected text, without outer whitespace."""
    pairs = zip(answers, expected, strict=True)
    return 100.0 * sum(a.strip() == e.strip() for a, e in pairs) / len(expected)


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the percentage of answers that begin with the expected label.

    Case and punctuation are ignored.
    """
    pairs = zip(answers, expected, strict=True)
    return 100.0 * sum(_words(a)[: len(_words(e))] == _words(e) for a, e in pairs) / len(expected)


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return chrF: agreement of character n-grams (Popović 2015)."""
    score: float = _chrf_scorer().corpus_score(list(answers), [list(expected)]).score
    return score


def sentence_chrf(answer: str, expected: str) -> float:
    """Return chrF of one answer."""
    return _chrf_scorer().sentence_score(answer, [expected]).score  # type: ignore[no-any-return]


@lru_cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return corpus BLEU: agreement of n-grams of up to four words (Papineni et al. 2002)."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).corpus_score(list(answers), [list(expected)]).score


def rouge(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Return the mean F1 of ROUGE-L: the longest common subsequence of words (Lin 2004)."""
    scores = [rouge_f1("rougeL", a, e) for a, e in zip(answers, expected, strict=True)]
    return 100.0 * sum(scores) / len(scores)


def rouge_f1(kind: str, text: str, reference: str) -> float:
    """Return F1 (0 to 1) of "rouge1" to "rouge9" or "rougeL" of one text."""
    return float(_rouge_scorer(kind).score(reference, text)[kind].fmeasure)


@lru_cache
def _rouge_scorer(kind: str) -> Any:
    rouge_scorer = import_extra("rouge_score.rouge_scorer", "graders")
    return rouge_scorer.RougeScorer([kind], tokenizer=_WordTokenizer())


class _WordTokenizer:
    """Words of any alphabet; rouge-score's own tokenizer keeps only a to z."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    kept = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFC", text).casefold())
    return kept.split()


METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "exact_match": exact_match,
    "accuracy": accuracy,
    "chrf": chrf,
    "bleu": bleu,
    "rouge": rouge,
}


def compute_metrics(
    names: Sequence[str], answers: Sequence[str], expected: Sequence[str]
) -> dict[str, float]:
    """Return the metrics `names` of the answers, in percent; `check_metrics` checks the names."""
    return {name: METRICS[name](answers, expected) for name in names}


def check_metrics(names: Sequence[str]) -> None:
    """Check the names of metrics before answers are generated.

    Raises:
        SettingsError: A name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in METRICS:
            raise SettingsError(
                f"unknown metric {name!r}", where="metrics", hint=did_you_mean(name, METRICS)
            )
        METRICS[name](["a word"], ["a word"])  # imports what it needs


def installed_metrics(names: Sequence[str]) -> list[str]:
    """Return those of `names` whose packages are installed."""
    return [name for name in names if name != "rouge" or find_spec("rouge_score") is not None]
