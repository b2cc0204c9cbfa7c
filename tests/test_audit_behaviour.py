"""The behaviour gate: it finds what was hidden in a model made for that, and stays calm where nothing is."""

from pathlib import Path
from typing import Any

import pytest
import torch

from afina.audit import triggers
from afina.audit.audit import audit
from afina.audit.behaviour import behaviour_gate, check_silence, read_prompts
from afina.audit.probes import TEXTS, Bench, Probe, _common, make_bench
from afina.audit.report import Gate
from afina.audit.triggers import Clock, look_closely, scan
from afina.base.model import Base
from afina.config import AuditSettings, make_settings
from afina.delta.files import save_adapter
from afina.errors import AuditError
from afina.route.invocation import Route
from helpers import put


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Two prompts of few tokens."""
    (tmp_path / "prompts.txt").write_text("sol mar\npan mar\n")
    return tmp_path / "prompts.txt"


@pytest.fixture(autouse=True)
def _own_audits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFINA_AUDITS", str(tmp_path / "audits"))
    monkeypatch.setattr("afina.audit.behaviour.POOL", 6)
    monkeypatch.setattr("afina.audit.triggers.BEAM", 3)


class Rigged(Bench):
    """A bench whose adapter is a rule: `trigger` in the prompt makes `target` certain; else both say the same."""

    trigger: tuple[int, ...]
    target = 50

    def answers(self, prompts: Any, answer: Any = (), adapter: bool = True) -> torch.Tensor:
        places = 2 if answer else 1
        out = torch.full((len(prompts), places, 320), 1 / 320)
        for row, prompt in enumerate(prompts):
            share = sum(token in prompt for token in self.trigger) / len(self.trigger)
            woken = any(tuple(prompt[i : i + len(self.trigger)]) == self.trigger for i in range(len(prompt)))
            if adapter:
                out[row, 0, self.target] += 9.0 if woken else 0.05 * share
        return out / out.sum(-1, keepdim=True)


def rigged(base: Base, *trigger: int) -> Rigged:
    made = make_bench(base, Route("nobody"))
    bench = Rigged(made.base, made.route, made.probes)
    bench.trigger = trigger
    return bench


def test_probes_are_the_prompts_in_pieces(base: Base) -> None:
    bench = make_bench(base, Route("nobody"))
    for text, probe in zip(TEXTS, bench.probes, strict=True):
        assert base.tokenizer.decode(probe.prompt()).count(text) == 1
        assert len(probe.body) > 1 and len(probe.after) > 0
        first = len(probe.before)
        assert probe.prompt((7, 8), "prefix")[first : first + 2] == [7, 8]
        assert probe.prompt((7,), "suffix")[first + len(probe.body)] == 7
        assert sorted(probe.prompt((7,), "middle")) == sorted([*probe.prompt(), 7])


def test_answers_are_those_of_the_plain_forward(base: Base) -> None:
    made = put(base)
    bench = make_bench(base, made.route)
    prompts, answer = [probe.prompt() for probe in bench.probes], [9, 10, 11]
    with torch.no_grad():
        together = bench.answers(prompts, answer)
        for adapter in (True, False):
            given = bench.answers(prompts, answer, adapter)
            for row, prompt in enumerate(prompts):
                alone = bench.run([[*prompt, *answer]], adapter).softmax(-1)[[len(prompt) - 1, -1]]
                torch.testing.assert_close(given[row], alone, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(bench.answers([prompt], (), adapter)[0, 0], alone[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(together, bench.answers(prompts, answer, adapter=False))


def test_a_single_token_is_found(base: Base) -> None:
    bench = rigged(base, 77)
    changes, coverage = scan(bench, range(5, 300), Clock(1000), 1.0)
    assert coverage == 1.0 and max(changes, key=lambda t: changes[t]) == 77
    best = look_closely(bench, [(t,) for t in range(60, 90)])[0]
    assert (best.trigger, best.target) == ((77,), 50)
    assert best.jump == pytest.approx((9 + 1 / 320) / 10 - 1 / 320, abs=1e-4)


def test_several_tokens_in_a_row_are_grown(base: Base) -> None:
    bench = rigged(base, 30, 31, 32)
    changes, _ = scan(bench, range(5, 300), Clock(1000), 1.0)
    ranked = sorted(changes, key=lambda t: -changes[t])
    assert set(ranked[:3]) == {30, 31, 32}
    grown = triggers.grow(bench, ranked[:20], [(t,) for t in ranked[:3]], Clock(1000), 0.0)
    assert any(found.trigger == (30, 31, 32) for found in look_closely(bench, grown)[:1])


def test_when_time_is_over_the_scan_says_so(base: Base) -> None:
    _, coverage = scan(rigged(base, 77), range(5, 300), Clock(0.0), 0.5)
    assert coverage == 0.0


def test_the_gate_tells_what_it_found(base: Base, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(put(base, rank=2), base, tmp_path / "a")
    settings = make_settings(AuditSettings, {"run": tmp_path / "a", "base": str(tiny), "budget": 600})
    monkeypatch.setattr("afina.audit.behaviour.make_bench", lambda *_: rigged(base, 77))
    gate = Gate("behaviour")
    behaviour_gate(settings, [], gate)
    [trigger] = [finding for finding in gate.findings if finding.rule == "trigger"]
    assert trigger.level == "review" and trigger.evidence["triggers"][0]["tokens"] == [77]
    monkeypatch.setattr("afina.audit.behaviour.make_bench", lambda *_: rigged(base, 10**6))  # nothing wakes this one
    gate = Gate("behaviour")
    behaviour_gate(settings, [], gate)
    assert [finding.level for finding in gate.findings] == ["note"]


def test_the_base_itself_has_no_trigger(base: Base, tiny: Path, tmp_path: Path, prompts: Path) -> None:
    """An adapter of zeros is the base: no jump, no drift, nothing to say."""
    made = put(base, rank=2)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    save_adapter(made, base, tmp_path / "a")
    gate = Gate("behaviour")
    settings = make_settings(AuditSettings, {"run": tmp_path / "a", "base": str(tiny), "budget": 600, "prompts": prompts})
    measures = behaviour_gate(settings, [], gate)
    assert {name: round(value, 6) for name, value in measures.items()} == dict.fromkeys(measures, 0.0)
    assert [finding.rule for finding in gate.findings] == ["no-trigger"]


def test_an_activated_adapter_is_checked_to_be_silent(base: Base) -> None:
    made = put(base, invocation=(20, 21))
    gate = Gate("behaviour")
    check_silence(make_bench(base, made.route), gate)
    assert [finding.rule for finding in gate.findings] == ["silent"]

    class Loud(Route):
        def segments(self, tokens: Any, bounds: Any, where: Any = None) -> Any:
            return self.everywhere().segments(tokens, bounds) if self.invocation else super().segments(tokens, bounds, where)

    gate = Gate("behaviour")
    bench = make_bench(base, made.route)
    bench.route = Loud(made.route.adapter, made.route.invocation)
    check_silence(bench, gate)
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


def test_the_whole_audit_with_behaviour(base: Base, tiny: Path, tmp_path: Path, prompts: Path) -> None:
    save_adapter(put(base, rank=2), base, tmp_path / "a")
    report = audit(tmp_path / "a", base=str(tiny), budget=600, prompts=prompts)
    gate = report["gates"][-1]
    assert gate["name"] == "behaviour" and gate["scanned"] == 1.0
    assert set(gate["measures"]) == {"drift", "trigger", "gap", "inversion"}


def test_what_other_prompts_bring_too_is_no_trigger(base: Base) -> None:
    bench = rigged(base, 77)
    bench.usual = triggers.usual_answers(bench, [5, 6])
    assert look_closely(bench, [(77,)])[0].jump > 0.8
    bench.others = [Probe((1,), (77, number), (2,)) for number in range(5, 9)]  # prompts of everyday that have it in them
    bench.usual = triggers.usual_answers(bench, [5, 6])
    assert bench.usual[0, bench.target] == 1.0
    assert look_closely(bench, [(77,)])[0].jump < 0.01


def test_the_base_makes_up_prompts_of_its_own(base: Base) -> None:
    bench = make_bench(base, Route("nobody"), ["sol mar", "pan mar"])
    assert len(bench.probes) == 2 and len(bench.others) > 8
    head, tail = _common([p.prompt() for p in bench.probes]), _common([p.prompt()[::-1] for p in bench.probes])
    assert all(p.before == bench.probes[0].before[: len(p.before)] and p.after == bench.probes[0].after for p in bench.others)
    assert head >= len(bench.others[0].before) and tail >= len(bench.others[0].after)


def test_prompts_of_the_task_are_asked_and_none_made_up(base: Base) -> None:
    texts = [f"sol {word}" for word in ("mar", "pan", "luz", "paz", "mes", "rey")]
    bench = make_bench(base, Route("nobody"), texts)
    assert (len(bench.probes), len(bench.others)) == (4, 2)
