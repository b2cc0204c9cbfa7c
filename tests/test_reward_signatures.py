"""Reward functions of both signatures: what they are called with, and what is an error before training."""

from pathlib import Path
from typing import Any

import pytest

from afina.data.renderer import Example
from afina.data.schemas import PromptRow
from afina.errors import DataError, SettingsError, TrainingError
from afina.objectives.python_rewards import BatchFunctionScorer, FunctionScorer, load_function
from afina.objectives.reward_functions import RewardFunctions

RULES = """
def ours(prompt, answer, reference=None): return len(answer)
def trl(prompts, completions, **kwargs): return [len(c) for c in completions]
def columns(completions, level, unit="m", **kwargs): return [float(len(c) * n) for c, n in zip(completions, level)]
def named(completions, level): return [float(n) for n in level]
def ids(completion_ids, **kwargs): return [len(one) for one in completion_ids]
def star(**kwargs): return [float(sorted(kwargs) == ["completion_ids", "completions", "level", "prompts"])] * 2
async def later(completions, **kwargs): return [1.0 for _ in completions]
def sometimes(completions, **kwargs): return [None, 2.0]
def never(completions, **kwargs): return [None for _ in completions]
def fewer(completions, **kwargs): return [1.0]
def breaks(completions, **kwargs): raise ValueError("no")
def word(completions, **kwargs): return ["good" for _ in completions]
def chat(prompts, completions, **kwargs):
    return [float(c[0]["content"] == "ab" and p[0]["role"] == "user") for p, c in zip(prompts, completions)]
def two(prompt, answer): return 0
def four(prompt, answer, reference, more): return 0
def state(completions, trainer_state): return [0.0]
def position(completions, level, /): return [0.0]
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    file = tmp_path / "rules.py"
    file.write_text(RULES)
    return file


def rows(*items: dict[str, Any], messages: bool = False) -> list[PromptRow]:
    prompt: Any = ({"role": "user", "content": "say"},) if messages else "say"
    return [PromptRow(f"rows.jsonl:{n}", prompt, None, item) for n, item in enumerate(items, 1)]


def examples(*texts: str) -> list[Example]:
    return [Example("", [1, 2, *range(len(text))], [], 2, text) for text in texts]


ITEMS = {"prompt": "say", "level": 3}, {"prompt": "say", "level": 5}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ours", [2.0, 1.0]),
        ("trl", [2.0, 1.0]),
        ("columns", [6.0, 5.0]),
        ("named", [3.0, 5.0]),
        ("ids", [2.0, 1.0]),
        ("star", [1.0, 1.0]),
        ("later", [1.0, 1.0]),
    ],
)
def test_function_is_called_as_its_signature_requests(
    name: str, expected: list[float], rules: Path
) -> None:
    scorer = load_function(f"{rules}:{name}")
    assert isinstance(scorer, FunctionScorer if name == "ours" else BatchFunctionScorer)
    given = rows(*ITEMS)
    for row in given:
        scorer.check(row)
    assert scorer.score(given, examples("ab", "c"), 100) == {scorer.name: expected}


def test_messages_are_passed_as_messages(rules: Path) -> None:
    scorer = load_function(f"{rules}:chat")
    found = scorer.score(rows(*ITEMS, messages=True), examples("ab", "c"), 100)
    assert found[scorer.name] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("two", "has another signature"),
        ("four", "has another signature"),
        ("state", "needs trainer_state"),
        ("position", "cannot be given by name"),
    ],
)
def test_signature_is_checked_when_the_function_is_loaded(
    name: str, what: str, rules: Path
) -> None:
    with pytest.raises(SettingsError, match=what):
        load_function(f"{rules}:{name}")


def test_missing_column_is_an_error_before_anything_is_generated(rules: Path) -> None:
    scorer = load_function(f"{rules}:named")
    with pytest.raises(DataError, match="needs a column 'level'") as caught:
        scorer.check(rows({"prompt": "say", "levels": 3})[0])
    assert caught.value.hint == "did you mean 'levels'?"


@pytest.mark.parametrize(
    ("name", "what"),
    [("fewer", "returned 1 rewards"), ("breaks", "function failed"), ("word", "finite number")],
)
def test_wrong_rewards_are_errors(name: str, what: str, rules: Path) -> None:
    with pytest.raises(TrainingError, match=what):
        load_function(f"{rules}:{name}").score(rows(*ITEMS), examples("ab", "c"), 100)


def test_none_counts_as_nothing_unless_it_is_all(rules: Path) -> None:
    given, texts = rows(*ITEMS), examples("ab", "c")
    scorers = [(load_function(f"{rules}:{name}"), 0.5) for name in ("sometimes", "trl")]
    found = RewardFunctions(tuple(scorers)).score(given, texts, 100)
    assert found["reward"].tolist() == [1.0, 1.5]
    with pytest.raises(TrainingError, match="every reward function returned None"):
        RewardFunctions(((load_function(f"{rules}:never"), 1.0),)).score(given, texts, 100)
