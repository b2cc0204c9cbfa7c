"""Every recipe: its rows are those that are made, it runs, and its figures are those that were measured."""

import csv
import json
import operator
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "recipes"))

import measure  # noqa: E402
import rows as recipes  # noqa: E402
from words import ESPERANTO  # noqa: E402

NAMED = {  # what people ask for: the recipes that are for it
    "code assistant": "code",
    "arithmetic": "arithmetic",
    "grammar and spelling": "grammar",
    "summarising manuals": "manuals",
    "a company's tone": "tone",
    "a genre, legal": "legal",
    "a genre, literary": "literary",
    "another language": "language",
    "medicine": "medicine",
    "finance": "finance",
    "following instructions": "instructions",
    "customer service": "service",
    "sentiment": "sentiment",
    "preferences": "preferences",
}


def rows_of(name: str) -> list[dict[str, str]]:
    file, _ = recipes.written(name)
    if file.suffix == ".csv":
        return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_there_is_one_for_each_use() -> None:
    assert sorted(NAMED.values()) == measure.names() == sorted(recipes.ROWS)
    for use, name in NAMED.items():
        assert use.lower() in measure.described(name).lower()


@pytest.mark.parametrize("name", measure.names())
def test_its_rows_are_those_that_are_made(name: str) -> None:
    file, text = recipes.written(name)
    assert file.read_text(encoding="utf-8") == text
    assert measure.settings_of(name).data == file.relative_to(ROOT)
    made = rows_of(name)
    assert (
        len({row.get("prompt") or row["text"] for row in made})
        == len(made)
        == recipes.ROWS[name][1]
    )
    assert all(value.strip() == value and value for row in made for value in row.values())
    assert file.stat().st_size < 400_000


def test_answers_are_right() -> None:
    for row in rows_of("arithmetic"):
        a, _, b, _ = row["prompt"].split()
        assert int(a) + int(b) == int(row["completion"])
    for row in rows_of("code"):
        compile(row["completion"], "<row>", "exec")
    for row in rows_of("grammar"):
        question = row["prompt"].partition(": ")[2]
        assert (
            question != row["completion"]
            and row["completion"][-1] == "."
            and row["completion"][0].isupper()
        )
    for row in rows_of("literary"):
        assert not re.search(r"[^aeiou]yeth|eeth ", row["completion"].replace("seeth ", "")), row


def test_code_does_what_was_wished() -> None:
    numbers = [30, 5, 99, 50]
    simple = {
        "sum of": 184,
        "largest of": 99,
        "smallest of": 5,
        "how many": 4,
        "first of": 30,
        "last of": 50,
        "sort": [5, 30, 50, 99],
    }
    checked = set()
    for row in rows_of("code"):
        wish, line = row["prompt"].removeprefix("Python: "), row["completion"]
        if found := re.fullmatch(
            r"(sum of|largest of|smallest of|how many|first of|last of|sort) (\w+)", wish
        ):
            assert eval(line, {found[2]: numbers}) == simple[found[1]], row
        elif found := re.fullmatch(r"(\w+) (above|below|without) (\d+)", wish):
            keep = {"above": operator.gt, "below": operator.lt, "without": operator.ne}[found[2]]
            assert eval(line, {found[1]: numbers}) == [
                x for x in numbers if keep(x, int(found[3]))
            ], row
        else:
            continue
        checked |= {word for word in found.groups() if not word.isdigit()}
    assert checked >= {*simple, "above", "below", "without"}


def test_words_of_a_review_decide_its_label() -> None:
    for row in rows_of("sentiment"):
        last = row["text"].rstrip(".").split(" but ")[-1].split()
        good = (last[-1] in recipes.GOOD) != ("not" in last)
        assert row["label"] == ("good" if good else "bad"), row


def test_esperanto_is_regular() -> None:
    assert len(ESPERANTO) > 100
    for row in rows_of("language"):
        words = row["completion"].rstrip(".").lower().split()
        assert any(word.endswith(("as", "is")) for word in words), row
        nouns = [word for word in words if re.search(r"(o|a)j?n?$", word) and word != "la"]
        for one, other in pairwise(nouns):
            if one.rstrip("jn").endswith("a"):  # an adjective agrees with the noun after it
                assert re.search(r"j?n?$", one)[0] == re.search(r"j?n?$", other)[0], row


def test_a_fact_has_one_answer() -> None:
    for name, table in (("medicine", recipes.MEDICINE), ("finance", recipes.FINANCE)):
        assert len({what for what, _ in table}) == len(table)
        assert {row["completion"].rstrip(".").lower() for row in rows_of(name)} == {
            answer.lower() for _, answer in table
        }


def test_the_page_is_that_of_the_results() -> None:
    found = measure.found()
    assert measure.page(found) == measure.PAGE.read_text(encoding="utf-8"), (
        "python recipes/measure.py"
    )
    kept = json.loads(measure.RESULTS.read_text(encoding="utf-8"))
    assert sorted(kept) == sorted(found), (
        "these were measured with other rows or settings: python recipes/measure.py"
    )
    for name, result in found.items():
        settings = measure.settings_of(name)
        told = {
            "method": settings.method,
            "rank": settings.rank,
            "steps": settings.max_steps,
            "what": measure.described(name),
        }
        assert told.items() <= result.items()
        assert (
            0.0 <= result["before"] <= 100.0
            and result["held_out"] >= 30
            and result["cpu_seconds"] < 450  # on a core without AVX-512
        )


def test_what_was_measured_with_other_settings_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    file.write_text(
        json.dumps(
            {
                "tone": {"made_of": measure.made_of("tone")},
                "legal": {"made_of": "0"},
                "gone": {"made_of": "0"},
            }
        )
    )
    monkeypatch.setattr(measure, "RESULTS", file)
    assert list(measure.found()) == ["tone"]
    assert (
        "| `legal` | A genre, legal: what two people have agreed on, as the clause of a contract | not measured yet |"
        in measure.page({})
    )


@pytest.fixture(scope="module")
def general(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A little text on which forgetting is measured: the built-in one takes longer than two steps."""
    file = tmp_path_factory.mktemp("general") / "general.txt"
    file.write_text(
        "The old king lived in a castle by the sea.\n\n\nEl viejo rey vivía en un castillo.",
        encoding="utf-8",
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", measure.names())
def test_two_steps_of_it(name: str, general: Path, tmp_path: Path) -> None:
    settings = measure.settings_of(name)
    data = tmp_path / settings.data.name
    lines = (ROOT / settings.data).read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:25]), encoding="utf-8")
    told: dict[str, Any] = {
        "data": data,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "eval_size": 0.2,
    }
    if "label" not in lines[0]:  # a classifier has no retention loss
        told["retention_text"] = general
    result = measure.measure(name, longest=8, **told)
    assert 0.0 <= result["before"] <= 100.0 and 0.0 <= result["after"] <= 100.0
    assert result["metric"] in measure.NAMES and result["held_out"] in (4, 5)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
