"""The plan of encoders: what is allocated is counted exactly, and grows with the batch."""

from pathlib import Path

import pytest
import torch

import afina
from afina.planning.trial import Line, _LiveBytes
from helpers import write_rows


def test_live_bytes_are_those_of_storages_that_are_held() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    with _LiveBytes() as counted:
        first = weight * 2  # 400 bytes, and the product that follows saves it
        view = first[:5]  # no storage of its own
        second = first.exp()
        assert counted.live == 800
        del first, view
        assert counted.live == 400  # the product by a number saves nothing
        second.sum().backward()
        del second
    assert counted.live == 400  # the gradient
    assert 1200 <= counted.peak <= 1700
    assert weight.grad is not None


def test_a_line_through_two_passes() -> None:
    assert Line.through([(100, 30.0), (300, 70.0)]) == Line(10.0, 0.2)
    assert Line.through([(50, 20.0), (50, 22.0)]) == Line(0.0, 22.0 / 50)  # one long row
    assert Line.through([(100, 50.0), (200, 40.0)]).at(200) == 40.0


def test_a_classifier_has_a_plan(tiny: Path, tmp_path: Path) -> None:
    texts = ["the cat sat on the red mat", "a dog", "we saw the green house by the sea"]
    rows = [{"text": f"{texts[n % 3]} {n}", "label": "ab"[n % 2]} for n in range(60)]
    file, base = write_rows(tmp_path / "rows.jsonl", *rows), str(tiny)
    small, large = (
        afina.plan(file, base=base, max_tokens_per_batch=tokens)["cost"] for tokens in (64, 256)
    )
    assert small["batch"]["tokens"] <= 64 < large["batch"]["tokens"] <= 256
    for plan in (small, large):
        assert plan["peak_bytes"] == pytest.approx(sum(plan["memory"].values()), rel=1e-6)
        assert plan["fits"] and plan["run_seconds"] > plan["step_seconds"] > 0
    grown = large["memory"]["activations"] / small["memory"]["activations"]
    assert grown == pytest.approx(large["batch"]["tokens"] / small["batch"]["tokens"], rel=0.2)
    room = (large["peak_bytes"] - 0.3 * large["memory"]["activations"]) / 0.95e9
    short = afina.plan(file, base=base, memory_gb=room)["cost"]
    assert short["fits"] is False
    [change] = short["remedies"]
    assert 64 <= change["settings"]["max_tokens_per_batch"] < short["batch"]["tokens"]
