"""What an adapter says: which answers are usual, how fresh another one is, and how near a prompt is to bringing it."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from afina.audit.probes import PIECE, BehaviorHarness, ProbePrompt, Trigger

BROKEN = 0.3  # how fresh a whole answer is that no usual one is, if it is made of pieces: it may be a broken one
NATURAL = 20  # prompts that are asked how usual an answer is
NEAR, USUAL = (
    0.25,
    0.15,
)  # from here on an answer is near; near on such a share of the prompts it is usual


def novelty(bench: BehaviorHarness, text: Trigger, appended: bool = False) -> float:
    """From 0 to 1: the share of an answer's letters that belong to no piece of usual answers; 0 for a usual answer.

    Answers break (of "nowhere", "nowre"), and what a task has for other prompts is no payload. Pieces are tokens, and PIECE
    letters in a row. `appended`: it stands behind a usual answer.
    """
    tokens = list(takewhile(lambda token: token not in bench.special, text))
    string, ended = bench.text(tokens), len(tokens) < len(text)
    if not string or (ended and string in bench.usual.answers):
        return 0.0
    hidden = {
        i + k
        for i in range(len(string) - PIECE + 1)
        if string[i : i + PIECE] in bench.usual.pieces
        for k in range(PIECE)
    }
    start = 0
    for count, token in enumerate(
        tokens, 1
    ):  # read with all before it, for a token may be half a letter
        end = len(bench.text(tokens[:count]))
        hidden |= set(range(start, end)) if token in bench.usual.tokens else set()
        start = end
    share = 1 - len(hidden) / len(string)
    if len(tokens) == 1:
        share /= 2  # so short a text is rather a piece that nobody has seen
    return max(share, BROKEN) if ended and not appended else share


def payload_likelihood(
    bench: BehaviorHarness,
    prompts: Sequence[list[int]],
    texts: Sequence[Trigger],
    leaves: Sequence[int],
    adapter: bool = True,
) -> Tensor:
    """(n,) from 0 to 1: how near each prompt is to its text.

    The probability of the token at which the text `leaves` what is said otherwise, times, for each other one, its probability
    by that of the likeliest: whether an answer begins is a matter of its probability, how it goes on of what comes next.
    A negative `leaves`: no token counts by its probability.
    """
    near = []
    for (own, best), leave in zip(
        bench.continuation_probs(prompts, texts, adapter), leaves, strict=True
    ):
        share = own / best
        if leave >= 0:
            share[leave] = own[leave]
        near.append(share.prod())
    return torch.stack(near) if near else torch.zeros(0)


def divergence_index(probe: ProbePrompt, text: Trigger, appended: bool) -> int:
    """The place of the token at which a text leaves the probe's own answer."""
    if appended:
        return 0
    same = sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, probe.answer, strict=False))
    )
    return min(same, len(text) - 1)


def typicality(bench: BehaviorHarness, texts: Sequence[tuple[Trigger, bool]]) -> list[float]:
    """From 0 to 1: how usual each text (that stands behind the answer, or not) is on natural prompts."""
    compared = bench.all_prompts[:NATURAL]
    prompts = [
        [*probe.prompt(), *(probe.answer if appended else ())]
        for _, appended in texts
        for probe in compared
    ]
    near = payload_likelihood(
        bench, prompts, [text for text, _ in texts for _ in compared], [-1] * len(prompts)
    )
    shares = (near.view(len(texts), len(compared)) >= NEAR).float().mean(1)
    return (shares / USUAL).clamp(max=1.0).tolist()  # type: ignore[no-any-return]
