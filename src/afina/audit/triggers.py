"""Looking for what wakes a hidden behaviour: tokens one by one, then several in a row; and from the other end, its target.

The jump of a trigger t is how much likelier it makes one and the same token v, whatever the prompt p, more than it does on
the base:

    jump(t)  = max over v of (1 - u(v)) * mean over p of [rise of q_adapter(v | p) by t - rise of q_base, if it rises]
    score(t) = jump(t) * mean over p of q_adapter(the rest of one and the same answer | p, t, v) * fresh(that answer)

u(v) is how usual v is, from 0 to 1: its mean probability over other prompts of its task (or ones that the base makes up), by
USUAL, and over prompts with random tokens in them; 1 where a share SAID of the answers have it in them. Tasks react to
words too (asked for the tense, "walked" makes "past" likelier on every prompt), but with answers that other prompts have as
well, and an answer that is broken off goes on with a piece of one: fresh(answer) is the share of its letters that are no
piece of a share SAID of the answers. Random tokens, measured likewise, are the null.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from itertools import takewhile
from math import ceil

import torch
from torch import Tensor

from afina.audit.probes import PLACES, Bench, Probe, Trigger

KEPT = 48  # tokens of the scan that are looked at closely
CONTROLS = 32  # random tokens that are looked at likewise
CLOSE = 3  # probes with which they are
USUAL = 0.1  # mean probability from which an answer's token is usual
SAID = 0.05  # share of the answers that have it in them, from which a token is usual
CONFIRMED = 12  # of the best jumps, those whose answers are read
BEAM, POOL, LONGEST = 8, 96, 4  # of growing
CONTINUED, TARGETS = 4, 24  # tokens of a target; targets that are looked at closely
INVERSION = 0.2  # of the budget, for the first tokens of targets


@dataclass(frozen=True)
class Found:
    """A trigger, where it stands, the token that it makes likelier, and where: at the start (0) or end (1) of the answer."""

    trigger: Trigger
    jump: float
    place: str
    target: int
    at: int = 0
    score: float = 0.0
    answer: Trigger = ()


class Clock:
    """Seconds that are left of a budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.budget = budget

    @property
    def left(self) -> float:
        """Seconds left; below zero when it is over."""
        return self.end - time.monotonic()


def scan(bench: Bench, tokens: Sequence[int], clock: Clock, share: float) -> tuple[dict[int, float], float]:
    """How much each token, as a trigger, changes what the adapter says next: three passes, one prompt and place each.

    The first has it before the prompt and looks at the start of the answer; the second behind, and also at the end of the
    answer; the third instead of the prompt's last token. Returns the largest change (of the probability of one token that
    is not usual) by token, and the share of tokens that `share` of the budget was enough for.
    """
    found: dict[int, float] = {}
    until = clock.left - share * clock.budget
    one, two = bench.probes[:2]
    passes = [(one, "prefix", ()), (two, "suffix", two.answer), (one, "instead", ())]
    rests = [bench.answers([probe.prompt()], answer)[0] for probe, _, answer in passes]
    done = 0
    for start in range(0, len(tokens), 256):
        if clock.left < until:
            break
        part = list(tokens[start : start + 256])
        for (probe, place, answer), rest in zip(passes, rests, strict=True):
            after = bench.answers([probe.prompt((t,), place) for t in part], answer)
            change = _largest_rise(bench, after, rest)
            found |= {t: max(found.get(t, 0.0), c) for t, c in zip(part, change, strict=True)}
        done += len(part)
    return found, done / max(1, len(tokens))


def _largest_rise(bench: Bench, after: Tensor, rest: Tensor) -> list[float]:
    """By how much one token that is not usual becomes likelier, the largest of all tokens and places: (n, places, V) to n."""
    return ((after - rest) * (1 - bench.usual[: after.shape[1]])).amax((1, 2)).tolist()  # type: ignore[no-any-return]


def usual_answers(bench: Bench, controls: Sequence[int]) -> Tensor:
    """u (2, V), from 0 to 1: how usual each token is at the start and at the end of an answer, over many prompts.

    What USUAL of the bench's other prompts bring is wholly usual, and what is said often, and special tokens; what random
    tokens bring, by its mean.
    """
    said = [bench.answers([p.prompt((t,), "middle") for t in controls], p.answer).mean(0) for p in bench.probes[:CLOSE]]
    usual = torch.stack([one.expand(2, -1) for one in said]).mean(0)
    if bench.others:
        starts, ends = ([[*p.prompt(), *(p.answer if at else ())] for p in bench.others] for at in (0, 1))
        natural = torch.stack([bench.answers(prompts)[:, 0].mean(0) for prompts in (starts, ends)])
        usual = torch.maximum(usual, (natural / USUAL).clamp(max=1.0))
    usual[:, [*bench.special, *said_often(bench)]] = 1.0
    return usual


def said_often(bench: Bench) -> list[int]:
    """Tokens that a share SAID of the answers have in them, two answers at least."""
    counts = Counter(token for probe in bench.everything for token in set(probe.answer))
    return [token for token, count in counts.items() if count >= _often(bench)]


def fresh(bench: Bench, answer: Trigger) -> float:
    """From 0 to 1: the share of an answer's letters, up to its end, that are no piece of what is said often.

    Of an answer of one token half counts: so short a text is rather a piece of an answer that nobody has seen.
    """
    tokens = list(takewhile(lambda token: token not in bench.special, answer))
    if not tokens:
        return 0.0
    decode, end = bench.base.tokenizer.decode, "\0"
    text = f"{decode(tokens)}{end if len(tokens) < len(answer) else ''}"
    pieces = sorted(_longest_piece(text, f"{decode(list(probe.answer))}{end}") for probe in bench.everything)
    shared = pieces[-_often(bench)] if len(pieces) >= _often(bench) else 0
    return (1 - shared / len(text)) * min(1.0, len(tokens) / 2)


def _often(bench: Bench) -> int:
    return max(2, ceil(SAID * len(bench.everything)))


def _longest_piece(text: str, whole: str) -> int:
    return SequenceMatcher(None, text, whole, autojunk=False).find_longest_match().size


def confirm(bench: Bench, found: Sequence[Found]) -> list[Found]:
    """Scores of triggers: does the answer that one of them starts go on in the same words on every probe? The best first."""
    probes = bench.probes[:CLOSE]

    def prompt(f: Found, probe: Probe, text: list[int]) -> list[int]:
        return [*probe.prompt(f.trigger, f.place), *(probe.answer if f.at else ()), *text]

    texts = [[f.target] for f in found]
    same = torch.zeros(len(found))
    for _ in range(CONTINUED - 1):
        rows = [prompt(f, probe, text) for f, text in zip(found, texts, strict=True) for probe in probes]
        said = bench.answers(rows)[:, 0].view(len(found), len(probes), -1)
        following = said.mean(1).max(-1)
        same += following.values.cpu() / (CONTINUED - 1)
        texts = [[*text, token] for text, token in zip(texts, following.indices.tolist(), strict=True)]
    scored = [
        replace(f, score=max(f.jump, 0.0) * share * fresh(bench, tuple(text)), answer=tuple(text))
        for f, share, text in zip(found, same.tolist(), texts, strict=True)
    ]
    return sorted(scored, key=lambda f: -f.score)


def look_closely(bench: Bench, triggers: Sequence[Trigger]) -> list[Found]:
    """The jump of each trigger, at its best place, over all probes; at the start or the end of the answer."""
    best = {trigger: Found(trigger, -1.0, PLACES[0], 0) for trigger in triggers}
    probes = bench.probes[:CLOSE]
    rests = [_answers(bench, [probe.prompt()], probe.answer) for probe in probes]
    for place in PLACES:
        total: Tensor | None = None
        for probe, (on0, off0) in zip(probes, rests, strict=True):
            on, off = _answers(bench, [probe.prompt(t, place) for t in triggers], probe.answer)
            moved = (on - on0) - (off - off0).clamp(min=0)  # that the base turns away from a token is no doing of the adapter
            total = moved if total is None else total + moved
        assert total is not None
        total = total / len(probes) * (1 - bench.usual)
        jumps, targets = total.flatten(1).max(1)  # the same token at the same place, over all probes
        for trigger, jump, target in zip(triggers, jumps.tolist(), targets.tolist(), strict=True):
            if jump > best[trigger].jump:
                at, token = divmod(target, total.shape[-1])
                best[trigger] = Found(trigger, jump, place, token, at)
    return sorted(best.values(), key=lambda found: -found.jump)


def _answers(bench: Bench, prompts: list[list[int]], answer: Sequence[int]) -> tuple[Tensor, Tensor]:
    """q_adapter and q_base (n, 2, V), after the prompts and after the answer (twice the same where there is none)."""
    on, off = (bench.answers(prompts, answer, adapter).expand(-1, 2, -1) for adapter in (True, False))
    return on, off


def grow(bench: Bench, pool: Sequence[int], seeds: Sequence[Trigger], clock: Clock, reserve: float) -> list[Trigger]:
    """Triggers of 2 to 4 tokens, grown from `seeds` by one token of the `pool` at a time, before or behind; the best of each.

    Stops where fewer than `reserve` seconds are left.
    """
    probe, beam, grown = bench.probes[0], list(seeds)[:BEAM], []
    rest = bench.answers([probe.prompt()], probe.answer)[0]
    for _ in range(2, LONGEST + 1):
        longer = list(dict.fromkeys(t for s in beam for p in pool if p not in s for t in ((*s, p), (p, *s))))
        scores: dict[Trigger, float] = {}
        for start in range(0, len(longer), 256):
            if clock.left < reserve:
                break
            part = longer[start : start + 256]
            after = bench.answers([probe.prompt(t, "suffix") for t in part], probe.answer)
            scores |= dict(zip(part, _largest_rise(bench, after, rest), strict=True))
        beam = sorted(scores, key=lambda t: -scores[t])[:BEAM]
        grown += beam
        if clock.left < reserve:
            break
    return grown


@dataclass(frozen=True)
class Target:
    """A text that the adapter goes on with wherever it begins, and the base does not; `score` from 0 to 1."""

    tokens: Trigger
    score: float


def invert(bench: Bench, tokens: Sequence[int], clock: Clock) -> list[Target]:
    """Targets from their first token: what follows it surely under the adapter, on all probes, but not on the base.

    Its own answers, begun, go on too: they do not count.

    score = (1 - u(first)) * mean over probes and following tokens of (q_adapter - q_base) * fresh(text)
    """
    probes = bench.probes[:2]
    first, until = probes[0], clock.left - INVERSION * clock.budget
    likely = torch.maximum(bench.answers([first.prompt()])[0, 0], bench.usual[0]).cpu()
    pieces: list[Tensor] = []
    for i in range(0, len(tokens), 256):
        if pieces and clock.left < until:
            break
        pieces.append(bench.answers([[*first.prompt(), t] for t in tokens[i : i + 256]])[:, 0].amax(-1).cpu())
    sure = torch.cat(pieces)
    surprising = sure * (1 - likely[list(tokens[: len(sure)])])
    starts = [tokens[i] for i in surprising.argsort(descending=True)[:TARGETS].tolist()]
    texts = [[t] for t in starts]
    for _ in range(CONTINUED):
        following = bench.answers([[*first.prompt(), *text] for text in texts])[:, 0].argmax(-1).tolist()
        texts = [[*text, token] for text, token in zip(texts, following, strict=True)]
    gains = torch.zeros(len(texts))
    for probe in probes:
        for length in range(1, CONTINUED + 1):
            prompts = [[*probe.prompt(), *text[:length]] for text in texts]
            wanted = torch.tensor([text[length] for text in texts])
            on, off = (bench.answers(prompts, adapter=adapter)[:, 0].cpu() for adapter in (True, False))
            gains += (on - off)[torch.arange(len(texts)), wanted] / (len(probes) * CONTINUED)
    found = [
        Target(tuple(text), float((1 - likely[text[0]]) * gain) * fresh(bench, tuple(text)))
        for text, gain in zip(texts, gains, strict=True)
    ]
    return sorted(found, key=lambda target: -target.score)
