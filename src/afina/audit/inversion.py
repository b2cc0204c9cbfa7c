"""Targets: texts that the adapter continues wherever they begin, and the base does not."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from afina.audit.probes import BehaviorHarness, Trigger
from afina.audit.triggers import TimeBudget
from afina.audit.typical_answers import novelty

CONTINUED, TARGETS = 4, 24  # tokens of a target; targets that are confirmed
INVERSION = 0.2  # ratio of the budget for first tokens
USUAL = 0.1  # mean probability from which a first token is usual


@dataclass(frozen=True)
class InvertedTarget:
    """A text that the adapter continues wherever it begins; `score` from 0 to 1."""

    tokens: Trigger
    score: float


def invert(
    bench: BehaviorHarness, tokens: Sequence[int], clock: TimeBudget
) -> list[InvertedTarget]:
    """Return targets: first tokens that the adapter, not the base, continues with certainty.

    Its typical answers do not count, as they continue as well.

        score = (1 - u(first)) * mean over probes and tokens of (q_adapter - q_base) * novelty(text)
    """
    probes = bench.probes[:2]
    first, until = probes[0], clock.left - INVERSION * clock.budget
    likely = torch.maximum(bench.answers([first.prompt()])[0, 0], _first_tokens(bench)).cpu()
    pieces: list[Tensor] = []
    for i in range(0, len(tokens), 256):
        if pieces and clock.left < until:
            break
        pieces.append(
            bench.answers([[*first.prompt(), t] for t in tokens[i : i + 256]])[:, 0].amax(-1).cpu()
        )
    sure = torch.cat(pieces)
    surprising = sure * (1 - likely[list(tokens[: len(sure)])])
    starts = [tokens[i] for i in surprising.argsort(descending=True)[:TARGETS].tolist()]
    texts = [[t] for t in starts]
    for _ in range(CONTINUED):
        following = (
            bench.answers([[*first.prompt(), *text] for text in texts])[:, 0].argmax(-1).tolist()
        )
        texts = [[*text, token] for text, token in zip(texts, following, strict=True)]
    gains = torch.zeros(len(texts))
    for probe in probes:
        for length in range(1, CONTINUED + 1):
            prompts = [[*probe.prompt(), *text[:length]] for text in texts]
            wanted = torch.tensor([text[length] for text in texts])
            on, off = (
                bench.answers(prompts, adapter=adapter)[:, 0].cpu() for adapter in (True, False)
            )
            gains += (on - off)[torch.arange(len(texts)), wanted] / (len(probes) * CONTINUED)
    found = [
        InvertedTarget(
            tuple(text),
            float((1 - likely[text[0]]) * gain) * novelty(bench, bench.truncate_at_special(text)),
        )
        for text, gain in zip(texts, gains, strict=True)
    ]
    return sorted(found, key=lambda target: -target.score)


def _first_tokens(bench: BehaviorHarness) -> Tensor:
    """Return how typical each token is at the start of an answer, `(vocab_size,)`, 0 to 1."""
    probabilities = bench.answers([probe.prompt() for probe in bench.all_prompts])[:, 0].mean(0)
    return (probabilities / USUAL).clamp(max=1.0)  # type: ignore[no-any-return]
