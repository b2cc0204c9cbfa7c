"""Merge and restart: ReLoRA and ReMoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from afina.adapters.attach import Adapter, attach
from afina.adapters.loading import load_adapter
from afina.adapters.relora import (
    check,
    load,
    merge_and_reset,
    num_restarts,
    restart_lr_factor,
    state,
)
from afina.adapters.saving import save_adapter, tensors_of
from afina.adapters.segments import Segments
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.io.strict_json import read_json_object
from afina.models.frozen import FrozenModel

ON = Segments.on_all_tokens("a")
SHARING: dict[str, Any] = {"operator": "sharing"}


def base() -> FrozenModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24))
    return FrozenModel(model.eval().requires_grad_(False), "net")  # type: ignore[arg-type]


def put(on: FrozenModel, method: str, **spec: Any) -> Adapter:
    return attach(
        on.model, on.forward_context, "a", AdapterConfig(method, ("0", "2"), rank=2, **spec)
    )


def run(on: FrozenModel, x: Tensor) -> Tensor:
    with on.forward_context.use(ON):
        return on.model(x)


def learn(on: FrozenModel, adapter: Adapter, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        x = torch.randn(64, 24, generator=generator)
        (run(on, x) - torch.randn(64, 24, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("mora", SHARING), ("mora", SHARING | {"grouping": "adjacent"})],
)
def test_the_output_stays_and_learning_begins_anew(method: str, options: dict[str, Any]) -> None:
    on, x = base(), torch.randn(9, 24)
    weights = [p.clone() for p in on.model.parameters()]
    adapter = put(on, method, method_settings=options)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02, fused=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 4):
        learn(on, adapter, optimizer, number)
        before, matrix = (
            run(on, x),
            adapter.layers["0"].merged_weight(adapter.layers["0"].layer.weight),
        )
        merge_and_reset(adapter, generator, optimizer)
        assert num_restarts(adapter) == number
        torch.testing.assert_close(run(on, x), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            adapter.layers["0"].merged_weight(adapter.layers["0"].layer.weight),
            matrix,
            rtol=1e-5,
            atol=1e-5,
        )
        assert not optimizer.state
        fresh = put(base(), method, method_settings=options)
        assert [tuple(p.shape) for p in fresh.parameters()] == [
            tuple(p.shape) for p in adapter.parameters()
        ]
        zero = {"lora": "b", "mora": "m"}[method]
        assert not getattr(adapter.layers["0"], zero).any()
    assert all(
        torch.equal(p, w)
        for p, w in zip((on.model[0].base.weight, on.model[0].base.bias), weights, strict=False)
    )
    assert adapter.num_parameters() == fresh.num_parameters()
    assert torch.equal(on.model(x), base().model(x))


def total_rank(adapter: Adapter) -> int:
    accumulated = adapter.layers["0"].restart_delta
    assert accumulated is not None
    return int(torch.linalg.matrix_rank(accumulated.double(), rtol=1e-6))


def test_the_rank_of_relora_grows() -> None:
    on = base()
    adapter, ranks = put(on, "lora"), []
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    for number in range(3):
        learn(on, adapter, optimizer, number)
        merge_and_reset(adapter, torch.Generator().manual_seed(number), optimizer)
        ranks.append(total_rank(adapter))
    assert ranks == [2, 4, 6]


def test_the_rank_of_remora_grows_by_its_groupings() -> None:
    ranks = {}
    for changing in (True, False):
        on = base()
        adapter, ranks[changing] = put(on, "mora", method_settings=SHARING), []
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
        for number in range(3):
            learn(on, adapter, optimizer, number)
            merge_and_reset(adapter, torch.Generator(), optimizer)
            if not changing:
                for delta in adapter.layers.values():
                    delta.restarts = 0
            ranks[changing].append(total_rank(adapter))
    size = 11  # floor(sqrt((24 + 40) * 2))
    assert ranks[False] == [size] * 3
    assert ranks[True][0] == size
    assert ranks[True][2] > size


def test_the_grouping_alternates() -> None:
    adapter = put(base(), "mora", method_settings=SHARING)
    seen = []
    for _ in range(4):
        seen.append(adapter.layers["2"].grouping)  # type: ignore[attr-defined]
        merge_and_reset(adapter, torch.Generator())
    assert seen == ["strided", "adjacent"] * 2


@pytest.mark.parametrize(("method", "options"), [("lora", {}), ("mora", SHARING)])
def test_saved_is_loaded(tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    on, x = base(), torch.randn(9, 24)
    adapter = put(on, method, method_settings=options)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    learn(on, adapter, optimizer, 0)
    assert not [name for name in tensors_of(adapter) if "accumulated" in name]
    merge_and_reset(adapter, torch.Generator(), optimizer)
    learn(on, adapter, optimizer, 1)
    save_adapter(adapter, on, tmp_path)
    assert "base_model.model.0.accumulated.weight" in tensors_of(adapter)
    assert (
        read_json_object(tmp_path / "adapter_config.json")["peft_type"] != "LORA"
    )  # PEFT would leave out what was accumulated
    other = base()
    loaded = load_adapter(tmp_path, other, "a")
    assert num_restarts(loaded) == 1
    assert torch.equal(run(other, x), run(on, x))


def test_asking_changes_nothing() -> None:
    adapter = put(base(), "lora")
    before = [parameter.clone() for parameter in adapter.parameters()]
    check(adapter)
    assert all(torch.equal(p, q) for p, q in zip(adapter.parameters(), before, strict=True))
    assert num_restarts(adapter) == 0


def test_a_run_goes_on_where_it_stood() -> None:
    on, x = base(), torch.randn(9, 24)
    adapter = put(on, "mora", method_settings=SHARING)
    assert state(adapter) == {}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.02)
    learn(on, adapter, optimizer, 0)
    merge_and_reset(adapter, torch.Generator(), optimizer)
    learn(on, adapter, optimizer, 1)
    other = base()
    again = put(other, "mora", method_settings=SHARING)
    load(again, {})
    load(again, state(adapter))
    with torch.no_grad():
        for mine, its in zip(again.parameters(), adapter.parameters(), strict=True):
            mine.copy_(its)
    assert again.config == adapter.config
    assert torch.equal(run(other, x), run(on, x))


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("dora", {}, "rows are scaled"),
        ("mora", {"operator": "rotation"}, "only sharing"),
        ("full", {}, "no update to merge"),
    ],
)
def test_what_cannot_restart_says_why(method: str, options: dict[str, Any], why: str) -> None:
    adapter = put(base(), method, method_settings=options)
    before = {name: tensor.clone() for name, tensor in tensors_of(adapter).items()}
    for ask in (check, lambda adapter: merge_and_reset(adapter, torch.Generator())):
        with pytest.raises(SettingsError, match=why):
            ask(adapter)
    assert num_restarts(adapter) == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(adapter).items())


def test_the_rate_rises_again_after_each_restart() -> None:
    assert [restart_lr_factor(step, 5, 3) for step in range(12)] == [
        1,
        1,
        1,
        1,
        1,
        0.25,
        0.5,
        0.75,
        1,
        1,
        0.25,
        0.5,
    ]
