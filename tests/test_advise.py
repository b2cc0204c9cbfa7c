"""`afina advise`: written situations with the advice that is expected, and where its reasons come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from afina.comparing import advise as module
from afina.comparing.advise import advise, ask, written
from afina.comparing.published import FINDINGS, SAYINGS
from afina.config import AdviseSettings
from afina.errors import SettingsError


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SITUATIONS: list[tuple[str, dict[str, Any], str, set[str]]] = [
    ("a company's tone, 800 letters", {"goal": "style", "rows": 800}, "lora", {"lima", "regret"}),
    ("six examples, nothing tried", {"goal": "style", "rows": 6}, "prompt", {"fewshot"}),
    ("prices that change", {"goal": "facts-that-change"}, "find", {"retrieval", "hallucinate"}),
    ("product codes to memorise", {"goal": "knowledge", "rows": 3000}, "mora", {"mora", "hallucinate", "retrieval"}),
    ("200 customers", {"goal": "customers", "rows": 500}, "lora", {"slora", "regret"}),
    ("tools called within a chat", {"goal": "switching", "rows": 500}, "alora", {"alora"}),
    ("a library of medicine", {"goal": "domain", "rows": 20000}, "full", {"learns_less", "mora"}),
    ("a small field", {"goal": "domain", "rows": 300}, "lora", {"regret", "learns_less"}),
    ("no rows at all", {"goal": "style", "rows": 0}, "prompt", set()),
    ("six examples, a prompt was not enough", {"goal": "style", "rows": 6, "prompted": True}, "lora", {"lima", "regret"}),
    ("it should refuse politely", {"goal": "behaviour", "rows": 400}, "lora", {"lima", "dpo"}),
    ("pairs are there", {"goal": "behaviour", "rows": 400, "pairs": True}, "lora", {"lima", "dpo"}),
]


@pytest.mark.parametrize(("case", "told", "use", "sources"), SITUATIONS, ids=[case[0] for case in SITUATIONS])
def test_situations(case: str, told: dict[str, Any], use: str, sources: set[str], tiny: Path) -> None:
    found = advise(**told, base=str(tiny))
    assert found["use"] == use
    assert {FINDINGS[name][0] for name in sources} == {r["source"] for r in found["reasons"] if r["source"]}
    if use in ("prompt", "find"):
        assert found["command"] is None and found["plan"] is None
    else:
        assert f"--method {use}" in found["command"]
        assert found["plan"]["peak_bytes"] > 1e8 and found["plan"]["step_seconds"] > 0


def test_preferences_come_after_answers(tiny: Path) -> None:
    with_pairs = advise(goal="behaviour", rows=400, pairs=True, base=str(tiny))
    assert "--objective dpo" in with_pairs["then"]
    assert "afina prefer" in advise(goal="behaviour", rows=400, base=str(tiny))["reasons"][-1]["text"]


def test_memory_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit gives way to the nearest that does, and it says what would have been needed."""
    peaks = {"full": 30e9, "lora": 12e9, "qlora": 5e9}
    monkeypatch.setattr(module, "plan", lambda told: {"cost": {"peak_bytes": peaks[told.method], "machine_bytes": 16e9,
                        "fits": peaks[told.method] < 16e9, "step_seconds": 1.0, "batch": {}}})  # fmt: skip
    ask_for = {"goal": "domain", "rows": 20000, "base": "x"}
    small = advise(**ask_for)
    assert small["use"] == "lora" and small["settings"]["rank"] == 64
    assert any("30.00 GB, of 16.00 GB" in r["text"] for r in small["reasons"])
    smaller = advise(**ask_for, memory=8)
    assert smaller["use"] == "qlora" and "--method qlora --rank 64" in smaller["command"]
    assert any(r["source"] == FINDINGS["qlora"][0] for r in smaller["reasons"])
    none = advise(**ask_for, memory=2)
    assert none["use"] == "none" and none["command"] is None
    assert "5.00 GB" in none["reasons"][-1]["text"]


def test_without_a_plan_it_still_advises(tmp_path: Path) -> None:
    found = advise(goal="style", rows=800, base=str(tmp_path / "nothing"))
    assert found["use"] == "lora" and found["plan"] is None
    assert any("not known" in r["text"] for r in found["reasons"])


def earlier(folder: Path, base: str, shown: bool) -> None:
    """A comparison in which mora was better than lora, or not surely."""
    figure = {"mean": 80.0, "low": 70.0, "high": 90.0}
    found = {
        "kind": module.KIND, "objective": "sft", "metric": "exact_match", "folder": "runs/mine", "settings": {"base": base, "rank": 16},
        "methods": {"lora": {"score": figure, "learning_rate": 0.001}, "mora": {"score": figure, "learning_rate": 0.002}},
        "tests": [{"one": "lora", "other": "mora", "difference": {"mean": 9.0}, "shown": shown}],
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps(found))


def test_ones_own_comparisons_go_first(tiny: Path, tmp_path: Path) -> None:
    earlier(tmp_path / "runs" / "mine", str(tiny), shown=True)
    found = advise(goal="style", rows=800, base=str(tiny))
    assert found["use"] == "mora" and "--learning-rate 0.002" in found["command"]
    assert any("runs/mine" in r["text"] for r in found["reasons"])


def test_a_difference_that_was_not_shown_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    earlier(tmp_path / "runs" / "mine", str(tiny), shown=False)
    earlier(tmp_path / "runs" / "other-base", "another", shown=True)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "compare.json").write_text("{")
    found = advise(goal="style", rows=800, base=str(tiny))
    assert found["use"] == "lora" and "--learning-rate 0.001" in found["command"]
    assert "does not speak against" in " ".join(r["text"] for r in found["reasons"])


def test_the_interview_asks_for_what_is_missing() -> None:
    answers = {"What": "style", "How": "800"}
    made = ask(AdviseSettings(lang="es"), lambda text: answers[text.split()[0]])
    assert (made.goal, made.rows, made.lang) == ("style", 800, "es")
    assert ask(made, lambda text: pytest.fail("asked again")) == made
    with pytest.raises(SettingsError, match="goal cannot be 'fun'"):
        ask(AdviseSettings(), lambda text: "fun")
    with pytest.raises(SettingsError, match="rows is missing"):
        advise(goal="style")


def test_both_languages(tiny: Path) -> None:
    assert written(advise(goal="style", rows=800, base=str(tiny), lang="es"))[0] == ("usa", "lora")
    found = advise(goal="facts-that-change", lang="es")
    assert written(found) == [("usa", SAYINGS["es"]["find"])]
    assert "recuperación" in found["reasons"][0]["text"]
