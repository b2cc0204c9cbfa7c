"""`--target-modules auto`: ranks by the energy of the gradient; the allocation against brute force, the energies against autograd."""

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from afina.errors import SettingsError
from afina.models.loading import load_base
from afina.settings import TrainSettings, make_settings
from afina.training.setup.prepare import prepare
from afina.training.setup.rank_allocation import (
    NUM_GRADIENT_STEPS,
    allocate_ranks,
    gradient_spectra,
)
from afina.training.setup.set_up import set_up_run
from afina.training.train import train


def settings(tiny: Path, chats: Path, **values: Any) -> TrainSettings:
    return TrainSettings(
        data=chats, base=str(tiny), target_modules="auto", max_tokens_per_batch=256, **values
    )


def test_ranks_hold_the_most_energy_that_the_budget_buys() -> None:
    generator = torch.Generator().manual_seed(0)
    energies = {
        name: torch.rand(3, generator=generator).sort(descending=True).values for name in "abcd"
    }
    prices = dict.fromkeys("abcd", 2)
    for budget in (2, 5, 9, 24, 99):
        ranks = allocate_ranks(energies, prices, budget)

        def held(some: Any) -> float:
            return sum(
                float(energies[name][:rank].sum()) for name, rank in zip("abcd", some, strict=True)
            )

        best = max(held(some) for some in product(range(4), repeat=4) if 2 * sum(some) <= budget)
        assert held([ranks.get(name, 0) for name in "abcd"]) == pytest.approx(best)
        assert all(ranks.values())


def test_a_layer_that_is_too_dear_makes_room_for_others() -> None:
    energies = {"large": torch.tensor([100.0, 1.0]), "small": torch.tensor([1.0, 0.5])}
    assert allocate_ranks(energies, {"large": 10, "small": 1}, 11) == {"large": 1, "small": 1}
    assert allocate_ranks(energies, {"large": 10, "small": 1}, 3) == {"small": 2}
    with pytest.raises(SettingsError, match="too small for a single rank"):
        allocate_ranks(energies, {"large": 10, "small": 5}, 3)


@pytest.mark.slow
def test_energies_are_those_of_the_gradient(tiny: Path, chats: Path) -> None:
    """Against autograd on the weights of transformers' own model, row by row; the base is left as it was."""
    base = load_base(str(tiny))
    prepared = prepare(settings(tiny, chats), base)
    path = "model.layers.1.mlp.up_proj"
    before = {name: p.clone() for name, p in base.model.state_dict().items()}
    found = gradient_spectra(prepared, [path])[path]
    assert all(torch.equal(p, before[name]) for name, p in base.model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loss = torch.zeros(())
    for step in range(min(NUM_GRADIENT_STEPS, prepared.task.steps_per_epoch)):
        for batch in prepared.task.step_batches(step):
            rows = [slice(a, b) for a, b in pairwise(batch.cu_seqlens)]
            logits = torch.cat([plain(batch.token_ids[None, row]).logits[0] for row in rows])
            loss = loss + torch.nn.functional.cross_entropy(
                logits, batch.labels
            )  # -100 carries no label
    (gradient,) = torch.autograd.grad(loss, plain.get_submodule(path).weight)
    assert torch.allclose(found, torch.linalg.svdvals(gradient).square(), rtol=1e-3, atol=1e-7)


@pytest.mark.slow
def test_a_run_learns_within_its_budget(
    tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    run = train(
        settings(
            tiny,
            chats,
            max_steps=2,
            rank=2,
            parameter_budget=2000,
            retention_text=general,
            output_dir=tmp_path / "run",
        )
    )
    told = run.record["settings"]
    assert 1000 < run.record["trainable_parameters"] <= 2000
    assert set(told["rank_pattern"]) == set(told["target_modules"])
    assert len(set(told["rank_pattern"].values())) >= 1


@pytest.mark.slow
def test_by_itself_it_costs_no_more_than_all_layers(tiny: Path, chats: Path) -> None:
    auto = set_up_run(settings(tiny, chats, rank=2))
    everywhere = set_up_run(
        settings(tiny, chats, rank=2).model_copy(update={"target_modules": "all-linear"})
    )
    assert (
        0.9 * everywhere.adapter.num_parameters()
        < auto.adapter.num_parameters()
        <= everywhere.adapter.num_parameters()
    )
    assert len(set(auto.settings.rank_pattern.values())) > 1


@pytest.mark.slow
def test_what_it_cannot_do(tiny: Path, chats: Path) -> None:
    with pytest.raises(SettingsError, match="base that is not quantized"):
        set_up_run(settings(tiny, chats, method="qlora"))
    with pytest.raises(SettingsError, match="only methods with a rank"):
        set_up_run(settings(tiny, chats, method="full"))
    with pytest.raises(SettingsError, match="parameter_budget cannot be"):
        make_settings(TrainSettings, {"data": chats, "parameter_budget": "much"})
