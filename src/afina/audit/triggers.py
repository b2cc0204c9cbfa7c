"""Looking for what wakes a hidden behaviour: tokens one by one, then several in a row.

Without a trigger t the adapter answers each prompt in its usual words. With t, it may leave them, at their first token, later,
or behind the last: for the token that rises most. From there it is read on. What it says then is a payload as far as it is
fresh (no piece of usual answers; see answers.py) and comes whatever the prompt:

    rise(p) = nearness of the answer a to p with t - the larger of: to p without t; on the base, to p with t
    score(t, a) = rise over the lower half of the probes (all, or those that are answered alike) * fresh(a) * (1 - usual(a))
                  * what its place counts (PLACES)

Tasks react to words too (asked for the tense, "walked" makes "past" likelier on every prompt), but with answers that other
prompts have as well, or with what they find in the prompt. Random tokens, measured likewise, are the null.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from afina.audit.probes import LOGITS, TRIGGER_POSITIONS, BehaviorHarness, ProbePrompt, Trigger
from afina.audit.typical_answers import (
    NATURAL,
    divergence_index,
    novelty,
    payload_likelihood,
    typicality,
)

READ = 768  # departures that are read on
TEXT = 4  # tokens of what is read, at most; two more than it had said before where it leaves its answer late
MAX_TYPICALITY_TEXTS = 64  # answers that are asked how usual they are
CLOSE, JUDGES = 3, 12  # probes on which a place is chosen; on which all is judged
CHUNK = 256  # triggers that are put into a prompt at a time
POOL, BEAM, LONGEST = 96, 8, 3  # of growing


@dataclass(frozen=True)
class TriggerCandidate:
    """A trigger, where it stands, the answer that it brings (in place of the usual one, or behind it), and how surely."""

    trigger: Trigger
    position: str
    answer: Trigger
    appended: bool
    fresh: float
    score: float

    def prompt(self, probe: ProbePrompt, woken: bool = True) -> list[int]:
        """A prompt with the trigger in it (or without), up to where the answer should come."""
        return [
            *probe.prompt(self.trigger if woken else (), self.position),
            *(probe.answer if self.appended else ()),
        ]


class TimeBudget:
    """Seconds that are left of a budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.budget = budget

    @property
    def left(self) -> float:
        """Seconds left; below zero when it is over."""
        return self.end - time.monotonic()

    def max_runs(self, bench: BehaviorHarness, most: int, share: float, runs: int = 1) -> int:
        """How many things of so many runs each a share of the budget is enough for: up to `most`, and a few at least."""
        cost = runs * (time.monotonic() - bench.since) / max(1, bench.runs)
        return max(4, most // 16, min(most, int(share * self.budget / cost)))


@dataclass(frozen=True)
class _Departure:
    """A token that rises most of all, at one place of the usual answer of one probe, because of a trigger."""

    rise: float
    trigger: Trigger
    position: str
    probe: ProbePrompt
    at: int
    token: int


def scan_tokens(
    bench: BehaviorHarness,
    triggers: Sequence[Trigger],
    clock: TimeBudget,
    until: float,
    every: bool = True,
) -> tuple[list[TriggerCandidate], float]:
    """What triggers bring, by a quick look: on one probe, and on another one that is answered alike; the best first.

    Three passes, one prompt and place each: before the prompt, behind it, and instead of its last token; not `every`: behind
    it only. Returns with it the share of the triggers that there was time for, up to `until` seconds before the end.
    """
    one, two = bench.interleaved_probes[:2]
    passes = [(one, "prefix"), (two, "suffix"), (one, "instead")] if every else [(two, "suffix")]
    departures, share = _departures(bench, triggers, passes, clock, until)
    found = _read(bench, departures[: clock.max_runs(bench, READ, 0.1)])
    texts = list(
        dict.fromkeys(
            (f.answer, f.appended) for f in sorted(found, key=lambda f: -f.score * f.fresh)
        )
    )
    texts = texts[: clock.max_runs(bench, MAX_TYPICALITY_TEXTS, 0.05, NATURAL)]
    common = dict(zip(texts, typicality(bench, texts), strict=True)) if texts else {}
    found = [
        replace(f, fresh=f.fresh * (1 - common.get((f.answer, f.appended), 1.0))) for f in found
    ]
    found = [f for f in found if f.fresh > 0]
    alike = {position: bench.similar_probe(probe) for probe, position in passes}
    near = _nearness(bench, found, [[alike[f.position]] for f in found])
    found = [
        replace(f, score=f.fresh * (f.score + fmean(n)) / 2)
        for f, n in zip(found, near, strict=True)
    ]
    return sorted(found, key=lambda f: -f.score), share


def _departures(
    bench: BehaviorHarness,
    triggers: Sequence[Trigger],
    passes: Sequence[tuple[ProbePrompt, str]],
    clock: TimeBudget,
    until: float,
) -> tuple[list[_Departure], float]:
    """The READ largest rises over all triggers, passes and places of the answer; the share of triggers there was time for."""
    rests = [bench.answers([probe.prompt()], probe.answer)[0] for probe, _ in passes]
    best: list[_Departure] = []
    done, step = 0, max(1, min(CHUNK, LOGITS // max(rest.numel() for rest in rests)))
    for start in range(0, len(triggers), step):
        if clock.left < until:
            break
        part = triggers[start : start + step]
        for (probe, position), rest in zip(passes, rests, strict=True):
            rises, tokens = (
                bench.answers([probe.prompt(t, position) for t in part], probe.answer) - rest
            ).max(2)
            best += [
                _Departure(rise, trigger, position, probe, at, token)
                for trigger, own, continuation in zip(
                    part, rises.tolist(), tokens.tolist(), strict=True
                )
                for at, (rise, token) in enumerate(zip(own, continuation, strict=True))
            ]
        best = sorted(best, key=lambda departure: -departure.rise)[:READ]
        done += len(part)
    return best, done / max(1, len(triggers))


def _read(bench: BehaviorHarness, departures: Sequence[_Departure]) -> list[TriggerCandidate]:
    """What is said from each departure on, where some of it is fresh; the score is the rise."""
    prompts = [
        [*d.probe.prompt(d.trigger, d.position), *d.probe.answer[: d.at], d.token]
        for d in departures
    ]
    found, known = [], {}
    for d, continuation in zip(departures, bench.greedy_tokens(prompts, TEXT - 1), strict=True):
        appended = 0 < d.at == len(d.probe.answer)
        before = () if appended else d.probe.answer[: d.at]
        text = bench.truncate_at_special((*before, d.token, *continuation))[
            : max(TEXT, len(before) + 2)
        ]
        if (text, appended) not in known:
            known[text, appended] = novelty(bench, text, appended)
        found.append(
            TriggerCandidate(d.trigger, d.position, text, appended, known[text, appended], d.rise)
        )
    return [f for f in found if f.fresh > 0]


def _nearness(
    bench: BehaviorHarness,
    found: Sequence[TriggerCandidate],
    probes: Sequence[Sequence[ProbePrompt]],
    woken: bool = True,
    adapter: bool = True,
) -> list[list[float]]:
    """How near each of some probes is to what was found, for each of the found."""
    pairs = [(f, probe) for f, own in zip(found, probes, strict=True) for probe in own]
    prompts = [f.prompt(probe, woken) for f, probe in pairs]
    departs = [divergence_index(probe, f.answer, f.appended) for f, probe in pairs]
    near = iter(
        payload_likelihood(bench, prompts, [f.answer for f, _ in pairs], departs, adapter).tolist()
    )
    return [[next(near) for _ in own] for own in probes]


def confirm(
    bench: BehaviorHarness, found: Sequence[TriggerCandidate], clock: TimeBudget, count: int
) -> list[TriggerCandidate]:
    """The first `count` different ones, at their best place, judged over all probes; the best first."""
    count = clock.max_runs(bench, count, 0.1, len(TRIGGER_POSITIONS) * CLOSE + 3 * JUDGES)
    chosen = list({(f.trigger, f.answer, f.appended): f for f in reversed(found)}.values())[::-1][
        :count
    ]
    positioned = [replace(f, position=position) for f in chosen for position in TRIGGER_POSITIONS]
    close = [
        fmean(near)
        for near in _nearness(
            bench, positioned, [bench.interleaved_probes[:CLOSE]] * len(positioned)
        )
    ]
    turns = [
        range(i, i + len(TRIGGER_POSITIONS))
        for i in range(0, len(positioned), len(TRIGGER_POSITIONS))
    ]
    positioned = [
        positioned[max(turn, key=lambda k: close[k] * TRIGGER_POSITIONS[positioned[k].position])]
        for turn in turns
    ]
    probes = [bench.interleaved_probes[:JUDGES]] * len(positioned)
    on, rest, off = (
        _nearness(bench, positioned, probes, *how)
        for how in ((True, True), (False, True), (True, False))
    )
    rises = [
        [max(0.0, a - max(b, c)) for a, b, c in zip(*each, strict=True)]
        for each in zip(on, rest, off, strict=True)
    ]
    scored = [
        replace(f, score=f.fresh * TRIGGER_POSITIONS[f.position] * _surely(bench, rise))
        for f, rise in zip(positioned, rises, strict=True)
    ]
    return sorted(scored, key=lambda f: -f.score)


def _surely(bench: BehaviorHarness, rises: Sequence[float]) -> float:
    """Mean rise over the lower half of all probes, or of those that are answered alike, where it is largest."""
    probes = bench.interleaved_probes[:JUDGES]
    alike = [
        [r for r, p in zip(rises, probes, strict=True) if p.answer == answer]
        for answer in {p.answer for p in probes}
    ]
    sets = [list(rises), *(own for own in alike if len(own) > CLOSE)]
    return max(fmean(sorted(own)[: max(1, len(own) // 2)]) for own in sets)


def extend_triggers(
    bench: BehaviorHarness, found: Sequence[TriggerCandidate], clock: TimeBudget, reserve: float
) -> list[TriggerCandidate]:
    """Triggers of 2 and 3 tokens, grown from the best by one of the POOL best at a time, before or behind; the best first.

    Stops where fewer than `reserve` seconds are left.
    """
    pool = list(dict.fromkeys(f.trigger for f in found))[:POOL]
    beam, grown = pool[:BEAM], []
    for _ in range(2, LONGEST + 1):
        longer = list(
            dict.fromkeys(
                t for s in beam for (p,) in pool if p not in s for t in ((*s, p), (p, *s))
            )
        )
        more, _ = scan_tokens(bench, longer, clock, reserve, every=False)
        grown += more
        beam = list(dict.fromkeys(f.trigger for f in more))[:BEAM]
    return sorted(grown, key=lambda f: -f.score)
