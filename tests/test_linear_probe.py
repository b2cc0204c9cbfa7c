"""The head that classification starts from, and the length and rate of a run that are not given."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from afina.objectives.language_modeling import LanguageModelingObjective
from afina.objectives.linear_probe import fit_linear_probe
from afina.objectives.registry import get_objective
from afina.settings import TrainSettings
from afina.training.setup.set_up import default_learning_rate, run_length


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_the_probe_separates_what_is_separable(offset: float, with_bias: bool) -> None:
    centers = 3 * torch.randn(5, 16)
    targets = torch.arange(400) % 5
    features = centers[targets] + 0.3 * torch.randn(400, 16) + offset
    weight, bias = fit_linear_probe(features[:300], targets[:300], 5, with_bias)
    assert (weight.shape, bias.shape) == ((5, 16), (5,))
    assert with_bias or not bias.any()
    scores = features[300:] @ weight.T + bias
    assert (scores.argmax(1) == targets[300:]).float().mean() > 0.97


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    """In the units of the features: the gradient of loss and penalty is zero."""
    features, targets = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3
    weight, bias = fit_linear_probe(features.float(), targets, 3)
    scale = features.float().square().mean().sqrt()
    z = features.float() - features.float().mean(0)
    weight = (weight * scale).requires_grad_()
    bias = (bias + features.float().mean(0) @ weight.detach().T / scale).requires_grad_()
    loss = F.cross_entropy(z / scale @ weight.T + bias, targets)
    (loss + 1e-3 * weight.square().sum()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-3


@pytest.mark.parametrize("rows", [3, 12])
def test_few_rows_are_enough(rows: int) -> None:
    features, targets = torch.randn(rows, 8), torch.arange(rows) % 2
    weight, bias = fit_linear_probe(features, targets, 2)
    assert torch.equal((features @ weight.T + bias).argmax(1), targets)


@pytest.mark.parametrize(
    ("given", "steps_per_epoch", "expected"),
    [
        ({}, 1, 100),
        ({}, 20, 100),
        ({}, 50, 150),
        ({"num_train_epochs": 2}, 1, 2),
        ({"num_train_epochs": 0.5}, 50, 25),
        ({"max_steps": 7}, 50, 7),
        ({"max_steps": 7, "num_train_epochs": 3}, 50, 7),
    ],
)
def test_a_run_is_as_long_as_said_and_else_never_short(
    given: dict[str, float], steps_per_epoch: int, expected: int
) -> None:
    settings = TrainSettings(data="rows.jsonl", **given)
    assert run_length(settings, LanguageModelingObjective, steps_per_epoch) == expected


def test_policies_have_no_least_length() -> None:
    settings = TrainSettings(data="rows.jsonl")
    assert run_length(settings, get_objective("grpo"), 4) == 12


def test_rates_grow_as_bases_narrow() -> None:
    objective = SimpleNamespace(default_learning_rate_factor=1.0)

    def rate(method: str, width: int | None) -> float:
        return default_learning_rate(method, objective, width)  # type: ignore[arg-type]

    assert rate("lora", 4096) == rate("dora", None) == pytest.approx(2e-4)
    assert rate("lora", 576) == pytest.approx(2e-4 * 4096 / 576)
    assert rate("lora", 8) == rate("lora", 256) == pytest.approx(3.2e-3)  # bounded
    assert rate("full", 1024) == pytest.approx(4e-5)
    assert default_learning_rate("lora", get_objective("dpo"), 4096) == pytest.approx(2e-5)
