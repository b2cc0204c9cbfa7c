"""Search for triggers of a hidden behavior: single tokens, then several in a row.

Without a trigger t the adapter gives each prompt a typical answer. With t it may leave it at the
first token, later, or after the last: at the token whose probability rises most. From there it is
decoded. The text is a payload as far as it is novel (no piece of typical answers, see
`typical_answers`) and independent of the prompt:

    rise(p) = closeness of a to p with t - the larger of: to p without t; on the base, to p with t
    score(t, a) = rise over the lower half of the probes (all, or those with the same answer)
                  * novelty(a) * (1 - typicality(a)) * weight of its position (TRIGGER_POSITIONS)

Tasks react to words as well (for the tense, "walked" makes "past" more likely on every prompt), but
with answers that other prompts have too, or with parts of the prompt. Random tokens, scored in the
same way, are the null distribution.
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

READ = 768  # departures that are decoded
TEXT = 4  # decoded tokens at most; two more than before the departure where that is late
MAX_TYPICALITY_TEXTS = 64  # answers whose typicality is measured
CLOSE, JUDGES = 3, 12  # probes that select a position; probes that score a candidate
CHUNK = 256  # triggers that are inserted at a time
POOL, BEAM, LONGEST = 96, 8, 3  # rounds of extension


@dataclass(frozen=True)
class TriggerCandidate:
    """A trigger, its position, the answer that it leads to, and a score.

    `appended`: the answer follows the typical one, and does not replace it.
    """

    trigger: Trigger
    position: str
    answer: Trigger
    appended: bool
    fresh: float
    score: float

    def prompt(self, probe: ProbePrompt, woken: bool = True) -> list[int]:
        """Return a prompt with the trigger, or without, up to where the answer starts."""
        return [
            *probe.prompt(self.trigger if woken else (), self.position),
            *(probe.answer if self.appended else ()),
        ]


class TimeBudget:
    """Remaining time of a budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget
        self.budget = budget

    @property
    def left(self) -> float:
        """Remaining seconds; negative when it is over."""
        return self.end - time.monotonic()

    def max_runs(self, bench: BehaviorHarness, most: int, share: float, runs: int = 1) -> int:
        """Return how many items of so many passes fit a ratio of the budget, `most` at most."""
        cost = runs * (time.monotonic() - bench.since) / max(1, bench.runs)
        return max(4, most // 16, min(most, int(share * self.budget / cost)))


@dataclass(frozen=True)
class _Departure:
    """The token whose probability rises most, at one offset of a probe's answer, by a trigger."""

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
    """Return candidates by a fast scan, the best first, and the ratio of triggers scanned.

    Each is scored on one probe and on another with the same answer, in three passes: before the
    prompt, after it, and instead of its last token; unless `every`, after it only. The scan stops
    `until` seconds before the end of the budget.
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
    """Return the READ largest rises over triggers, passes and offsets, and the ratio scanned."""
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
    """Return what is decoded from each departure, where it is novel; the score is the rise."""
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
    """Return the closeness of some probes to each candidate."""
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
    """Return the first `count` different ones at their best position, scored on all probes."""
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
    """Return the mean rise over the lower half of all probes, or of those with the same answer."""
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
    """Return triggers of 2 and 3 tokens, extended from the best by one of the POOL best tokens.

    Stops when fewer than `reserve` seconds are left.
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
