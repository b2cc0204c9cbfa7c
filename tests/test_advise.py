"""`afina advise`: written situations with the advice that is expected, and where its reasons come from."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from afina.comparison import advise as module
from afina.comparison.advise import advise, ask
from afina.comparison.findings import messages, sources
from afina.errors import SettingsError
from afina.models.loading import choose_device
from afina.planning.plan import plan
from afina.settings import AdviseSettings, Goal


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# what somebody says, as flags; the method that is expected; the findings that its reasons must name, and no others
SITUATIONS: list[tuple[str, dict[str, Any], str, set[str]]] = [
    # ---- nothing to train
    ("no rows at all", {"goal": "style", "num_rows": 0}, "prompt", set()),
    (
        "no rows, and a prompt was tried",
        {"goal": "behaviour", "num_rows": 0, "tried_prompting": True},
        "prompt",
        set(),
    ),
    ("customers are coming, no rows yet", {"goal": "customers", "num_rows": 0}, "prompt", set()),
    ("six examples, nothing tried", {"goal": "style", "num_rows": 6}, "prompt", {"fewshot"}),
    ("nineteen refusals", {"goal": "behaviour", "num_rows": 19}, "prompt", {"fewshot"}),
    (
        "twelve letters of one customer",
        {"goal": "customers", "num_rows": 12},
        "prompt",
        {"fewshot"},
    ),
    ("three calls of tools", {"goal": "switching", "num_rows": 3}, "prompt", {"fewshot"}),
    ("opening hours of eight shops", {"goal": "knowledge", "num_rows": 8}, "prompt", {"retrieval"}),
    ("five articles of a field", {"goal": "domain", "num_rows": 5}, "prompt", {"retrieval"}),
    # ---- retrieval
    ("prices that change", {"goal": "facts-that-change"}, "find", {"retrieval", "hallucinate"}),
    (
        "news, thousands of them",
        {"goal": "facts-that-change", "num_rows": 50000},
        "find",
        {"retrieval", "hallucinate"},
    ),
    (
        "stock levels, and a prompt was tried",
        {"goal": "facts-that-change", "num_rows": 200, "tried_prompting": True},
        "find",
        {"retrieval", "hallucinate"},
    ),
    # ---- style, form, a task
    (
        "a company's tone, 800 letters",
        {"goal": "style", "num_rows": 800},
        "lora",
        {"lima", "regret"},
    ),
    (
        "six examples, a prompt was not enough",
        {"goal": "style", "num_rows": 6, "tried_prompting": True},
        "lora",
        {"lima", "regret"},
    ),
    ("twenty summaries", {"goal": "style", "num_rows": 20}, "lora", {"lima", "regret"}),
    ("contracts, 4,999 clauses", {"goal": "style", "num_rows": 4999}, "lora", {"lima", "regret"}),
    ("corrections of 60,000 sentences", {"goal": "style", "num_rows": 60000}, "lora", {"regret"}),
    # ---- behaviour
    ("it should refuse politely", {"goal": "behaviour", "num_rows": 400}, "lora", {"lima", "dpo"}),
    (
        "pairs are there",
        {"goal": "behaviour", "num_rows": 400, "has_pairs": True},
        "lora",
        {"lima", "dpo"},
    ),
    (
        "ten answers and pairs beside them",
        {"goal": "behaviour", "num_rows": 10, "has_pairs": True},
        "lora",
        {"lima", "dpo"},
    ),
    ("pairs alone", {"goal": "behaviour", "num_rows": 0, "has_pairs": True}, "lora", {"dpo"}),
    (
        "many answers and pairs",
        {"goal": "behaviour", "num_rows": 9000, "has_pairs": True},
        "lora",
        {"regret", "dpo"},
    ),
    # ---- knowledge, domains, languages
    (
        "product codes to memorise",
        {"goal": "knowledge", "num_rows": 3000},
        "mora",
        {"mora", "hallucinate", "retrieval"},
    ),
    (
        "eight codes, and a prompt was not enough",
        {"goal": "knowledge", "num_rows": 8, "tried_prompting": True},
        "mora",
        {"mora", "hallucinate", "retrieval"},
    ),
    (
        "a library of medicine",
        {"goal": "domain", "num_rows": 20000},
        "full",
        {"learns_less", "mora"},
    ),
    (
        "a language, exactly 5,000 texts",
        {"goal": "domain", "num_rows": 5000},
        "full",
        {"learns_less", "mora"},
    ),
    ("a small field", {"goal": "domain", "num_rows": 300}, "lora", {"regret", "learns_less"}),
    (
        "five articles, and a prompt was not enough",
        {"goal": "domain", "num_rows": 5, "tried_prompting": True},
        "lora",
        {"regret", "learns_less"},
    ),
    # ---- many adapters
    ("200 customers", {"goal": "customers", "num_rows": 500}, "lora", {"slora", "regret"}),
    (
        "one customer with much to say",
        {"goal": "customers", "num_rows": 30000},
        "lora",
        {"slora", "regret"},
    ),
    ("tools called within a chat", {"goal": "switching", "num_rows": 500}, "alora", {"alora"}),
    (
        "a checker beside a writer, few rows, prompt tried",
        {"goal": "switching", "num_rows": 15, "tried_prompting": True},
        "alora",
        {"alora"},
    ),
]


def test_there_are_enough_of_them() -> None:
    assert len(SITUATIONS) + len(FITTING) >= 40
    assert len({json.dumps(told, sort_keys=True) for _, told, _, _ in SITUATIONS}) == len(
        SITUATIONS
    )
    assert {told["goal"] for _, told, _, _ in SITUATIONS} == set(get_args(Goal))
    named = set().union(*(cited for *_, cited in SITUATIONS))
    assert named == set(sources()) - {"qlora"}, "qlora is among those that memory decides"


@pytest.mark.parametrize(
    ("case", "told", "use", "cited"), SITUATIONS, ids=[case[0] for case in SITUATIONS]
)
def test_situations(case: str, told: dict[str, Any], use: str, cited: set[str], tiny: Path) -> None:
    found = advise(**told, base=str(tiny))
    assert found["use"] == use
    assert {sources()[name]["source"] for name in cited} == {
        r["source"] for r in found["reasons"] if r["source"]
    }
    assert all(r["link"].startswith("https://") for r in found["reasons"] if r["source"])
    if use in ("prompt", "find"):
        assert found["command"] is None and found["plan"] is None
    else:
        assert f"--method {use}" in found["command"]
        assert found["plan"]["peak_bytes"] > 1e8 and found["plan"]["step_seconds"] > 0


# goal and rows, GB that are there, the method that is expected where full needs 30, lora and mora 12, on 4 bits 5
NEEDS = {
    "full": 30e9,
    "lora": 12e9,
    "mora": 12e9,
    "alora": 12e9,
    "qlora": 5e9,
    "qmora": 5e9,
    "qalora": 5e9,
}
FITTING = [
    ("domain", 20000, 32, "full"),
    ("domain", 20000, 16, "lora"),
    ("domain", 20000, 8, "qlora"),
    ("domain", 20000, 4, "none"),
    ("style", 800, 12, "lora"),
    ("style", 800, 11, "qlora"),
    ("style", 800, 1, "none"),
    ("knowledge", 3000, 24, "mora"),
    ("knowledge", 3000, 6, "qmora"),
    ("switching", 500, 6, "qalora"),
    ("customers", 500, 5, "qlora"),
    ("facts-that-change", 10, 1, "find"),
    ("style", 0, 1, "prompt"),
]


def planned(told: Any) -> dict[str, Any]:
    """A plan on a machine of 16 GB, or of what is given."""
    peak, memory = NEEDS[told.method], 1e9 * (told.memory_gb or 16)
    cost = {
        "peak_bytes": peak,
        "machine_bytes": memory,
        "fits": peak <= memory,
        "remedies": [],
        "step_seconds": 1.0,
        "batch": {},
        "device": "cpu",
    }
    return {"cost": cost}


@pytest.mark.parametrize(("goal", "rows", "memory", "use"), FITTING)
def test_what_fits(
    goal: str, rows: int, memory: float, use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "plan", planned)
    found = advise(goal=goal, num_rows=rows, memory_gb=memory, base="x")
    assert found["use"] == use
    for lang in ("en", "es"):  # a method's name, or one of three labels; never a sentence
        cell = advise(goal=goal, num_rows=rows, memory_gb=memory, base="x", lang=lang).rows()[0][1]
        assert cell == (messages(lang)[use] if use in ("none", "find", "prompt") else use)
        assert len(cell) < 40
    assert (found["command"] is None) == (use in ("none", "find", "prompt"))


def test_the_machine_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "plan", planned)
    found = advise(goal="domain", num_rows=20000, base="x")
    assert found["use"] == "lora" and found["plan"]["machine"] == {
        "device": "cpu",
        "memory_bytes": 16e9,
        "detected": True,
    }
    assert ("this machine", "cpu, 16.00 GB") in found.rows()
    assert ("available memory", "cpu, 32.00 GB") in advise(
        goal="domain", num_rows=20000, base="x", memory_gb=32
    ).rows()


def test_the_real_machine_is_looked_at(tiny: Path) -> None:
    machine = advise(goal="style", num_rows=800, base=str(tiny))["plan"]["machine"]
    assert machine == {
        "device": choose_device("auto").type,
        "memory_bytes": 16e9,
        "detected": True,
    }, "conftest says 16 GB"


def test_pairs_alone_are_learned_at_once(tiny: Path) -> None:
    found = advise(goal="behaviour", num_rows=0, has_pairs=True, base=str(tiny))
    assert (
        found["then"] is None
        and found["command"].startswith("afina train PAIRS")
        and "--objective dpo" in found["command"]
    )


def test_preferences_come_after_answers(tiny: Path) -> None:
    with_pairs = advise(goal="behaviour", num_rows=400, has_pairs=True, base=str(tiny))
    assert "--objective dpo" in with_pairs["then"]
    assert (
        "afina annotate"
        in advise(goal="behaviour", num_rows=400, base=str(tiny))["reasons"][-1]["text"]
    )


def test_memory_decides(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit gives way to the nearest that does, and it says what would have been needed."""
    monkeypatch.setattr(module, "plan", planned)
    ask_for = {"goal": "domain", "num_rows": 20000, "base": "x"}
    small = advise(**ask_for)
    assert small["use"] == "lora" and small["settings"]["rank"] == 64
    assert any("30.00 GB, of 16.00 GB" in r["text"] for r in small["reasons"])
    smaller = advise(**ask_for, memory_gb=8)
    assert smaller["use"] == "qlora" and "--method qlora --rank 64" in smaller["command"]
    assert any(r["source"] == sources()["qlora"]["source"] for r in smaller["reasons"])
    none = advise(**ask_for, memory_gb=2)
    assert none["use"] == "none" and none["command"] is None
    assert "5.00 GB" in none["reasons"][-1]["text"]


def test_what_fits_with_smaller_batches_is_not_called_impossible(
    tiny: Path,
) -> None:
    given = {"base": str(tiny), "method": "qlora", "gradient_checkpointing": "all"}
    small, full = (
        plan(**given, max_tokens_per_batch=tokens)["cost"]["peak_bytes"] for tokens in (256, 2048)
    )
    memory = (small + full) / 2 / 0.95e9
    found = advise(goal="style", num_rows=800, base=str(tiny), memory_gb=memory)
    assert found["use"] in ("lora", "qlora") and "--max-tokens-per-batch" in found["command"]
    assert found["plan"]["peak_bytes"] <= 1e9 * memory
    assert "--max-tokens-per-batch" in found["reasons"][-1]["text"]


def test_without_a_plan_it_still_advises(tmp_path: Path) -> None:
    found = advise(goal="style", num_rows=800, base=str(tmp_path / "nothing"))
    assert found["use"] == "lora" and found["plan"] is None
    assert any("unknown" in r["text"] for r in found["reasons"])


def earlier(folder: Path, base: str, shown: bool) -> None:
    """A comparison in which mora was better than lora, or not surely."""
    figure = {"mean": 80.0, "low": 70.0, "high": 90.0}
    found = {
        "kind": module.KIND,
        "objective": "sft",
        "metric": "exact_match",
        "folder": "runs/mine",
        "settings": {"base": base, "rank": 16},
        "methods": {
            "lora": {"score": figure, "learning_rate": 0.001},
            "mora": {"score": figure, "learning_rate": 0.002},
        },
        "tests": [
            {"one": "lora", "other": "mora", "difference": {"mean": 9.0}, "significant": shown}
        ],
    }
    folder.mkdir(parents=True)
    (folder / "compare.json").write_text(json.dumps(found))


def test_ones_own_comparisons_go_first(tiny: Path, tmp_path: Path) -> None:
    earlier(tmp_path / "runs" / "mine", str(tiny), shown=True)
    found = advise(goal="style", num_rows=800, base=str(tiny))
    assert found["use"] == "mora" and "--learning-rate 0.002" in found["command"]
    assert any("runs/mine" in r["text"] for r in found["reasons"])


def test_a_difference_that_was_not_shown_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    earlier(tmp_path / "runs" / "mine", str(tiny), shown=False)
    earlier(tmp_path / "runs" / "other-base", "another", shown=True)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "compare.json").write_text("{")
    found = advise(goal="style", num_rows=800, base=str(tiny))
    assert found["use"] == "lora" and "--learning-rate 0.001" in found["command"]
    assert "shows no significant difference" in " ".join(r["text"] for r in found["reasons"])


def test_a_comparison_that_found_nothing_better_than_the_base_is_told(
    tiny: Path, tmp_path: Path
) -> None:
    earlier(tmp_path / "runs" / "mine", str(tiny), shown=False)
    file = tmp_path / "runs" / "mine" / "compare.json"
    file.write_text(
        json.dumps(
            json.loads(file.read_text()) | {"recommendation": {"use": "base", "kind": "base"}}
        )
    )
    found = advise(goal="style", num_rows=800, base=str(tiny))
    assert any("no method better than the base alone" in r["text"] for r in found["reasons"])
    assert "--learning-rate" not in found["command"], (
        "the rate of what did not help is not taken over"
    )


def test_the_interview_asks_for_what_is_missing() -> None:
    answers = {"What": "style", "How": "800"}
    made = ask(AdviseSettings(lang="es"), lambda text: answers[text.split()[0]])
    assert (made.goal, made.num_rows, made.lang) == ("style", 800, "es")
    assert ask(made, lambda text: pytest.fail("asked again")) == made
    with pytest.raises(SettingsError, match="goal cannot be 'fun'"):
        ask(AdviseSettings(), lambda text: "fun")
    with pytest.raises(SettingsError, match="num_rows is missing"):
        advise(goal="style")


def test_both_languages(tiny: Path) -> None:
    assert advise(goal="style", num_rows=800, base=str(tiny), lang="es").rows()[0] == (
        "usa",
        "lora",
    )
    found = advise(goal="facts-that-change", lang="es")
    assert found.rows() == [("usa", messages("es")["find"])]
    assert "recuperación" in found["reasons"][0]["text"]
