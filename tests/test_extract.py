"""Weights found on examples; loras extracted from other adapters and from tuned models; `afina show`."""

import json
from pathlib import Path

import pytest
import torch

from afina.adapters.loading import load_adapter
from afina.adapters.saving import save_adapter
from afina.cli.main import run as command_line
from afina.errors import AfinaError
from afina.merging import weight_search as searching
from afina.merging.adapter_info import show
from afina.merging.combine import combine
from afina.merging.extract import extract
from afina.models.loading import load_base
from afina.training.train import train
from helpers import put, tiny_tokenizer


@pytest.fixture(scope="module")
def skilled(
    tiny: Path, chats: Path, general: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A lora run that has learned the chats."""
    folder = tmp_path_factory.mktemp("skilled") / "run"
    train(
        chats,
        base=str(tiny),
        rank=4,
        max_steps=30,
        learning_rate=2e-2,
        output_dir=folder,
        retention_text=general,
    )
    return folder


@pytest.fixture
def noise(tiny: Path, tmp_path: Path) -> Path:
    base = load_base(str(tiny))
    save_adapter(put(base, rank=2, seed=9), base, tmp_path / "noise")
    return tmp_path / "noise"


@pytest.mark.slow
def test_the_search_keeps_the_skill_and_drops_the_noise(
    skilled: Path, noise: Path, chats: Path, tmp_path: Path
) -> None:
    result = combine(
        [skilled, noise],
        merge_method="search",
        data=chats,
        max_evals=25,
        output_dir=tmp_path / "out",
    )
    good, bad = result["weights"]
    assert good > 0.5 and abs(bad) < 0.25
    found = result["search"]
    assert found["trials"] <= 25 and found["rows"] + found["checked_on"] == 48
    assert found["found"] <= min(found["losses"].values()) + 0.05
    assert found["losses"]["run alone"] < min(
        found["losses"]["base"], found["losses"]["noise alone"]
    )
    story = json.loads((tmp_path / "out" / "afina.json").read_text())
    assert [p["weight"] for p in story["parents"]] == [good, bad]
    assert (
        story["combination"]["how"] == "search"
        and story["combination"]["search"]["found"] == found["found"]
    )
    assert load_adapter(tmp_path / "out", load_base(story["base"]["name"])).config.method == "lora"
    again = combine(
        [skilled, noise],
        merge_method="search",
        data=chats,
        max_evals=25,
        output_dir=tmp_path / "again",
    )
    assert again["hash"] == result["hash"]
    assert (
        combine(
            [skilled, noise],
            merge_method="search",
            data=chats,
            max_evals=8,
            rank=3,
            output_dir=tmp_path / "cut",
        )["rank"]
        == 3
    )


def test_the_search_finds_the_least_loss() -> None:
    """On a bowl whose bottom is known, with an L1 penalty whose effect is known: w - penalty / 2 a weight, 0 where it is small."""
    bowl = lambda w: (w[0] - 0.8) ** 2 + (w[1] + 0.6) ** 2 + (w[2] - 0.01) ** 2  # noqa: E731
    weights, trials = searching._minimize(bowl, [[0.0] * 3, [1.0] * 3], 0.05, 80)
    assert weights == pytest.approx([0.775, -0.575, 0.0], abs=0.02)
    assert trials <= 80


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mora", "dora", "full"])
def test_any_adapter_becomes_a_lora(tiny: Path, tmp_path: Path, chats: Path, method: str) -> None:
    base = load_base(str(tiny))
    targets = "all" if method == "full" else "all-linear"
    adapter = put(base, method=method, rank=2, target_modules=targets)
    save_adapter(adapter, base, tmp_path / method)
    whole = extract(
        tmp_path / method, retained_energy=1.0, output_dir=tmp_path / "whole", data=chats
    )
    assert whole["energy"]["least"] == pytest.approx(1.0)
    half = extract(tmp_path / method, retained_energy=0.5, output_dir=tmp_path / "half", data=chats)
    small = extract(tmp_path / method, max_rank=1, output_dir=tmp_path / "small", data=chats)
    assert (
        small["rank"] == {"least": 1, "most": 1}
        and small["energy"]["mean"] < half["energy"]["mean"]
    )
    assert all(0.5 <= e < 0.95 for e in half["energy"]["layers"].values())
    assert set(whole["left_out"]) == (
        {p for p in adapter.layers if "norm" in p} if method == "full" else set()
    )
    made = load_adapter(tmp_path / "whole", load_base(str(tiny)))
    for path, delta in made.layers.items():
        weight = delta.layer.weight.double()
        expected = adapter.layers[path].merged_weight(weight)
        assert (delta.merged_weight(weight) - expected).norm() <= 2e-5 * (expected - weight).norm()
    loss = whole["loss"]
    assert loss["rows"] == str(chats)
    if method != "full":  # norms are left out there
        assert loss["extract"] == pytest.approx(loss["original"], abs=1e-4)
        assert abs(small["loss"]["extract"] - loss["original"]) > 1e-3


def test_a_run_is_measured_on_its_own_held_out_rows(skilled: Path, tmp_path: Path) -> None:
    result = extract(skilled, max_rank=4, output_dir=tmp_path / "out")
    story = json.loads((skilled / "run.json").read_text())["losses"]
    assert result["loss"]["base"] == pytest.approx(story["eval_loss_before"], abs=1e-5)
    assert result["loss"]["extract"] == pytest.approx(story["eval_loss_after"], abs=1e-4)
    assert (
        extract(skilled, max_rank=1, output_dir=tmp_path / "less")["loss"]["extract"]
        > result["loss"]["extract"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_out_of_two_models(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A merged model gives back what was merged, embeddings and tied output layer too."""
    folder: Path = request.getfixturevalue(kind)
    base = load_base(str(folder))
    model = base.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "embed" in name:
                rows, columns = parameter.shape
                parameter.add_(0.1 * torch.randn(rows, 2) @ torch.randn(2, columns))
            elif name == "model.norm.weight":
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    result = extract(
        base=str(folder),
        finetuned_model=tmp_path / "tuned",
        retained_energy=0.999999,
        output_dir=tmp_path / "out",
    )
    assert result["left_out"] == {"model.norm.weight": pytest.approx(0.01, rel=1e-3)}
    assert result["rank"] == {"least": 2, "most": 2}
    made = load_adapter(tmp_path / "out", load_base(str(folder)))
    assert ("lm_head" in made.layers) == (kind == "tied")
    for path, delta in made.layers.items():
        tuned = model.get_submodule(path).weight
        tuned = tuned.T if "embed" in path else tuned
        assert torch.allclose(delta.merged_weight(delta.layer.weight), tuned, atol=1e-5)
    assert result["loss"]["rows"] == "general text"
    assert result["loss"]["extract"] == pytest.approx(result["loss"]["original"], abs=0.1)
    assert abs(result["loss"]["base"] - result["loss"]["original"]) > abs(
        result["loss"]["extract"] - result["loss"]["original"]
    )


def test_what_extract_refuses(skilled: Path, tmp_path: Path) -> None:
    for words, values in (
        ("neither a rank", {"run": skilled}),
        ("exactly one source", {"max_rank": 2}),
        ("exactly one source", {"max_rank": 2, "run": skilled, "finetuned_model": skilled}),
        ("base of the fine-tuned model", {"max_rank": 2, "finetuned_model": skilled}),
        ("not empty", {"max_rank": 2, "run": skilled, "output_dir": skilled}),
    ):
        with pytest.raises(AfinaError, match=words):
            extract(**{"output_dir": tmp_path / "out", **values})  # type: ignore[arg-type]


def test_show_tells_what_an_adapter_is(
    skilled: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    combine([f"{skilled}:0.5", f"{noise}:-0.25"], output_dir=tmp_path / "both")
    about = show(tmp_path / "both")
    assert (about["method"], about["rank"], about["layers"], about["unchanged"]) == (
        "lora",
        6,
        28,
        True,
    )
    assert [(p["name"], p["weight"]) for p in about["parents"]] == [("run", 0.5), ("noise", -0.25)]
    assert about["where"]["mlp.up_proj"] == [0, 1, 2, 3]
    adapter = load_adapter(tmp_path / "both", load_base(about["base"]["name"]))
    assert about["numbers"] == adapter.num_parameters()
    for path, norm in about["norms"].items():
        zero = torch.zeros(adapter.layers[path].layer.weight.shape)
        assert norm == pytest.approx(
            float(adapter.layers[path].merged_weight(zero).detach().norm()), rel=1e-4
        )
    assert command_line(["show", str(skilled)]) == 0
    said = capsys.readouterr().out
    assert "lora" in said and "eval loss: " in said and "█" in said and "mlp.up_proj" in said
    assert command_line(["show", str(tmp_path / "both"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["combination"]["how"] == "sum"


def test_show_of_a_composition_and_of_a_changed_file(
    tiny: Path, noise: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(str(tiny))
    save_adapter(put(base, method="mora", rank=2), base, tmp_path / "mora")
    combine([noise, f"{tmp_path / 'mora'}:2"], output_dir=tmp_path / "c")
    assert [(p["method"], p["weight"]) for p in show(tmp_path / "c")["parts"]] == [
        ("lora", 1.0),
        ("mora", 2.0),
    ]
    assert command_line(["show", str(tmp_path / "c")]) == 0
    assert "adapters active together" in capsys.readouterr().out
    file = noise / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert show(noise)["unchanged"] is False
