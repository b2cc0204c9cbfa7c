"""`afina compare`: one small comparison from rows to report, cut off and gone on with; its budget, failures, words."""

import json
import re
import shlex
import string
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from afina.adapters.active import BASE_ONLY
from afina.comparison import compare as module
from afina.comparison import runs as runs_module
from afina.comparison.analysis import min_rows_to_differ, pairs, recommend
from afina.comparison.compare import compare
from afina.comparison.cost_probe import measure, measure_in_subprocess
from afina.comparison.findings import load_findings
from afina.comparison.messages import load_messages
from afina.comparison.report import command, interval, write_report
from afina.comparison.schedule import (
    choose_schedule,
    rates_to_try,
    rungs,
    seed_seconds,
    steps_that_fit,
)
from afina.comparison.split import pieces
from afina.data.packing import pack_examples
from afina.data.renderer import Renderer
from afina.data.schemas import SFT
from afina.data.table import read_table
from afina.errors import DataError, SettingsError
from afina.models.loading import load_base
from afina.objectives.language_data import tokenize_rows
from afina.objectives.language_modeling import batch_loss, example_losses
from afina.settings import CompareSettings, TrainSettings, make_settings
from helpers import write_rows

ASKED: dict[str, Any] = {
    "methods": ["lora", "mora", "full", "first"],
    "lr_search_range": [0.5, 20.0],
    "variants": {"first": {"method": "qlora", "layers": "first:1", "rank": 1}},
    "num_seeds": 2,
    "num_trials": 2,
    "max_steps": 6,
    "limit": 6,
    "max_new_tokens": 6,
    "rank": 2,
    "max_tokens_per_batch": 256,
    "time_budget": "20m",
    "metric": "exact_match",
}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs are measured here: a process for each method takes seconds; the last test of the room has them."""
    monkeypatch.setattr(
        module, "measure_in_subprocess", lambda settings, seconds: measure(settings)
    )


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, chats: Path, general: Path
) -> dict[str, Any]:
    """A comparison that was cut off twice, in the search and when a run was to be judged, and gone on with."""
    patch = pytest.MonkeyPatch()
    patch.setattr(module, "measure_in_subprocess", lambda settings, seconds: measure(settings))
    asked = ASKED | {
        "base": str(tiny),
        "retention_text": general,
        "output_dir": tmp_path_factory.mktemp("compare") / "out",
    }
    calls = {"train": 0, "judge": 0}

    def cut_off(which: str, real: Any, at: int) -> Any:
        def call(*arguments: Any) -> Any:
            calls[which] += 1
            if calls[which] == at:
                raise KeyboardInterrupt
            return real(*arguments)

        return call

    patch.setattr(runs_module, "train_many", cut_off("train", runs_module.train_many, 2))
    patch.setattr(module.RunScorer, "run", cut_off("judge", module.RunScorer.run, 2))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compare(chats, **asked)
    result = compare(chats, **asked)
    patch.undo()
    return result


@pytest.mark.slow
def test_everything_is_reported(made: dict[str, Any]) -> None:
    assert set(made["methods"]) == {"lora", "mora", "full", "first"}
    for name, found in made["methods"].items():
        assert found["seeds"] == 2
        assert [steps for _, steps, _ in found["tried"]] == [3, 3]  # as many trials for each
        for figure in ("score", "loss", "loss_change", "overfitting"):
            assert found[figure]["low"] <= found[figure]["mean"] <= found[figure]["high"], (
                name,
                figure,
            )
        assert abs(found["forgetting"]["mean"]) < 1.0
        for cost in (
            "trainable_parameters",
            "adapter_kb",
            "peak_mb",
            "step_seconds",
            "run_seconds",
            "joules",
        ):
            assert found[cost] > 0
        assert len(found["curves"]) == 2 and found["curves"][0][-1][0] == 6
    assert (
        made["methods"]["full"]["trainable_parameters"]
        > 10 * made["methods"]["lora"]["trainable_parameters"]
    )
    assert len(made["tests"]) == 10  # each pair, the base among them
    assert made["recommendation"]["use"] in ("base", *made["methods"])
    assert made["data"]["train"] + made["data"]["choose"] + made["data"]["test"] == 48


def test_a_variant_has_its_own_settings_and_the_base_in_four_bits_a_line(
    made: dict[str, Any],
) -> None:
    first, lora = (made["methods"][name]["trainable_parameters"] for name in ("first", "lora"))
    assert 0 < first <= lora / 4  # half the rank, half the blocks
    told = (Path(made["folder"]) / "runs/first-0/settings.yaml").read_text()
    assert "method: qlora" in told and "first:1" in told
    assert made["nf4_figures"]["loss"]["mean"] != made["base_figures"]["loss"]["mean"]
    assert "base in 4 bits" in (Path(made["folder"]) / "report.md").read_text()
    for told, why in (
        ({"x": {"rank": 4}}, "needs a method"),
        ({"x": {"method": "lora", "max_steps": 3}}, "cannot have max_steps"),
    ):
        with pytest.raises(SettingsError, match="variants") as raised:
            make_settings(CompareSettings, {"data": "a.csv", "variants": told})
        assert why in str(raised.value)
    with pytest.raises(SettingsError, match="lr_search_range"):
        make_settings(CompareSettings, {"data": "a.csv", "lr_search_range": [2.0, 1.0]})


def test_no_row_is_on_two_sides(made: dict[str, Any]) -> None:
    sides = [
        set((Path(made["folder"]) / f"{kind}.jsonl").read_text().splitlines())
        for kind in ("train", "choose", "test")
    ]
    assert all(sides)
    assert not (sides[0] & sides[1] or sides[1] & sides[2] or sides[0] & sides[2])


@pytest.mark.slow
def test_what_was_cut_off_is_what_would_have_been(
    made: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    """The same without a cut, one seed of it: every curve and every judged row, to the last digit."""
    asked = {name: made["settings"][name] for name in (*ASKED, "base", "retention_text")} | {
        "num_seeds": 1
    }
    compare(chats, **asked, output_dir=tmp_path / "again")
    for name in made["methods"]:
        one, other = (
            json.loads((f / f"judged/{name}-0.json").read_text())
            for f in (Path(made["folder"]), tmp_path / "again")
        )
        assert one == other


@pytest.mark.slow
def test_done_is_not_done_again(
    made: dict[str, Any], chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Spanish, from what is there; other settings are another comparison, and so are other rows."""
    monkeypatch.setattr(runs_module, "train_many", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(module.RunScorer, "run", lambda *_: pytest.fail("judged again"))
    asked = {
        name: made["settings"][name] for name in (*ASKED, "base", "retention_text", "output_dir")
    }
    again = compare(chats, **(asked | {"lang": "es"}))
    assert again["methods"] == made["methods"]
    assert "Coste" in (Path(made["folder"]) / "report.html").read_text()
    with pytest.raises(SettingsError, match="rank is 2 in this comparison, 4 now"):
        compare(chats, **(asked | {"rank": 4}))
    rows = write_rows(
        Path(made["folder"]).parent / "other.jsonl",
        *[{"prompt": f"a{n}", "completion": "b"} for n in range(20)],
    )
    with pytest.raises(DataError, match="the data has changed"):
        compare(rows, **asked)


class Page(HTMLParser):
    """Tags, what they point at, and whether all are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.targets += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
@pytest.mark.parametrize("lang", ["en", "es"])
def test_the_page_needs_nothing_from_elsewhere(
    made: dict[str, Any], lang: str, tmp_path: Path
) -> None:
    example = made["examples"][0] | {"base": "<script>alert(1)</script> | `x`"}
    write_report(dict(made) | {"examples": [example]}, tmp_path, lang)
    text, markdown = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    page = Page()
    page.feed(text)
    assert not {"script", "iframe", "img", "object"} & set(page.seen)
    assert all(target.startswith(("#", "data:")) for target in page.targets), page.targets
    assert "url(http" not in text and "@import" not in text
    assert page.seen.count("svg") == 6  # quality, three trades, curves, rates
    assert page.open == []
    assert "<script" not in markdown
    for name in made["methods"]:
        assert name in text and name in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {5, 6, 8}


def test_the_command_runs_it_again(made: dict[str, Any]) -> None:
    from afina.cli.main import parse

    _, settings, _ = parse(shlex.split(command(made))[1:])
    assert isinstance(settings, CompareSettings)
    assert {name: getattr(settings, name) for name in ASKED} == {
        name: made["settings"][name] for name in ASKED
    }


def test_languages_say_the_same() -> None:
    for key, texts in (load_messages() | load_findings()["messages"]).items():
        assert set(texts) == {"en", "es"}, key
        gaps = [
            {gap for _, gap, _, _ in string.Formatter().parse(text) if gap}
            for text in texts.values()
        ]
        assert gaps[0] == gaps[1], key


@pytest.mark.slow
def test_a_method_that_fails_is_reported(
    chats: Path, tiny: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at its cost, another at its runs; the third has its figures."""

    def costs(settings: Any, seconds: float) -> dict[str, Any]:
        return {"failed": "out of memory"} if settings.method == "full" else measure(settings)

    def train(runs: Any) -> Any:
        if any(run.method == "mora" for run in runs):
            raise RuntimeError("the device gave up")
        return real(runs)

    real = runs_module.train_many
    monkeypatch.setattr(module, "measure_in_subprocess", costs)
    monkeypatch.setattr(runs_module, "train_many", train)
    asked = ASKED | {
        "methods": ["lora", "mora", "full"],
        "num_seeds": 1,
        "num_trials": 1,
        "max_steps": 2,
        "limit": 2,
        "max_new_tokens": 2,
    }
    found = compare(
        chats, **asked, base=str(tiny), retention_text=general, output_dir=tmp_path / "out"
    )
    assert list(found["methods"]) == ["lora"]
    assert found["failed"] == {"full": "out of memory", "mora": "seed 0: the device gave up"}
    assert "the device gave up" in (tmp_path / "out" / "report.html").read_text()


# ---- other rows


@pytest.mark.slow
def test_labels(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"text": f"{word} {number}", "label": word}
        for word in ("sol", "luna")
        for number in range(12)
    ]
    file = write_rows(tmp_path / "labels.jsonl", *rows)
    asked = ASKED | {
        "metric": "auto",
        "methods": ["lora"],
        "num_trials": 1,
        "max_steps": 2,
        "num_seeds": 1,
    }
    found = compare(file, **asked, base=str(tiny), output_dir=tmp_path / "out")
    assert found["metric"] == "accuracy" and "forgetting" not in found["methods"]["lora"]
    assert found["base_figures"]["score"]["mean"] == 50.0  # the commonest class
    test = (tmp_path / "out" / "test.jsonl").read_text()
    assert test.count('"label": "sol"') == test.count('"label": "luna"') > 0
    with pytest.raises(DataError, match="fewer than three different rows"):
        compare(
            write_rows(tmp_path / "few.jsonl", *rows, {"text": "x", "label": "rare"}),
            base=str(tiny),
            output_dir=tmp_path / "few",
        )


def test_text_in_pieces() -> None:
    text = "One sentence of some length is here. " * 100 + "\n\nAnother part.\n" * 30
    cut = pieces(text)
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 900 and len(cut) > 4


def test_mistakes_say_what_to_do(chats: Path, tiny: Path, tmp_path: Path) -> None:
    few = write_rows(
        tmp_path / "few.jsonl", *[{"prompt": f"a{n}", "completion": "b"} for n in range(4)]
    )
    with pytest.raises(DataError, match="4 rows: too few"):
        compare(few, base=str(tiny), output_dir=tmp_path / "a")
    with pytest.raises(SettingsError, match="unknown method 'lorra'"):
        compare(chats, base=str(tiny), methods=["lorra"], output_dir=tmp_path / "b")
    with pytest.raises(SettingsError, match="budget cannot be"):
        compare(chats, time_budget="soon")
    with pytest.raises(SettingsError, match="methods cannot be"):
        compare(chats, methods=["lora", "lora"])
    preferred = write_rows(
        tmp_path / "pairs.jsonl",
        *[{"prompt": f"a{n}", "chosen": "b", "rejected": "c"} for n in range(12)],
    )
    with pytest.raises(SettingsError, match="compare cannot judge dpo"):
        compare(preferred, base=str(tiny), output_dir=tmp_path / "c")


def test_a_budget_in_which_nothing_fits(
    chats: Path, tiny: Path, general: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = {"other_seconds": 100.0, "step_seconds": 1.0}
    monkeypatch.setattr(module, "measure_in_subprocess", lambda settings, seconds: cost)
    with pytest.raises(SettingsError, match="the budget of 60s is too small") as caught:
        compare(
            chats,
            **(ASKED | {"time_budget": "60s"}),
            base=str(tiny),
            retention_text=general,
            output_dir=tmp_path / "out",
        )
    assert "--time-budget" in (caught.value.hint or "")


def test_losses_of_rows_are_those_of_the_loss(tiny: Path, chats: Path) -> None:
    base = load_base(str(tiny))
    examples = tokenize_rows(
        "sft", Renderer(base.tokenizer, None, 192), read_table(chats, SFT).rows, None
    )
    found = [one.total for one in example_losses(base, examples, 200, BASE_ONLY)]
    loss = batch_loss(base, pack_examples(examples).to(base.device), BASE_ONLY).item()
    assert sum(found) == pytest.approx(loss, rel=1e-6)
    assert found[7] == pytest.approx(
        example_losses(base, [examples[7]], 200, BASE_ONLY)[0].total, abs=1e-4
    )


# ---- the budget


def test_halving() -> None:
    assert rungs(4, 100) == [(4, 25), (2, 50)]
    assert rungs(8, 80) == [(8, 10), (4, 20), (2, 40)]
    assert rungs(3, 8) == [(3, 2), (2, 4)]
    assert rungs(1, 100) == []
    four = rates_to_try(2e-4, 4, [0.35, 35.0])
    assert np.allclose(np.diff(np.log(four)), np.log(four[1] / four[0]), atol=0.01)
    assert four[0] < 2e-4 < four[-1] and rates_to_try(2e-5, 1, [3.0, 100.0]) == [2e-5]


def test_the_schedule_fits_and_asks_for_no_more_than_was_asked() -> None:
    costs = {name: {"other_seconds": 5.0, "step_seconds": 0.5} for name in "abc"}
    before = float("inf")
    for budget in (1e5, 3000, 1500, 800, 400, 200, 100):
        plan = choose_schedule(costs, 4.0, 4, 200, 3, budget)
        assert plan.seconds <= budget or (plan.trials, plan.seeds, plan.steps) == (1, 1, 20)
        assert plan.trials <= 4 and plan.seeds <= 3 and plan.steps <= 200
        assert plan.seconds <= before
        before = plan.seconds
    assert choose_schedule(costs, 4.0, 4, 200, 3, 1e5).cut == []
    assert choose_schedule(costs, 4.0, 4, 200, 3, 1500).cut != []


def test_a_machine_that_became_slow_takes_fewer_steps() -> None:
    costs = {name: {"other_seconds": 5.0, "step_seconds": 0.5} for name in "abc"}
    assert steps_that_fit(costs, 4.0, 200, 1.0, 1e5) == 200
    for pace, seconds in ((1.0, 100.0), (3.0, 200.0)):
        steps = steps_that_fit(costs, 4.0, 200, pace, seconds)
        assert 1 < steps < 200
        assert pace * sum(seed_seconds(cost, steps, 4.0) for cost in costs.values()) <= seconds
        assert pace * sum(seed_seconds(cost, steps + 1, 4.0) for cost in costs.values()) > seconds
    assert steps_that_fit(costs, 4.0, 200, 9.0, 10.0) == 1


# ---- what may be said


def judged(scores: np.ndarray) -> list[dict[str, Any]]:
    """Runs whose scores are a table (S, N)."""
    rows = scores.shape[1]
    return [
        {"losses": [1.0] * rows, "labels": [1] * rows, "scores": {"exact_match": list(row)}}
        for row in scores
    ]


def advise_on(tables: dict[str, np.ndarray], costs: dict[str, float]) -> dict[str, Any]:
    base = judged(np.zeros((1, 60)))[0]
    tested = pairs({name: judged(table) for name, table in tables.items()}, base, "exact_match")
    figures = {
        name: {
            "score": {"mean": float(table.mean())},
            "peak_mb": costs[name],
            "run_seconds": 1.0,
            "adapter_kb": 1.0,
        }
        for name, table in tables.items()
    }
    return recommend(figures, tested, "exact_match")


def right(random: np.random.Generator, share: float) -> np.ndarray:
    return 100.0 * (random.random((3, 60)) < share)


def test_the_better_one_is_named() -> None:
    random = np.random.default_rng(0)
    advice = advise_on({"a": right(random, 0.9), "b": right(random, 0.4)}, {"a": 9.0, "b": 1.0})
    assert advice["use"] == "a" and advice["kind"] == "best"
    assert [key for key, _ in advice["reasons"]] == ["helps", "better_than"]


def test_no_difference_is_said_and_the_cheaper_named() -> None:
    random = np.random.default_rng(1)
    tables = {"a": right(random, 0.7), "b": right(random, 0.68), "c": right(random, 0.1)}
    advice = advise_on(tables, {"a": 9.0, "b": 1.0, "c": 0.1})
    assert (
        advice["use"] == "b"
        and advice["kind"] == "cheapest"
        and set(advice["indistinguishable"]) == {"a", "b"}
    )
    reasons = dict(advice["reasons"])
    assert {"no_difference", "may_hide", "peak_mb"} <= set(reasons)
    assert reasons["may_hide"]["amount"] > 1.0


def test_nothing_helps_is_said() -> None:
    random = np.random.default_rng(2)
    advice = advise_on({"a": right(random, 0.01), "b": right(random, 0.01)}, {"a": 1.0, "b": 1.0})
    assert advice["use"] == "base" and advice["reasons"][0][0] == "no_gain"
    base = judged(np.zeros((1, 60)))[0]
    (test,) = pairs({"a": judged(np.zeros((3, 60)))}, base, "exact_match")
    assert (
        test["difference"]["high"] > 5.0 and not test["significant"]
    )  # no row differed, and sixty rows are not all


@pytest.mark.parametrize(
    ("rows", "shown"), [(min_rows_to_differ(3) - 1, False), (min_rows_to_differ(3), True)]
)
def test_with_fewer_rows_no_difference_can_be_shown(rows: int, shown: bool) -> None:
    """All right against all wrong: the largest difference that there is."""
    base = judged(np.zeros((1, rows)))[0]
    found = pairs(
        {"a": judged(np.full((3, rows), 100.0)), "b": judged(np.zeros((3, rows)))},
        base,
        "exact_match",
    )
    test = next(t for t in found if (t["one"], t["other"]) == ("base", "a"))
    assert test["significant"] is shown
    assert (
        40.0 < test["difference"]["low"] < 100.0 == test["difference"]["high"]
    )  # so few rows are not all


def test_no_difference_of_percents_goes_beyond_a_hundred() -> None:
    one = np.full((3, 12), 100.0)
    one[1, 0] = 0.0
    (test,) = pairs({"a": judged(one)}, judged(np.zeros((1, 12)))[0], "exact_match")
    assert (
        test["difference"]["low"] < test["difference"]["mean"] < test["difference"]["high"] == 100.0
    )


def test_alarms_of_the_whole_report() -> None:
    """Four methods that are the same: in at most 5 of 100 reports is one called better than another."""
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(60):
        rows = random.random((1, 60))
        tables = {
            name: 100.0 * (0.6 * random.random((3, 60)) + 0.7 * rows > 0.65) for name in "abcd"
        }
        base = judged(tables.pop("d"))[0]
        alarms += any(
            t["significant"]
            for t in pairs({n: judged(t) for n, t in tables.items()}, base, "exact_match")
        )
    assert alarms <= 7  # 3 expected at most; 8 or more come once in 100 times


def test_an_interval_is_written_whole() -> None:
    assert interval({"mean": 84.12, "low": 80.0, "high": 88.3}, "{:.1f}") == "84.1 [80.0, 88.3]"
    assert interval({"mean": 84.12, "low": None, "high": None}, "{:.1f}") == "84.1"


def test_settings() -> None:
    made_settings = make_settings(
        CompareSettings, {"data": "x.jsonl", "time_budget": "1.5h", "methods": "lora, dora"}
    )
    assert made_settings.seconds == 5400.0 and made_settings.methods == ["lora", "dora"]


@pytest.mark.slow
def test_each_method_in_its_own_process(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    run = TrainSettings(
        data=chats,
        base=str(tiny),
        retention_text=general,
        max_steps=3,
        output_dir=tmp_path / "lora",
    )
    found = measure_in_subprocess(run)
    assert found["steps"] == 3 and found["step_seconds"] > 0 and found["peak_mb"] > 50
    broken = measure_in_subprocess(
        run.model_copy(
            update={"target_modules": "no_such_layer", "output_dir": tmp_path / "broken"}
        )
    )
    assert "matches no module" in broken["failed"]
    assert (
        "4 steps took longer than the 0.1 s"
        in measure_in_subprocess(run.model_copy(update={"output_dir": tmp_path / "late"}), 0.1)[
            "failed"
        ]
    )
