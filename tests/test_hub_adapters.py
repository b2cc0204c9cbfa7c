"""`afina push` and `pull` against a local server of the Hub's API, by the real client."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.numpy import save_file

from afina.cli.main import run
from afina.errors import AdapterError, SettingsError
from afina.hub.card import card_metadata
from afina.hub.pull import pull
from afina.hub.push import push
from afina.io.adapter_folder import AdapterFolder
from afina.settings import PullSettings, PushSettings, make_settings
from fake_hub import FakeHub, fake_hub

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}
RECORD = {
    "format_version": 2,
    "settings": {},
    "objective": "sft",
    "base": {"name": "org/base", "licence": "Apache-2.0"},
    "data": {"path": "hf:org/rows[train]"},
    "losses": {"eval_loss_after": 1.23456},
    "score": {"name": "exact match", "after": 80.0},
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """An empty Hub, which the client uses; the current folder is the test's."""
    monkeypatch.chdir(tmp_path)
    with fake_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        close_session()
        yield served
    close_session()


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run folder with an adapter."""
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file(
        {
            f"{prefix}.lora_A.weight": np.ones((2, 4), np.float32),
            f"{prefix}.lora_B.weight": np.ones((4, 2), np.float32),
        },
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    (folder / "README.md").write_text("---\ntags: [old]\n---\n\n# The card\n\nText.\n")
    (folder / "notes.py").write_text("print(1)")
    (folder.parent / "run.json").write_text(json.dumps(RECORD))
    return folder.parent


def publish(adapter: Path, **values: Any) -> Any:
    given = {"adapter": adapter, "repo": "me/polite", "yes": True, **values}
    return push(make_settings(PushSettings, given))


def fetch(**values: Any) -> Any:
    return pull(make_settings(PullSettings, {"repo": "me/polite", **values}))


def test_published_adapter_comes_back_the_same(hub: FakeHub, trained: Path) -> None:
    result = publish(trained)
    assert result.private and hub.repos["me/polite"]["private"]
    files = hub.repos["me/polite"]["files"]
    assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    head, _, body = files["README.md"].decode().removeprefix("---\n").partition("---\n")
    card = yaml.safe_load(head)
    assert card["base_model"] == "org/base" and card["license"] == "apache-2.0"
    assert card["datasets"] == ["org/rows"] and "# The card" in body and "old" not in head
    [found] = card["model-index"][0]["results"]
    assert {one["name"]: one["value"] for one in found["metrics"]} == {
        "eval loss": 1.2346,
        "exact match": 80.0,
    }
    pulled = fetch()
    assert pulled.revision == result.revision and pulled.base == "org/base"
    assert pulled.hash == AdapterFolder.open(trained).hash()
    assert {file.name for file in Path(pulled.folder).iterdir()} == set(files)


def test_nothing_is_overwritten_or_made_public_silently(hub: FakeHub, trained: Path) -> None:
    publish(trained)
    before = hub.sha("me/polite")
    with pytest.raises(SettingsError, match="the repository exists"):
        publish(trained)
    assert hub.sha("me/polite") == before
    assert publish(trained, overwrite=True, license="mit").card["license"] == "mit"
    with pytest.raises(SettingsError, match="the repository is private"):
        publish(trained, overwrite=True, public=True)
    hub.add("me/open", {}, private=False)
    with pytest.raises(SettingsError, match="the repository is public"):
        publish(trained, repo="me/open", overwrite=True)
    assert not publish(trained, repo="me/open", overwrite=True, public=True).private
    fetch()
    with pytest.raises(SettingsError, match="not empty"):
        fetch()


@pytest.mark.parametrize(("answer", "uploads"), [("y", True), ("", False), ("no", False)])
def test_a_question_is_asked_first(
    answer: str, uploads: bool, hub: FakeHub, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(SettingsError, match="there is no terminal"):
        publish(trained, yes=False)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    if uploads:
        publish(trained, yes=False)
    else:
        with pytest.raises(SettingsError, match="nothing was uploaded"):
            publish(trained, yes=False)
    assert ("me/polite" in hub.repos) is uploads


def damaged(files: dict[str, bytes], case: str) -> dict[str, bytes]:
    """Files of a repository with one fault."""
    if case == "pickle":
        return {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": b"x"}
    if case == "rank":
        changed = json.dumps({**CONFIG, "r": 3}).encode()
        return {**files, "adapter_config.json": changed}
    if case == "cut":
        return {**files, "adapter_model.safetensors": files["adapter_model.safetensors"][:-4]}
    return {**files, "README.md": b"x" * (1 << 20) + b"x"}


@pytest.mark.parametrize("case", ["pickle", "rank", "cut", "large"])
def test_what_the_strict_reader_rejects_is_not_kept(
    case: str, hub: FakeHub, trained: Path, tmp_path: Path
) -> None:
    folder = trained / "adapter"
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.add("me/polite", damaged(files, case))
    with pytest.raises(AdapterError):
        fetch()
    assert not (tmp_path / "adapters" / "polite").exists()


def test_code_of_a_repository_is_named_and_not_downloaded(hub: FakeHub, trained: Path) -> None:
    files = {file.name: file.read_bytes() for file in (trained / "adapter").iterdir()}
    hub.add("me/polite", files)
    result = fetch(output_dir="there")
    assert result.left_out == ["notes.py"]
    assert not any("notes.py" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"repo": "me/none"}, "no such repository"),
        ({"revision": "old"}, "no such revision"),
        ({"repo": "polite"}, "is no name of a repository"),
    ],
)
def test_errors_of_the_hub_are_errors_with_a_hint(
    values: dict[str, Any], what: str, hub: FakeHub
) -> None:
    hub.add("me/polite", {})
    with pytest.raises((AdapterError, SettingsError), match=what) as caught:
        fetch(**values)
    assert caught.value.hint


def test_commands_print_results(
    hub: FakeHub, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["push", str(trained), "--repo", "me/polite", "--yes"]) == 0
    assert "private" in capsys.readouterr().out
    assert run(["pull", "me/polite", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["folder"] == "adapters/polite" and len(found["hash"]) == 64


def test_card_of_an_adapter_without_a_run_names_its_base(trained: Path) -> None:
    folder = AdapterFolder.open(trained / "adapter")
    card = card_metadata(folder, trained / "adapter", None, ())
    assert card["base_model"] == "org/base" and "license" not in card and "model-index" not in card
