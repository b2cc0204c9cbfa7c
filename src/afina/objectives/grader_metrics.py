"""Similarity of two texts, 0 to 1, under the names of OpenAI's `text_similarity` graders."""

from collections.abc import Callable
from functools import partial

from afina.evaluation.metrics import rouge_f1
from afina.io.extras import import_extra


def fuzzy_match(text: str, reference: str) -> float:
    """Return the similarity by edit distance."""
    fuzz = import_extra("rapidfuzz.fuzz", "graders")
    return float(fuzz.ratio(text, reference)) / 100.0


def bleu(text: str, reference: str) -> float:
    """Return BLEU of one text."""
    from sacrebleu import sentence_bleu

    return sentence_bleu(text, [reference]).score / 100.0


def gleu(text: str, reference: str) -> float:
    """Return GLEU (Wu et al. 2016) of one text; 0 where one of them has no word."""
    gleu_score = import_extra("nltk.translate.gleu_score", "graders")
    if not text.split() or not reference.split():
        return 0.0
    return float(gleu_score.sentence_gleu([reference.split()], text.split()))


TEXT_SIMILARITIES: dict[str, Callable[[str, str], float]] = {
    "fuzzy_match": fuzzy_match,
    "bleu": bleu,
    "gleu": gleu,
    **{f"rouge_{n}": partial(rouge_f1, f"rouge{n}") for n in range(1, 6)},
    "rouge_l": partial(rouge_f1, "rougeL"),
}
