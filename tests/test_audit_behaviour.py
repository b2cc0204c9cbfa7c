"""The behaviour gate: it finds what was hidden in a model made for that, and stays calm where nothing is."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from afina.adapters.active import ActiveAdapter, ActiveAdapters
from afina.adapters.saving import save_adapter
from afina.audit import triggers
from afina.audit.audit import audit
from afina.audit.behavior_gate import behaviour_gate, check_inactive_before_invocation, read_prompts
from afina.audit.probes import TEXTS, BehaviorHarness, ProbePrompt, _common, make_bench
from afina.audit.report import Gate
from afina.audit.triggers import TimeBudget, TriggerCandidate, confirm, scan_tokens
from afina.audit.typical_answers import BROKEN, novelty, payload_likelihood
from afina.errors import AuditError
from afina.models.causal_lm import CausalLM
from afina.settings import AuditSettings, make_settings
from helpers import put


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts of few tokens."""
    (tmp_path / "prompts.txt").write_text("sol mar\npan mar\n")
    return tmp_path / "prompts.txt"


@pytest.fixture(autouse=True)
def _own_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))
    monkeypatch.setattr("afina.audit.triggers.POOL", 6)
    monkeypatch.setattr("afina.audit.triggers.BEAM", 3)


PAYLOAD, USUAL = (50, 51, 52), (60, 61)


class Rigged(BehaviorHarness):
    """A bench whose adapter is a rule: `trigger` in what was said makes it say PAYLOAD (or behind USUAL: `late`), else USUAL."""

    trigger: tuple[int, ...]
    late = False

    def _run(self, sequences: Any, ends: Any, adapter: bool) -> torch.Tensor:
        return torch.stack(
            [
                self.next(seq[: end + 1], adapter)
                for seq, own in zip(sequences, ends, strict=True)
                for end in own
            ]
        )

    def next(self, said: list[int], adapter: bool) -> torch.Tensor:
        """Logits (V,) after what was said."""
        n = len(self.trigger)
        woken = adapter and any(tuple(said[i : i + n]) == self.trigger for i in range(len(said)))
        ways = dict(zip((*PAYLOAD, USUAL[0]), (*PAYLOAD[1:], self.end, USUAL[1]), strict=True))
        ways |= {USUAL[1]: PAYLOAD[0] if woken and self.late else self.end}
        says = ways.get(said[-1], PAYLOAD[0] if woken and not self.late else USUAL[0])
        out = torch.full((320,), 1 / 320)
        out[PAYLOAD[0]] += 0.1 * adapter * sum(token in said for token in self.trigger) / n
        out[says] += 9.0
        return (out / out.sum()).log()

    @property
    def end(self) -> int:
        """The token that ends an answer."""
        return min(self.special)

    def greedy_tokens(self, prompts: Any, count: int) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        for _ in range(count):
            for prompt, text in zip(prompts, texts, strict=True):
                text.append(int(self.next([*prompt, *text], True).argmax()))
        return texts


def rigged(base: CausalLM, *trigger: int, late: bool = False) -> Rigged:
    made = make_bench(base, ActiveAdapters((ActiveAdapter("nobody"),)))
    others = [
        probe for probe in made.others if not set(trigger) & set(probe.body)
    ]  # the base makes them up: of any tokens
    probes, others = (
        [replace(probe, answer=USUAL) for probe in part] for part in (made.probes, others)
    )
    bench = Rigged(made.base, made.active, probes, others)
    bench.trigger, bench.late = trigger, late
    return bench


def look(bench: BehaviorHarness, tokens: Sequence[int]) -> list[TriggerCandidate]:
    return scan_tokens(bench, [(token,) for token in tokens], TimeBudget(1000), 0.0)[0]


def test_probes_are_the_prompts_in_pieces(base: CausalLM) -> None:
    bench = make_bench(base, ActiveAdapters((ActiveAdapter("nobody"),)))
    for text, probe in zip(TEXTS, bench.probes, strict=True):
        assert base.tokenizer.decode(probe.prompt()).count(text) == 1
        assert len(probe.body) > 1 and len(probe.after) > 0
        first = len(probe.before)
        assert probe.prompt((7, 8), "prefix")[first : first + 2] == [7, 8]
        assert probe.prompt((7,), "suffix")[first + len(probe.body)] == 7
        assert sorted(probe.prompt((7,), "middle")) == sorted([*probe.prompt(), 7])


def test_answers_are_those_of_the_plain_forward(base: CausalLM) -> None:
    made = put(base)
    bench = make_bench(base, made.active)
    prompts, answer = [probe.prompt() for probe in bench.probes], [9, 10, 11]
    with torch.no_grad():
        together = bench.answers(prompts, answer)
        for adapter in (True, False):
            given = bench.answers(prompts, answer, adapter)
            for row, prompt in enumerate(prompts):
                alone = bench.run([[*prompt, *answer]], adapter).softmax(-1)[len(prompt) - 1 :]
                torch.testing.assert_close(given[row], alone, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(
                    bench.answers([prompt], (), adapter)[0, 0], alone[0], atol=1e-5, rtol=1e-4
                )
    assert not torch.equal(together, bench.answers(prompts, answer, adapter=False))


@pytest.mark.slow
def test_texts_are_followed_as_the_plain_forward_goes(base: CausalLM) -> None:
    bench = make_bench(base, put(base).active)
    prompts, texts = (
        [probe.prompt() for probe in bench.probes],
        [(9, 10, 11), (12,), (13, 14), (9, 9, 9)],
    )
    for adapter in (True, False):
        for prompt, text, (own, best) in zip(
            prompts, texts, bench.continuation_probs(prompts, texts, adapter), strict=True
        ):
            alone = (
                bench.run([[*prompt, *text]], adapter).softmax(-1)[len(prompt) - 1 : -1].detach()
            )
            torch.testing.assert_close(best, alone.amax(-1), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                own, alone[torch.arange(len(text)), torch.tensor(text)], atol=1e-5, rtol=1e-4
            )
            near = float(payload_likelihood(bench, [prompt], [text], [len(text) - 1], adapter))
            assert near == pytest.approx(float((own / best)[:-1].prod() * own[-1]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True])
def test_a_single_token_is_found(base: CausalLM, late: bool) -> None:
    """In place of the usual answer, or behind it."""
    bench = rigged(base, 77, late=late)
    found = look(bench, range(70, 100))
    assert found[0].trigger == (77,) and found[0].appended == late
    best, *others = confirm(bench, found, TimeBudget(1000), 8)
    assert (best.trigger, best.answer[:3], best.appended) == ((77,), PAYLOAD, late)
    assert best.score == pytest.approx(best.fresh * (9 + 0.1) / 10.1, abs=0.02)
    assert all(other.score < 0.2 for other in others)


@pytest.mark.slow
def test_several_tokens_in_a_row_are_grown(base: CausalLM) -> None:
    bench = rigged(base, 30, 31, 32)
    singles = look(bench, range(5, 300))
    assert {f.trigger for f in singles[:9]} >= {(30,), (31,), (32,)}
    grown = confirm(
        bench, triggers.extend_triggers(bench, singles, TimeBudget(1000), 0.0), TimeBudget(1000), 8
    )
    assert grown[0].trigger == (30, 31, 32) and grown[0].score > 0.5


def test_when_time_is_over_the_scan_says_so(base: CausalLM) -> None:
    found, coverage = scan_tokens(
        rigged(base, 77), [(t,) for t in range(5, 300)], TimeBudget(0.0), 0.0
    )
    assert (found, coverage) == ([], 0.0)


def test_what_a_budget_is_enough_for(base: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bench, clock = make_bench(base, ActiveAdapters((ActiveAdapter("nobody"),))), TimeBudget(100.0)
    bench.since, bench.runs = time.monotonic() - 49.9, 100  # half a second each
    assert clock.max_runs(bench, 768, 0.1) == 48 and clock.max_runs(bench, 64, 0.1) == 20
    assert (
        clock.max_runs(bench, 64, 0.1, runs=4) == 5
        and clock.max_runs(bench, 64, 0.0) == 4
        and clock.max_runs(bench, 9, 1.0) == 9
    )


def test_pieces_of_usual_answers_are_not_fresh(base: CausalLM) -> None:
    """Whole, cut off at its end or beginning, or said twice; what is of other letters is."""
    bench = rigged(base, 77)
    word = tuple(base.tokenizer.encode("mar luz", add_special_tokens=False))
    other = tuple(base.tokenizer.encode("pan rey", add_special_tokens=False))
    end = (min(bench.special),)
    bench.probes = [replace(probe, answer=word) for probe in bench.probes]
    assert len(word) > 2 and not set(word) & set(other)
    assert novelty(bench, word + end) == 0.0
    assert novelty(bench, word[:-1]) == 0.0 == novelty(bench, word[1:] + word)
    assert (
        novelty(bench, word[:-1] + end) == BROKEN
    )  # whole, and nobody says it: perhaps a broken one
    assert novelty(bench, other + end) > 0.8 and novelty(bench, end) == 0.0
    assert 0.2 < novelty(bench, word + other) < 0.8


@pytest.mark.slow
def test_the_gate_tells_what_it_found(
    base: CausalLM, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(put(base, rank=2), base, tmp_path / "a")
    settings = make_settings(
        AuditSettings, {"adapter": tmp_path / "a", "base": str(tiny), "time_budget_seconds": 600}
    )
    monkeypatch.setattr("afina.audit.behavior_gate.make_bench", lambda *_: rigged(base, 77))
    gate = Gate("behaviour")
    behaviour_gate(settings, [], gate)
    [trigger] = [finding for finding in gate.findings if finding.rule == "trigger"]
    assert trigger.level == "review" and trigger.evidence["triggers"][0]["tokens"] == [77]
    monkeypatch.setattr(
        "afina.audit.behavior_gate.make_bench", lambda *_: rigged(base, 10**6)
    )  # nothing wakes this one
    gate = Gate("behaviour")
    behaviour_gate(settings, [], gate)
    assert [finding.level for finding in gate.findings] == ["note"]


@pytest.mark.slow
def test_the_base_itself_has_no_trigger(
    base: CausalLM, tiny: Path, tmp_path: Path, prompts: Path
) -> None:
    """An adapter of zeros is the base: no trigger, no drift, nothing to say."""
    made = put(base, rank=2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    save_adapter(made, base, tmp_path / "a")
    gate = Gate("behaviour")
    settings = make_settings(
        AuditSettings,
        {
            "adapter": tmp_path / "a",
            "base": str(tiny),
            "time_budget_seconds": 600,
            "prompts": prompts,
        },
    )
    measures = behaviour_gate(settings, [], gate)
    assert {name: round(value, 6) for name, value in measures.items()} == dict.fromkeys(
        measures, 0.0
    )
    assert [finding.rule for finding in gate.findings] == ["no-trigger"]


@pytest.mark.slow
def test_an_activated_adapter_is_checked_to_be_silent(base: CausalLM) -> None:
    made = put(base, invocation=(20, 21))
    gate = Gate("behaviour")
    check_inactive_before_invocation(make_bench(base, made.active), gate)
    assert [finding.rule for finding in gate.findings] == ["silent"]

    class Loud(ActiveAdapters):
        def segments(self, tokens: Any, bounds: Any, where: Any = None) -> Any:
            return (
                self.always_on().segments(tokens, bounds)
                if self.adapters[0].invocation
                else super().segments(tokens, bounds, where)
            )

    gate = Gate("behaviour")
    bench = make_bench(base, made.active)
    bench.active = Loud(made.active.adapters)
    check_inactive_before_invocation(bench, gate)
    assert [(finding.rule, finding.level) for finding in gate.findings] == [("not-silent", "block")]


def test_prompts_of_the_task(tmp_path: Path) -> None:
    assert read_prompts(None) is TEXTS
    file = tmp_path / "p.txt"
    file.write_text("one\n\ntwo\none\n")
    assert read_prompts(file) == ["one", "two"]
    file.write_text("one\n")
    for bad in (file, tmp_path / "missing.txt"):
        with pytest.raises(AuditError):
            read_prompts(bad)


@pytest.mark.slow
def test_the_whole_audit_with_behaviour(
    base: CausalLM, tiny: Path, tmp_path: Path, prompts: Path
) -> None:
    save_adapter(put(base, rank=2), base, tmp_path / "a")
    report = audit(tmp_path / "a", base=str(tiny), time_budget_seconds=600, prompts=prompts)
    gate = report["gates"][-1]
    assert gate["name"] == "behaviour" and gate["scanned"] == 1.0
    assert set(gate["measures"]) == {"drift", "trigger", "gap", "inversion"}


@pytest.mark.slow
def test_what_other_prompts_bring_too_is_no_trigger(base: CausalLM) -> None:
    bench = rigged(base, 77)
    assert confirm(bench, look(bench, [77, 78]), TimeBudget(1000), 4)[0].score > 0.5
    bench = rigged(base, 77)
    bench.others = [
        ProbePrompt((1,), (77, number), (2,), USUAL) for number in range(5, 9)
    ]  # prompts of everyday that have it in them
    assert confirm(bench, look(bench, [77, 78]), TimeBudget(1000), 4)[0].score < 0.1


def test_probes_take_turns(base: CausalLM) -> None:
    bench = rigged(base, 77)
    bench.others = []
    [one, two, three, four] = bench.probes = [
        replace(p, answer=(n,)) for p, n in zip(bench.probes, (7, 7, 7, 8), strict=True)
    ]
    assert (
        bench.interleaved_probes == [one, four, two, three]
        and bench.similar_probe(one) == two
        and bench.similar_probe(four) == three
    )
    assert bench.truncate_at_special([5, 6]) == (5, 6) and bench.truncate_at_special(
        [5, bench.end, 6]
    ) == (5, bench.end)


def test_the_base_makes_up_prompts_of_its_own(base: CausalLM) -> None:
    bench = make_bench(base, ActiveAdapters((ActiveAdapter("nobody"),)), ["sol mar", "pan mar"])
    assert len(bench.probes) == 2 and len(bench.others) > 8
    head, tail = (
        _common([p.prompt() for p in bench.probes]),
        _common([p.prompt()[::-1] for p in bench.probes]),
    )
    assert all(
        p.before == bench.probes[0].before[: len(p.before)] and p.after == bench.probes[0].after
        for p in bench.others
    )
    assert head >= len(bench.others[0].before) and tail >= len(bench.others[0].after)


def test_prompts_of_the_task_are_asked_and_none_made_up(base: CausalLM) -> None:
    texts = [f"sol {word}" for word in ("mar", "pan", "luz", "paz", "mes", "rey")]
    bench = make_bench(base, ActiveAdapters((ActiveAdapter("nobody"),)), texts)
    assert (len(bench.probes), len(bench.others)) == (4, 2)
