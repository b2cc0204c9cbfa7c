"""The contract of an objective: one that is written here trains, resumes, evaluates and reports."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import afina
from afina.adapters.active import ActiveAdapters
from afina.data.schemas import ROW_SCHEMAS
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.objectives.registry import OBJECTIVES, get_objective
from afina.settings.objectives import objective_names


class HalvedObjective(LanguageModelingObjective):
    """Next-token prediction at half the loss: only a test needs it."""

    name = "halved"

    def loss(self, batch: Any, route: ActiveAdapters) -> Tensor:
        """Return half the cross-entropy."""
        return 0.5 * super().loss(batch, route)

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Add a sentence to the verdict."""
        return super().report(before, after) | {"verdict": ["Half of it was reported."]}


@pytest.mark.slow
def test_own_objective_trains_resumes_evaluates_and_reports(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "base": str(tiny),
        "retention_text": general,
        "max_steps": 4,
        "eval_steps": 2,
        "lr_scheduler_type": "constant",
    }
    run = afina.train(chats, objective=HalvedObjective, output_dir=tmp_path / "own", **values)
    sft = afina.train(chats, objective="sft", output_dir=tmp_path / "sft", **values)
    assert run.record["objective"] == "halved"
    assert "Half of it was reported." in run.verdict
    first = [
        json.loads((one.folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for one in (run, sft)
    ]
    assert first[0] == pytest.approx(0.5 * first[1], rel=1e-5)
    found = afina.evaluate(run.folder, max_new_tokens=2)
    assert found["after"]["perplexity"] > 1
    assert "halved" in OBJECTIVES and "halved" in objective_names()
    for file in ("run.json", "README.md", "curve.png"):
        (run.folder / file).unlink()
    again = afina.train(
        chats, objective="halved", output_dir=tmp_path / "own", resume=True, **values
    )
    assert again.record["adapter"] == run.record["adapter"]


@pytest.mark.parametrize("name", sorted(set(objective_names()) - {"auto"}))
def test_class_facts_of_every_objective(name: str) -> None:
    objective = get_objective(name)
    assert objective.name == name
    assert objective.schema in ROW_SCHEMAS
    assert 0 < objective.default_learning_rate_factor <= 1
    assert not (objective.shares_pass and not objective.shares_base)
