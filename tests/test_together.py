"""Many adapters at once are the same adapters one by one; one that breaks, breaks alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import afina
from afina.adapters.segments import Segment, Segments
from afina.cli.main import run as run_command
from afina.errors import SettingsError, TrainingError
from afina.models.loading import load_base
from afina.objectives.multi_adapter import multi_adapter_losses
from afina.settings import TrainSettings
from afina.training.sweep import sweep as run_sweep
from afina.training.train import TrainResult
from helpers import flat_run, logits, metrics, put

RUNS: dict[str, dict[str, Any]] = {
    "lora-2": dict(rank=2, learning_rate=5e-3),
    "lora-8": dict(
        rank=8, learning_rate=1e-3, seed=3, max_tokens_per_batch=200, lr_scheduler_type="linear"
    ),
    "rslora": dict(
        rank=4, scaling="rslora", learning_rate=2e-3, target_modules=["q_proj", "down_proj"]
    ),
    "dora": dict(method="dora", rank=4, learning_rate=3e-3, gradient_accumulation_steps=2),
    "mora": dict(method="mora", rank=2, learning_rate=1e-3, weight_decay=0.1, layers="last:2"),
    "alora": dict(method="alora", rank=4, learning_rate=2e-3, max_grad_norm=0.05),
}


def settings(tiny: Path, chats: Path, general: Path, out: Path, **own: Any) -> TrainSettings:
    shared = dict(
        data=chats,
        base=str(tiny),
        output_dir=out,
        retention_text=general,
        max_steps=20,
        max_tokens_per_batch=256,
        eval_steps=10,
    )
    return TrainSettings(**{**shared, **own})


@pytest.fixture
def text_run(text: Path) -> dict[str, Any]:
    """Another file, and another objective."""
    return dict(data=text, objective="pretrain", rank=3, learning_rate=2e-3, max_length=64)


@pytest.mark.slow
def test_together_is_one_by_one(
    tiny: Path, chats: Path, general: Path, text_run: dict[str, Any], tmp_path: Path
) -> None:
    runs = RUNS | {"text": text_run}
    together = afina.train_many(
        [settings(tiny, chats, general, tmp_path / "all" / n, **own) for n, own in runs.items()]
    )
    for (name, own), made in zip(runs.items(), together, strict=True):
        alone = afina.train(settings(tiny, chats, general, tmp_path / "one" / name, **own))
        assert isinstance(made, TrainResult)
        ours, theirs = metrics(made.folder), metrics(alone.folder)
        assert len(ours) == len(theirs) == 20
        for a, b in zip(ours, theirs, strict=True):
            assert a["tokens"] == b["tokens"], name
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5), (name, a["step"])
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3, abs=1e-5), (
                name,
                a["step"],
            )
        for key, value in alone.record["losses"].items():
            if isinstance(value, float):
                assert made.record["losses"][key] == pytest.approx(value, rel=1e-4, abs=1e-4), (
                    name,
                    key,
                )
        file = "adapter/adapter_model.safetensors"
        a, b = load_file(made.folder / file), load_file(alone.folder / file)
        assert list(a) == list(b)
        assert all((a[k] - b[k]).norm() <= 0.02 * b[k].norm() + 1e-4 for k in a), name


@pytest.mark.slow
def test_one_that_diverges_stops_alone(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    own = [
        dict(rank=2, learning_rate=5e-3),
        dict(rank=2, learning_rate=1e30),
        dict(rank=4, learning_rate=1e-3),
    ]
    outcomes = afina.train_many(
        [settings(tiny, chats, general, tmp_path / f"{n}", **s) for n, s in enumerate(own)]
    )
    assert isinstance(outcomes[1], TrainingError)
    assert "not finite" in str(outcomes[1])
    for number in (0, 2):
        made, alone = (
            outcomes[number],
            afina.train(
                settings(tiny, chats, general, tmp_path / f"alone-{number}", **own[number])
            ),
        )
        assert isinstance(made, TrainResult)
        for a, b in zip(metrics(made.folder), metrics(alone.folder), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-5), a["step"]


@pytest.mark.slow
def test_each_stops_when_its_own_patience_or_steps_end(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    own = [
        dict(max_steps=6, eval_steps=2),
        dict(max_steps=12, eval_steps=2, early_stopping_patience=1, learning_rate=1e-30),
        dict(max_steps=9),
    ]
    outcomes = afina.train_many(
        [settings(tiny, chats, general, tmp_path / f"{n}", **s) for n, s in enumerate(own)]
    )
    assert [
        outcome.record["steps"] for outcome in outcomes if isinstance(outcome, TrainResult)
    ] == [
        6,
        4,
        9,
    ]


@pytest.mark.slow
def test_a_sweep_file_runs_and_resumes(
    tiny: Path, chats: Path, general: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"base: {tiny}\ndata: {chats}\nretention_text: {general}\nmax_steps: 4\nmax_tokens_per_batch: 256\n"
        "runs:\n  - {rank: 2}\n  - {method: dora, name: careful, learning_rate: 1.0e-3}\n"
    )
    command = ["train", str(sweep), "--max-steps", "6", "--output-dir", str(tmp_path / "out")]
    assert run_command([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [run["name"] for run in result["runs"]] == ["01-lora", "careful"]
    assert all(run["steps"] == 6 for run in result["runs"])
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"] == result["runs"]
    assert (tmp_path / "out" / "careful" / "README.md").is_file()
    assert run_command(command) == 2
    assert "a run in this folder" in capsys.readouterr().err


def test_wrong_sweeps_are_refused_before_anything_begins(
    tiny: Path, chats: Path, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep.yaml"
    for text, told in (
        ("data: x.jsonl\n", "lists its runs"),
        (f"data: {chats}\nruns:\n  - {{rnak: 3}}\n", "did you mean"),
        (f"data: {chats}\nruns:\n  - {{rank: 0}}\n", "rank cannot be 0"),
        ("runs:\n  - {rank: 3}\n", "data is missing"),
        (f"data: {chats}\nruns:\n  - {{name: a}}\n  - {{name: a}}\n", "share a folder"),
        (f"data: {chats}\nruns:\n  - {{name: ../a}}\n", "is in that of its sweep"),
    ):
        sweep.write_text(text)
        with pytest.raises(SettingsError) as caught:
            run_sweep(sweep, {"base": str(tiny), "output_dir": tmp_path / "out"})
        assert told in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "embed_tokens", "k_proj"]])
def test_a_mixed_pass_is_each_alone(tiny: Path, targets: Any) -> None:
    """Any ranks and methods, on whole sequences and parts of them, with weights, several on the same tokens."""
    base = load_base(str(tiny))
    names = {
        "a": dict(rank=2),
        "b": dict(rank=7, alpha=3.0),
        "c": dict(method="dora", rank=3),
        "d": dict(method="mora", rank=2),
    }
    for seed, (name, spec) in enumerate(names.items()):
        put(base, name, targets, seed=seed, **spec)  # type: ignore[arg-type]
    run = flat_run((9, 3, 14, 6))
    rows = (
        Segment(0, 9, "a"),
        Segment(9, 12, "b"),
        Segment(12, 26, "c"),
        Segment(26, 32, "d"),
        Segment(26, 32, "b", 0.5),
    )
    mixed = logits(base, run, Segments(spans=rows))
    for start, end in zip(run[2], run[2][1:], strict=False):
        piece = (run[0][start:end], run[1][start:end], (0, end - start))
        alone = logits(
            base, piece, Segments(tuple((r.adapter, r.weight) for r in rows if r.start == start))
        )
        torch.testing.assert_close(mixed[start:end], alone, rtol=1e-4, atol=1e-5)


def test_classifiers_are_passed_one_by_one() -> None:
    class Task:
        shares_pass = False

        def loss(self, batch: int, route: Any) -> torch.Tensor:
            return torch.tensor(float(batch))

    assert [
        loss.item() for loss in multi_adapter_losses([(Task(), 1, None), (Task(), 2, None)])
    ] == [1.0, 2.0]  # type: ignore[list-item]
