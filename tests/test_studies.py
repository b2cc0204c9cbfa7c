"""The frame of the reference study: recipes, parts, and a page that is made from the results."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "studies"))

import study  # noqa: E402
from tasks import TASKS, make_rows  # noqa: E402


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
        name = max((word.strip("?.:,") for word in row["prompt"].split() if word[0].isupper()), key=len)
        facts.setdefault(name, set()).add(row["completion"])
    assert all(len(numbers) == 1 for numbers in facts.values())
    assert {row["completion"] for row in make_rows("classify", 60, 3)} == {"past", "present", "pasado", "presente"}


def test_parts_are_comparisons_of_two_hours_at_most() -> None:
    for name, part in study.parts().items():
        settings = study.settings_of(name, part, Path("runs"))
        assert settings.seconds <= 7200 and part["task"] in TASKS
        assert settings.seeds >= (2 if name == "smoke" else 3)


def test_the_page_is_that_of_the_results() -> None:
    assert (ROOT / "studies" / "README.md").read_text(encoding="utf-8") == study.page()


def test_results_are_of_parts_that_are_there_and_name_no_folder() -> None:
    files = sorted((ROOT / "studies" / "results").glob("*.json"))
    assert files
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert found["part"] == file.stem in study.parts()
        assert found["settings"]["seeds"] == found["schedule"]["seeds_done"] or found["schedule"]["cut"] or found["notes"]
        assert "/" not in found["data"]["name"] and "out" not in found["settings"]
