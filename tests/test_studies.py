"""The frame of the reference study: recipes, parts, and a page that is made from the results."""

import json
import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from afina.comparison import findings as published
from afina.comparison.advise import advise
from afina.comparison.findings import claims, messages

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import study  # noqa: E402
import summary  # noqa: E402
from claims import CLAIMS  # noqa: E402
from tasks import TASKS, make_rows  # noqa: E402
from verdicts import CONFIRMED, DEPENDS, OPEN, REFUTED, as_good, better, gap, less  # noqa: E402


@pytest.mark.parametrize("task", TASKS)
def test_recipes_make_different_rows_by_their_seed(task: str) -> None:
    rows = make_rows(task, 60, 1)
    assert rows == make_rows(task, 60, 1) != make_rows(task, 60, 2)
    assert len({json.dumps(row) for row in rows}) == 60
    assert all(text.strip() for row in rows for text in row.values())


def test_answers_are_right() -> None:
    for row in make_rows("add", 40, 3):
        a, _, b, _ = row["prompt"].split()
        assert int(a) + int(b) == int(row["completion"])
    facts: dict[str, set[str]] = {}
    for row in make_rows("memorise", 40, 3):
        name = max(
            (word.strip("?.:,") for word in row["prompt"].split() if word[0].isupper()), key=len
        )
        facts.setdefault(name, set()).add(row["completion"])
    assert all(len(numbers) == 1 for numbers in facts.values())
    assert {row["completion"] for row in make_rows("classify", 60, 3)} == {
        "past",
        "present",
        "pasado",
        "presente",
    }


def test_parts_are_comparisons_of_two_hours_at_most() -> None:
    for name, part in study.parts().items():
        settings = study.settings_of(name, part, Path("runs"))
        assert settings.seconds <= 7200 and part["task"] in TASKS
        assert settings.num_seeds >= (2 if name == "smoke" else 3)


@pytest.mark.slow
def test_the_pages_are_those_of_the_results() -> None:
    done = study.read_results()
    assert (ROOT / "studies" / "README.md").read_text(encoding="utf-8") == study.page(done)
    assert (ROOT / "docs" / "study.md").read_text(encoding="utf-8") == (
        told := summary.summary(done)
    )
    assert json.loads(study.STUDIED.read_text(encoding="utf-8")) == study.heard(done)
    drawn = summary.draw(done)
    for name, picture in drawn.items():
        assert f"(study/{name}.svg)" in told
        there = (ROOT / "docs" / "study" / f"{name}.svg").read_text(encoding="utf-8")
        texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
        assert (
            texts and re.findall(r"<text[^>]*>([^<]*)</text>", there) == texts
        )  # paths differ by matplotlib's version
    assert sorted(file.stem for file in (ROOT / "docs" / "study").glob("*.svg")) == sorted(drawn)


def test_results_are_of_parts_that_are_there_and_name_no_folder() -> None:
    files = sorted((ROOT / "studies" / "results").glob("*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["part"] == file.stem in study.parts()
        assert (
            found["settings"]["seeds"] == found["schedule"]["seeds_done"]
            or found["schedule"]["cut"]
            or found["notes"]
        )
        assert "/" not in found["data"]["name"] and "output_dir" not in found["settings"]


# ---- claims


def result(metric: str, shown: bool, mean: float, low: float, high: float) -> dict[str, Any]:
    """A comparison in which `a` is better than `b` by `mean`, of which the interval is given."""
    test = {
        "one": "b",
        "other": "a",
        "difference": {"mean": mean, "low": low, "high": high},
        "significant": shown,
    }
    figure = {"mean": 0.2, "low": 0.1, "high": 0.3}
    worse = {"mean": 0.5, "low": 0.4, "high": 0.6}
    return {
        "metric": metric,
        "tests": [test],
        "methods": {"a": {"forgetting": figure}, "b": {"forgetting": worse}},
    }


def test_a_gap_is_turned_so_that_more_is_better() -> None:
    found = result("exact_match", True, 8.0, 2.0, 15.0)
    one, other = gap(found, "a", "b"), gap(found, "b", "a")
    assert (one.mean, one.low, one.high) == (8.0, 2.0, 15.0) and (
        other.mean,
        other.low,
        other.high,
    ) == (-8.0, -15.0, -2.0)
    assert str(one) == "+8.0 [+2.0, +15.0] points" and "nats" in str(
        gap(result("loss", True, 0.1, 0.0, 0.2), "a", "b")
    )
    with pytest.raises(KeyError, match="were not compared"):
        gap(found, "a", "c")


@pytest.mark.parametrize(
    ("found", "good", "wins"),
    [
        (result("exact_match", True, 8.0, 2.0, 15.0), True, True),  # shown to be better
        (
            result("exact_match", False, 1.0, -3.0, 4.5),
            True,
            False,
        ),  # any difference is below the margin
        (result("exact_match", False, 1.0, -9.0, 11.0), None, None),  # nothing can be told
        (result("exact_match", True, -9.0, -15.0, -3.0), False, False),  # shown to be worse
        (
            result("exact_match", True, -2.0, -6.0, -1.0),
            None,
            False,
        ),  # worse, perhaps by less than the margin
        (result("loss", True, -0.2, -0.3, -0.1), False, False),
        (result("loss", True, -0.01, -0.02, -0.005), True, False),
    ],
)
def test_what_a_part_says(found: dict[str, Any], good: bool | None, wins: bool | None) -> None:
    assert as_good("a", "b")({"x": found}, "x").holds is good
    assert better("a", "b")({"x": found}, "x").holds is wins


def test_less_is_told_where_intervals_do_not_touch() -> None:
    found = {"x": result("loss", True, 0.1, 0.0, 0.2)}
    assert less("forgetting", "a", "b")(found, "x").holds is True
    assert less("forgetting", "b", "a")(found, "x").holds is False
    found["x"]["methods"]["b"]["forgetting"] = {"mean": 0.3, "low": 0.25, "high": 0.35}
    assert less("forgetting", "a", "b")(found, "x").holds is None


def test_a_verdict_is_that_of_all_parts() -> None:
    claim = next(claim for claim in CLAIMS if claim.name == "dora")
    parts = {
        "won": result("loss", True, 0.2, 0.1, 0.3),
        "lost": result("loss", True, -0.2, -0.3, -0.1),
        "wide": result("loss", False, 0.0, -0.3, 0.3),
    }

    def verdict(*names: str) -> str:
        return replace(claim, parts=(*names, "not there"), judge=better("a", "b")).verdict(parts)

    assert verdict() == OPEN
    assert verdict("won") == CONFIRMED and verdict("lost") == REFUTED and verdict("wide") == DEPENDS
    assert (
        verdict("won", "lost") == verdict("won", "wide") == DEPENDS
        and verdict("lost", "wide") == REFUTED
    )


def test_claims_can_be_decided_by_parts_that_are_there() -> None:
    parts = study.parts()
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert set(claim.parts) <= set(parts) and set(claim.plain) == {CONFIRMED, REFUTED, DEPENDS}
        for point in claim.points(study.read_results()):
            assert re.search(r"\d", point.figures)


SITUATIONS = {
    "as-good": ("style", 800),
    "learns-less": ("domain", 300),
    "mora-facts": ("knowledge", 800),
}


@pytest.mark.parametrize("lang", ["en", "es"])
@pytest.mark.parametrize("claim", SITUATIONS)
def test_the_advice_says_what_the_study_found(
    claim: str, lang: str, tiny: Path, tmp_path: Path
) -> None:
    """Where the study does not bear out what the advice rests on, the advice says both; the figures are the committed ones."""
    goal, rows = SITUATIONS[claim]
    said = " ".join(
        f"{r['text']} {r['study']}"
        for r in advise(goal=goal, num_rows=rows, base=str(tiny), lang=lang, past_runs=tmp_path)[
            "reasons"
        ]
    )
    heard = study.heard(study.read_results())
    found = heard.get(claim)
    assert claim in claims().values()
    if found is None:
        for other in heard.values():  # the same advice may rest on these, too
            said = said.replace(other["figures"], "")
        assert not any(figures in said for figures in ("lora − full", "full − lora", "mora − lora"))
    else:
        key = "study_" + found["verdict"].replace(" ", "_")
        assert messages(lang)[key].format(figures=found["figures"]) in said


def test_a_finding_that_the_study_did_not_bear_out_is_told_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for verdict, words in (
        ("confirmed", "agrees"),
        ("not confirmed", "did not show it"),
        ("depends", "it depends"),
    ):
        monkeypatch.setattr(
            published,
            "studied",
            lambda v=verdict: {"mora-facts": {"verdict": v, "figures": "+1.0"}},
        )
        assert words in published.study_note("mora_facts", "en") and "+1.0" in published.study_note(
            "mora_facts", "es"
        )
        assert published.study_note("regret", "en") is None


def as_if_run(name: str) -> dict[str, Any]:
    """A result of part `name` with the figures of `smoke`, whatever they are."""
    found = study.read_results()["smoke"]
    part = study.parts()[name]
    own = found["methods"]["lora"]
    found["methods"] = dict.fromkeys(part["methods"], own)
    found["metric"] = part.get("metric", found["metric"])
    found["nf4_figures"] = found["base_figures"]
    found["tests"] = [
        dict(found["tests"][0], one=a, other=b)
        for a, b in combinations(["base", *part["methods"]], 2)
    ]
    return found | {"part": name, "task": part["task"]}


@pytest.mark.slow
def test_the_pages_can_be_made_of_all_parts() -> None:
    """Each claim is decided once its parts have run, and each picture drawn: no part has to run for that to be known."""
    done = {name: as_if_run(name) for name in study.parts()}
    told = summary.summary(done)
    assert OPEN not in told.lower() and all(claim.says in told for claim in CLAIMS)
    page = study.page(done)
    assert "not run yet" not in page.lower() and all(f"## {name}" in page for name in done)
    assert set(summary.draw(done)) == set(summary.PICTURES) and all(
        "<svg" in picture for picture in summary.draw(done).values()
    )
    assert set(study.heard(done)) == {claim.name for claim in CLAIMS}
