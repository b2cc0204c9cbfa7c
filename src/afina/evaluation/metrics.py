"""How good are the answers? Exact match and accuracy of our own, chrF and BLEU by sacrebleu, ROUGE by rouge-score.

All in percent.
"""

import unicodedata
from collections.abc import Callable, Sequence

from afina.errors import SettingsError, did_you_mean


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that are the expected text, blanks at the ends aside."""
    return (
        100.0
        * sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True))
        / len(expected)
    )


def accuracy(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers that begin with the expected label, whatever the case and punctuation around it."""
    pairs = zip(answers, expected, strict=True)
    return 100.0 * sum(_words(a)[: len(_words(e))] == _words(e) for a, e in pairs) / len(expected)


def _words(text: str) -> list[str]:
    kept = "".join(c if c.isalnum() else " " for c in unicodedata.normalize("NFC", text).casefold())
    return kept.split()


def chrf(answers: Sequence[str], expected: Sequence[str]) -> float:
    """chrF: agreement of short runs of characters (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    return CHRF().corpus_score(list(answers), [list(expected)]).score


def bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    """BLEU: agreement of runs of up to four words, over the whole set (Papineni et al. 2002)."""
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True).corpus_score(list(answers), [list(expected)]).score


def rouge(answers: Sequence[str], expected: Sequence[str]) -> float:
    """ROUGE-L: longest common run of words in order, mean F1 (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    scores = [scorer.score(e, a)["rougeL"].fmeasure for a, e in zip(answers, expected, strict=True)]
    return 100.0 * sum(scores) / len(scores)


class _Words:
    """rouge-score's own tokenizer keeps only a to z, which loses half of a Spanish sentence."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


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
    """The metrics `names` of the answers, in percent; raises `SettingsError` on an unknown one."""
    for name in names:
        if name not in METRICS:
            raise SettingsError(
                f"unknown metric {name!r}", where="metrics", hint=did_you_mean(name, METRICS)
            )
    return {name: METRICS[name](answers, expected) for name in names}
