"""Bad input: each fault says what, where and what to type next, and costs nothing that was there before."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import afina
from afina.cli import main
from afina.errors import AfinaError, BaseError, DataError, MergeError, SettingsError, TrainingError
from afina.io.atomic import atomic_directory
from afina.models.convert import convert
from afina.models.loading import load_base
from afina.settings import TrainSettings
from afina.training import finish
from afina.training.checkpoint import TrainerState
from afina.training.run_card import plot_losses
from afina.training.setup.processes import SINGLE_PROCESS
from afina.training.setup.set_up import default_out
from afina.training.trainer import Trainer
from helpers import flat_run, logits, metrics, same, save_model, tiny_tokenizer, write_rows

CHAT = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a a"}]}
Train = Callable[..., Any]


@pytest.fixture
def train(tiny: Path, chats: Path, general: Path, tmp_path: Path) -> Train:
    """`afina.train` with small settings, into tmp_path/run."""

    def call(data: Path = chats, **settings: Any) -> Any:
        given = {
            "base": str(tiny),
            "output_dir": tmp_path / "run",
            "max_steps": 4,
            "eval_steps": 2,
            "retention_text": general,
            **settings,
        }
        return afina.train(data, **given)

    return call


# data


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        ("", "rows.jsonl", "the file is empty"),
        (json.dumps(CHAT) + "\n{broken\n", "rows.jsonl:2", "broken JSON"),
        (
            json.dumps(CHAT) + '\n{"messages": [{"role": "user"}]}\n',
            "rows.jsonl:2:messages[0].content",
            "the field is missing",
        ),
        ('{"prompt": "a"}\n', "rows.jsonl:1:completion", "the field is missing"),
        ('{"question": "a", "answer": "b"}\n', "rows.jsonl", "columns found: question, answer"),
        ('{"prompt": "a", "completion": ""}\n', "rows.jsonl:1:completion", "the field is empty"),
        (json.dumps(CHAT) + "\n", None, "at least 2 different rows"),
    ],
)
def test_rows_that_cannot_be_used(
    train: Train, tmp_path: Path, content: str, where: str | None, message: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        train(tmp_path / "rows.jsonl")
    assert message in str(caught.value)
    assert where is None or str(caught.value.where).endswith(where)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_row_longer_than_the_context_is_refused_or_left_out(
    train: Train, tmp_path: Path, chats: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "say " * 300}, CHAT["messages"][1]]}
    data = tmp_path / "rows.jsonl"
    data.write_text(chats.read_text() + json.dumps(long) + "\n")
    with pytest.raises(DataError, match=r"tokens, more than the 192 allowed") as caught:
        train(data)
    assert str(caught.value.where).endswith("rows.jsonl:49")
    assert "--skip-bad-rows" in str(caught.value.hint)
    run = train(data, skip_bad_rows=True)
    assert [
        line.partition(": ")[0].rpartition("/")[2] for line in run.record["data"]["skipped"]
    ] == ["rows.jsonl:49"]


@pytest.mark.slow
def test_skipped_rows_say_why(train: Train, tmp_path: Path) -> None:
    """Each reason once, with the first lines; and what is held out for `afina eval` can be read again."""
    empty = {"prompt": "a", "completion": ""}
    long = [{"prompt": "say " * n, "completion": "a"} for n in range(300, 305)]
    data = write_rows(
        tmp_path / "rows.jsonl", *long, empty, {"prompt": "a", "completion": "b" * 200}
    )
    with pytest.raises(DataError, match="no row is left") as caught:
        train(data, skip_bad_rows=True)
    why = "1 row (line 6): the field is empty; 6 rows (lines 1, 2, 3 and 3 more), the first: 619 tokens, more than the 192 allowed"
    assert caught.value.why == f"skipped: {why}"
    with pytest.raises(DataError, match="no row can be used") as caught:
        train(write_rows(data, empty, {"prompt": "a", "completion": None}), skip_bad_rows=True)
    assert (
        caught.value.why
        == "skipped: 1 row (line 1): the field is empty; 1 row (line 2): the field is missing"
    )
    good = [{"prompt": f"say {n}", "completion": f"{n}"} for n in range(20)]
    run = train(
        write_rows(data, *(row for pair in zip(good, long * 4, strict=True) for row in pair)),
        skip_bad_rows=True,
    )
    assert len(run.record["data"]["skipped"]) == 20
    assert (
        afina.evaluate(run.folder, max_new_tokens=2)["rows"] == run.record["data"]["held_out"] == 2
    )


@pytest.mark.slow
def test_eval_data_with_bad_rows(train: Train, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "say " * 300}, CHAT["messages"][1]]}
    held = write_rows(tmp_path / "held.jsonl", CHAT, {"messages": []}, long)
    run = train(eval_data=held, skip_bad_rows=True)
    assert [
        line.partition(": ")[0].rpartition("/")[2] for line in run.record["data"]["skipped"]
    ] == [
        "held.jsonl:2:messages",
        "held.jsonl:3",
    ]
    assert afina.evaluate(run.folder, max_new_tokens=2)["rows"] == 1


@pytest.mark.slow
def test_a_base_without_chat_template(
    train: Train, tiny: Path, chats: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*"))
    tiny_tokenizer(None).save_pretrained(bare)
    with pytest.raises(DataError, match="no chat template") as caught:
        train(base=str(bare))
    assert "--chat-template chatml" in str(caught.value.hint)
    train(base=str(bare), chat_template="chatml")
    pairs = write_rows(
        tmp_path / "pairs.jsonl", *({"prompt": f"{n} is", "completion": f" {n}"} for n in range(9))
    )
    train(pairs, base=str(bare), output_dir=tmp_path / "pairs")


@pytest.mark.parametrize("eval_size", [0, 1.5, -0.1])
def test_eval_size_out_of_range_is_an_error(train: Train, eval_size: float) -> None:
    with pytest.raises(SettingsError, match="eval_size cannot be"):
        train(eval_size=eval_size)


@pytest.mark.slow
def test_too_little_text_to_hold_some_out(train: Train, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only this")
    with pytest.raises(DataError, match="too little text"):
        train(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("only this and then a little more of it " * 9)
    assert train(tmp_path / "short.txt", max_length=64).record["data"]["held_out"] >= 1


def test_an_objective_that_the_rows_cannot_have(train: Train, text: Path) -> None:
    with pytest.raises(DataError, match="plain text has no completion") as caught:
        train(text, objective="sft")
    assert caught.value.hint == "--objective pretrain"


# bases


@pytest.fixture
def broken(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base in several shards, to be broken."""
    folder = tmp_path / "broken"
    load_base(str(tiny)).model.save_pretrained(folder, max_shard_size="150KB")
    for file in tiny.glob("*token*"):
        shutil.copy(file, folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    load_base(str(folder))
    return folder


def refused(folder: Path | str) -> BaseError:
    with pytest.raises(BaseError) as caught:
        load_base(str(folder))
    return caught.value


def test_an_interrupted_download(broken: Path) -> None:
    shard = sorted(broken.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.unlink()
    error = refused(broken)
    assert f"missing weights: {shard.name}" in str(error)
    assert error.why == "the download is incomplete"
    assert error.hint == "download the model again"
    for size in (0, 7, 500, len(whole) - 1):
        shard.write_bytes(whole[:size])
        assert refused(broken).where == str(shard)
    shard.write_bytes(whole + b"x")
    assert "incomplete or extended weights" in str(refused(broken))
    shard.write_bytes(whole)
    load_base(str(broken))


def test_nothing_but_an_incomplete_file(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "x")
    (folder / "model.safetensors").rename(folder / "model.safetensors.incomplete")
    error = refused(folder)
    assert (error.why, error.hint) == ("the download is incomplete", "download the model again")


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_that_do_not_fit_the_configuration(tiny: Path, tmp_path: Path, fault: str) -> None:
    """transformers would give such a layer random numbers and go on."""
    folder = shutil.copytree(tiny, tmp_path / "x")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensor = tensors.pop(name)
    if fault == "shape":
        tensors[name] = tensor[:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    error = refused(folder)
    assert "do not fit config.json" in str(error)
    assert name in str(error.why)


def test_damaged_headers_and_lists(broken: Path) -> None:
    index = broken / "model.safetensors.index.json"
    content = index.read_text()
    for damaged in ("{", "[]", "{}"):
        index.write_text(damaged)
        assert "cannot read the index of weight files" in str(refused(broken))
    index.write_text(content)
    shard = sorted(broken.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"oops"
    shard.write_bytes(data)
    assert "damaged" in str(refused(broken))


def test_folders_that_are_no_models(tiny: Path, tmp_path: Path) -> None:
    assert "no config.json" in str(refused(tmp_path))
    assert "not a model folder" in str(refused(tmp_path / "nowhere"))
    assert "not a model folder" in str(refused(tiny / "config.json"))
    folder = shutil.copytree(tiny, tmp_path / "x")
    (folder / "config.json").write_text('{"model_type": "of-another-world"}')
    assert "does not support this model" in str(refused(folder))
    (folder / "config.json").write_text("{")
    assert "does not support this model" in str(refused(folder))
    shutil.copy(tiny / "config.json", folder)
    (folder / "tokenizer.json").write_text("{")
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer cannot be loaded" in str(refused(folder))


@pytest.mark.parametrize("kind", ["tiny", "tied"])
def test_pickled_weights_name_the_command_that_converts_them(
    request: Any, tmp_path: Path, kind: str
) -> None:
    folder = request.getfixturevalue(kind)
    base = load_base(str(folder))
    old = shutil.copytree(folder, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(base.model.state_dict(), old / "pytorch_model.bin")
    torch.save(
        object, old / "training_args.bin"
    )  # what transformers' Trainer leaves beside it, not for opening
    error = refused(old)
    assert "opening them can run code" in str(error)
    assert error.hint == f"convert them: python -m afina.models.convert {old} NEW_FOLDER"
    convert(old, tmp_path / "new")
    again = load_base(str(tmp_path / "new"))
    assert again.hash
    assert torch.equal(logits(again, flat_run()), logits(base, flat_run()))
    assert not list((tmp_path / "new").glob("*.bin"))


def test_a_pickle_with_code_is_not_opened(tmp_path: Path, tiny: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    old = shutil.copytree(tiny, tmp_path / "old", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"x": Evil()}, old / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        convert(old, tmp_path / "new")
    assert not (tmp_path / "owned").exists()


def test_code_of_a_models_own_is_not_run_unless_told(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "odd",
        "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    error = refused(folder)
    assert "contains Python code" in str(error)
    assert "--trust-remote-code" in str(error.hint)
    assert not (tmp_path / "ran").exists()


def failing(kind: type[Exception]) -> Callable[..., None]:
    """A download that fails as the hub does."""

    def download(*_: Any, **__: Any) -> None:
        if issubclass(kind, hub.HfHubHTTPError):
            raise kind("no", response=SimpleNamespace(headers={}, request=None, status_code=403))  # type: ignore[call-arg]
        raise kind("no")

    return download


@pytest.mark.parametrize(
    ("kind", "what", "hint"),
    [
        (hub.GatedRepoError, "needs an accepted license", "hf auth login"),
        (
            hub.RepositoryNotFoundError,
            "no such folder, and no such public model on the hub",
            "hf auth login",
        ),
        (hub.RevisionNotFoundError, "no revision 'v9'", None),
        (hub.HFValidationError, "no such folder, and not a valid name of a model", "owner/model"),
        (
            hub.LocalEntryNotFoundError,
            "no such folder, and no such model in the local cache",
            "folder with config.json",
        ),
        (
            ConnectionError,
            "no such folder, and no such model in the local cache",
            "folder with config.json",
        ),
    ],
)
def test_names_that_the_hub_does_not_give(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], what: str, hint: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(kind))
    with pytest.raises(BaseError) as caught:
        load_base("owner/model", revision="v9")
    assert what in str(caught.value)
    assert caught.value.where == "owner/model"
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize("name", ["missingfolder", "out/missingfolder"])
def test_a_missing_folder_is_first_of_all_a_missing_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests are offline: the hub comes second, with the reason."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseError) as caught:
        load_base(name)
    assert str(caught.value.what).startswith("no such folder, and")
    assert str(caught.value.why).startswith(f"there is no {tmp_path / name}; HF_HUB_OFFLINE is set")


@pytest.mark.slow
def test_an_adapter_is_no_base(train: Train) -> None:
    run = train()
    for folder in (run.folder, run.folder / "adapter"):
        error = refused(folder)
        assert "this is an adapter, not a model" in str(error)
        assert f"--adapter {folder}" in str(error.hint)


def test_a_device_that_is_not_there() -> None:
    name = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(SettingsError, match="is not available"):
        load_base(device=name)


# settings at odds with the model


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"target_modules": "q_porj"}, "'q_porj' matches no module", "'q_proj'"),
        ({"target_modules": ["q_proj", "nothing"]}, "'nothing' matches no module", None),
        ({"target_modules": "*_proj"}, "is not a regular expression", ".*_proj"),
        ({"target_modules": "norms"}, "matches no module", None),
        ({"target_modules": "lm_head", "layers": "last:1"}, "no module is selected", None),
        ({"layers": [4]}, "no layer 4", None),
        ({"layers": "last:9"}, "layers 'last:9' is neither", "1 to 4"),
        ({"layers": "middle"}, "layers 'middle' is neither", "last:N"),
        ({"rank_pattern": {"q_porj": 2}}, "'q_porj' matches no adapted module", "'q_proj'"),
        ({"learning_rate_pattern": {"lm_head": 1.0}}, "'lm_head' matches no adapted module", None),
        ({"method": "lroa"}, "unknown method 'lroa'", "'lora'"),
        ({"method": "full", "dropout": 0.1}, "no input of its own", "--dropout 0"),
        ({"chat_template": "/nowhere.jinja"}, "cannot read the template", "plain"),
    ],
)
def test_settings_at_odds_with_the_model(
    train: Train, tmp_path: Path, settings: dict[str, Any], what: str, hint: str | None
) -> None:
    with pytest.raises(AfinaError) as caught:
        train(**settings)
    assert what in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_layers_by_number_from_either_end(train: Train, tmp_path: Path) -> None:
    chosen = {}
    for number, layers in enumerate(([3], [-1], "3", "last:1")):
        run = train(layers=layers, max_steps=1, output_dir=tmp_path / str(number))
        chosen[number] = json.loads((run.folder / "adapter" / "afina.json").read_text())["spec"][
            "targets"
        ]
    assert chosen[0] == chosen[1] == chosen[2] == chosen[3]
    assert all("layers.3." in path for path in chosen[0])


# the run folder


@pytest.mark.slow
def test_a_run_is_never_written_over(train: Train, tmp_path: Path) -> None:
    run = train()
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match="a run in this folder already") as caught:
        train()
    assert caught.value.hint == "choose another --output-dir, or --overwrite to replace that run"
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SettingsError, match="not a run folder"):
        train(output_dir=tmp_path / "file")


@pytest.mark.slow
def test_resume_needs_a_checkpoint_and_the_same_run(
    train: Train, tmp_path: Path, chats: Path, tied: Path
) -> None:
    with pytest.raises(TrainingError, match="nothing to resume here") as caught:
        train(resume=True)
    assert "leave out --resume" in str(caught.value.hint)
    held = write_rows(tmp_path / "held.jsonl", CHAT, CHAT)
    mine = shutil.copy(chats, tmp_path / "mine.jsonl")
    train(Path(mine), eval_data=held)
    for part, change in (
        ("data is", lambda: Path(mine).write_text(chats.read_text().replace("sol", "mar"))),
        ("held-out rows are", lambda: held.write_text(held.read_text().replace("a a", "b b"))),
    ):
        keep = {path: path.read_bytes() for path in (Path(mine), held)}
        change()
        with pytest.raises(TrainingError, match=f"the {part} not what the run began with"):
            train(Path(mine), eval_data=held, resume=True)
        for path, content in keep.items():
            path.write_bytes(content)
    with pytest.raises(TrainingError, match="the base is not what the run began with"):
        train(Path(mine), eval_data=held, resume=True, base=str(tied))
    shutil.copy(
        mine, tmp_path / "elsewhere.jsonl"
    )  # the same rows under another name are the same data
    train(tmp_path / "elsewhere.jsonl", eval_data=held, resume=True)


@pytest.mark.slow
def test_settings_that_changed_are_named_with_both_values(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the hint says is a command that goes on with the run."""
    run = train(learning_rate=0.001)
    for changes, told in (
        ({"learning_rate": 0.002}, "the setting learning_rate is 0.001 in the run, 0.002 now"),
        (
            {"learning_rate": 0.001, "early_stopping_patience": 3},
            "the setting early_stopping_patience is not set in the run, 3 now",
        ),
        (
            {"learning_rate": 0.001, "seed": 9, "rank": 4},
            "rank is 8 in the run, 4 now; seed is 0 in the run, 9 now",
        ),
        (
            {"learning_rate": 0.001, "eval_size": 0.3},
            "the setting eval_size is 0.1 in the run, 0.3 now",
        ),
    ):
        with pytest.raises(TrainingError) as caught:
            train(resume=True, **changes)
        assert str(caught.value.what).endswith(told)
    command = str(caught.value.hint).partition(", or")[0].split()
    assert command[0] == "afina"
    assert main.run([*command[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["adapter"] == run.record["adapter"]


@pytest.mark.slow
def test_a_setting_newer_than_the_run_is_as_it_was(train: Train) -> None:
    """A run of an older afina, which did not know `early_stopping_patience`, goes on; not with another value of it."""
    run = train()
    file = run.folder / "checkpoint" / "progress.json"
    content = json.loads(file.read_text())
    del content["identity"]["settings"]["early_stopping_patience"]
    file.write_text(json.dumps(content))
    assert train(resume=True).record["adapter"] == run.record["adapter"]
    with pytest.raises(
        TrainingError, match="the setting early_stopping_patience is not set in the run, 3 now"
    ):
        train(resume=True, early_stopping_patience=3)


@pytest.mark.slow
def test_a_run_cut_off_before_its_first_checkpoint(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --resume it says --resume, and with it the run begins."""
    whole = train(output_dir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("afina.training.train._losses", Full(None, 0, KeyboardInterrupt()))  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            train()
    with pytest.raises(SettingsError, match="there is a run in this folder already") as caught:
        train()
    assert "--resume" in str(caught.value.hint)
    assert train(resume=True).record["adapter"] == whole.record["adapter"]


def test_runs_without_a_folder_are_numbered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = TrainSettings(data=Path("rows.jsonl"))
    for name in ("rows-lora", "rows-lora-2", "rows-lora-3"):
        folder = default_out(settings)
        assert folder == Path("runs") / name
        folder.mkdir(parents=True)
        assert default_out(settings) == folder  # an empty folder can be used
        (folder / "settings.yaml").write_text("data: rows.jsonl\n")
    assert default_out(settings.model_copy(update={"resume": True})) == folder
    assert default_out(settings.model_copy(update={"overwrite": True})) == Path("runs/rows-lora")


@pytest.mark.slow
def test_overwrite_replaces_a_run_and_nothing_else(train: Train, tmp_path: Path) -> None:
    first = train(max_steps=2)
    again = train(max_steps=1, overwrite=True)
    assert (again.folder, again.record["steps"]) == (first.folder, 1)
    assert not yaml.safe_load((again.folder / "settings.yaml").read_text())["overwrite"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(SettingsError, match="this folder is not empty"):
        train(output_dir=tmp_path / "mine", overwrite=True)


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing = Full(None, 0, AfinaError("no memory"))  # type: ignore[arg-type]
        patch.setattr("afina.training.train._losses", failing)
        with pytest.raises(AfinaError, match="no memory"):
            train()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_that_was_moved_goes_on_where_it_is(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(learning_rate=0.001)
    moved = run.folder.rename(tmp_path / "moved")
    assert main.run(["train", "--config", str(moved / "settings.yaml"), "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["folder"], result["adapter"]) == (str(moved), run.record["adapter"])
    assert not run.folder.exists()


def test_a_file_where_a_folder_should_be(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AfinaError, match="cannot write here") as caught:
        train(output_dir=tmp_path / "file" / "run")
    assert (caught.value.why, caught.value.hint) == (
        "Not a directory",
        "choose another folder with --output-dir",
    )
    with (
        pytest.raises(AfinaError, match="cannot write here"),
        atomic_directory(tmp_path / "file" / "merged"),
    ):
        pass


class Full:
    """A disk that fills up: the n-th call of a function raises, as the system or as safetensors says it."""

    def __init__(self, real: Callable[..., Any], calls: int, error: BaseException) -> None:
        self.real, self.left, self.error = real, calls, error

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.real(*arguments, **named)


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
AS_SAFETENSORS = SafetensorError(
    "Error while serializing: I/O error: No space left on device (os error 28)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "calls", "error", "kept"),
    [
        ("afina.training.checkpoint.save_file", 2, NO_SPACE, 2),
        ("afina.training.checkpoint.save_file", 2, AS_SAFETENSORS, 2),
        ("afina.training.checkpoint.save_file", 2, OSError(errno.EDQUOT, "Disk quota exceeded"), 2),
        ("afina.adapters.saving.save_file", 1, NO_SPACE, 2),
        ("afina.io.atomic.os.fsync", 11, NO_SPACE, 2),
        ("matplotlib.figure.Figure.savefig", 0, NO_SPACE, 6),
    ],
)
def test_a_full_disk_keeps_the_last_checkpoint(
    train: Train,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    calls: int,
    error: Exception,
    kept: int,
) -> None:
    settings = {"max_steps": 6, "learning_rate": 1e-3, "dropout": 0.1}
    whole = train(output_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "plot_losses", plot_losses)  # drawn, else a full disk is not met
        module, _, name = place.rpartition(".")
        target: Any = (
            pytest.importorskip(module)
            if not module.endswith("Figure") and not module.endswith(".os")
            else None
        )
        if target is None:
            from matplotlib.figure import Figure

            target = os if module.endswith(".os") else Figure
        patch.setattr(target, name, Full(getattr(target, name), calls, error))
        with pytest.raises(AfinaError, match="the disk is full") as caught:
            train(**settings)
    assert "--resume" in str(caught.value.hint)
    assert caught.value.where
    run = tmp_path / "run"
    step = json.loads((run / "checkpoint" / "progress.json").read_text())["progress"]["step"]
    assert step >= kept or place == "afina.io.atomic.os.fsync"
    assert not [path for path in run.rglob(".*")]
    cut = train(resume=True, **settings)
    assert cut.record["adapter"] == whole.record["adapter"]
    assert metrics(run) == metrics(whole.folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_really_full(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log of a running run is put on a full device."""
    from afina.training.progress import NullProgress

    def swap(_: Any, tick: Any, run: int = 0) -> None:
        if tick.step == 1:
            log = tmp_path / "run" / "metrics.jsonl"
            log.unlink()
            log.symlink_to("/dev/full")

    monkeypatch.setattr(NullProgress, "tick", swap)
    with pytest.raises(AfinaError, match="the disk is full"):
        train()


@pytest.mark.slow
def test_a_folder_cut_off_between_its_two_renames_comes_back(train: Train, tmp_path: Path) -> None:
    """Killed at the worst moment: the old checkpoint is set aside, the new one not yet in place."""
    settings = {"max_steps": 6, "learning_rate": 1e-3}
    whole = train(output_dir=tmp_path / "whole", **settings)
    run = shutil.copytree(whole.folder, tmp_path / "run")
    for name in ("checkpoint", "adapter"):
        (run / name).rename(run / f".{name}.old-{os.getpid()}")
        (
            run / f".{name}.new-{os.getpid()}"
        ).mkdir()  # and half of the new one, left by a process of our number
        (run / f".{name}.new-{os.getpid()}" / "half").write_text("x")
    (run / "run.json").unlink()
    again = train(resume=True, **settings)
    assert again.record["adapter"] == whole.record["adapter"]
    assert not [path for path in run.rglob(".*")]


def test_a_failed_save_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("kept")
    real = Path.rename

    def rename(self: Path, target: Any) -> Any:
        if ".new-" in self.name:
            raise NO_SPACE
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(AfinaError, match="the disk is full"),
        atomic_directory(tmp_path / "a") as folder,
    ):
        (folder / "new").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "old").read_text() == "kept"


@pytest.mark.slow
def test_merging_over_something_or_without_space_leaves_it(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    for call, name in ((afina.merge, "output_dir"), (afina.export, "output")):
        with pytest.raises(SettingsError, match="this folder is not empty"):
            call(run.folder, **{name: tmp_path / "mine"})
    assert (tmp_path / "mine" / "file").read_text() == "mine"
    monkeypatch.setattr(
        "afina.merging.merge_into_base.kl_and_agreement",
        lambda *_: {
            **dict.fromkeys(("kl", "max_logit_difference"), float("nan")),
            "greedy_agreement": 1.0,
            "probe_tokens": 1,
        },
    )
    with pytest.raises(MergeError):
        afina.merge(run.folder, output_dir=tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


# numbers that are no longer finite


def test_a_learning_rate_that_is_far_too_high(train: Train, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite at step \d") as caught:
        train(learning_rate=1e30, max_steps=8, eval_steps=4)
    assert "chats.jsonl:" in str(caught.value.why)
    assert "--learning-rate" in str(caught.value.hint)
    progress = json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())[
        "progress"
    ]
    assert progress["step"] == 0
    for name, tensor in load_file(tmp_path / "run" / "checkpoint" / "state.safetensors").items():
        assert not tensor.is_floating_point() or bool(tensor.isfinite().all()), name


@pytest.mark.slow
def test_a_eval_loss_that_is_not_finite_keeps_what_was_good(train: Train, tmp_path: Path) -> None:
    """The last step breaks the numbers, so only the check after it can see it: nothing of it is kept."""
    good = train(output_dir=tmp_path / "good", max_steps=4, eval_steps=2)
    state = load_file(good.folder / "checkpoint" / "state.safetensors")
    with pytest.raises(TrainingError, match="eval loss is not finite at step 1") as caught:
        train(learning_rate=1e30, max_steps=8, eval_steps=1)
    assert "chats.jsonl:" in str(caught.value.why)
    assert not (tmp_path / "run" / "adapter").exists()
    assert (
        json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["progress"][
            "step"
        ]
        == 0
    )
    assert all(bool(t.isfinite().all()) for t in state.values() if t.is_floating_point())


def test_an_eval_loss_before_the_first_step_is_named(tmp_path: Path) -> None:
    """That of a head which starts as a probe: no step is done, and none is taken back."""
    trainer = Trainer.__new__(Trainer)
    trainer.progress, trainer.world, trainer.run = TrainerState(), SINGLE_PROCESS, tmp_path
    with pytest.raises(TrainingError, match="eval loss is not finite at step 0"):
        trainer.keep_best(float("nan"))
    assert trainer.progress.step == 0


def test_a_poisoned_parameter_stops_the_run_at_its_step(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from afina.training import train as running
    from afina.training.progress import NullProgress

    held: list[Any] = []
    real = running.set_up_run
    monkeypatch.setattr(running, "set_up_run", lambda *given: held.append(real(*given)) or held[0])

    def poison(_: Any, tick: Any, run: int = 0) -> None:
        if tick.step == 3:
            with torch.no_grad():
                held[0].adapter.parameters()[5][0, 0] = float("nan")

    monkeypatch.setattr(NullProgress, "tick", poison)
    with pytest.raises(TrainingError, match="the loss is not finite at step 4") as caught:
        train(max_steps=8)
    rows = held[0].prepared.task.row_locations(3)
    assert rows[0] in str(caught.value.why)
    assert (
        json.loads((tmp_path / "run" / "checkpoint" / "progress.json").read_text())["progress"][
            "step"
        ]
        == 2
    )
    assert len(metrics(tmp_path / "run")) == 3


# evaluating and generating


@pytest.mark.slow
def test_evaluation_without_rows_is_an_error(train: Train, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="there are no rows to evaluate") as caught:
        afina.evaluate(base=str(tiny))
    assert "--data" in str(caught.value.hint)
    run = train()
    with pytest.raises(DataError, match="this folder has no eval rows"):
        afina.evaluate(run.folder / "adapter")
    with pytest.raises(SettingsError, match="unknown metric 'chrff'") as caught:
        afina.evaluate(run.folder, metrics=["chrff"], limit=1, max_new_tokens=1)
    assert caught.value.hint == "did you mean 'chrf'?"


def test_a_prompt_longer_than_the_context(tiny: Path) -> None:
    with pytest.raises(DataError, match=r"prompt 2: a prompt of 1,215 tokens"):
        afina.generate(["short", "long " * 400], base=str(tiny))


@pytest.mark.slow
def test_a_run_of_a_newer_afina(train: Train, tmp_path: Path) -> None:
    run = train()
    story = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps(story | {"format_version": 99}))
    for call in (
        lambda: afina.generate(["a"], adapter=run.folder),
        lambda: afina.evaluate(run.folder, limit=1),
    ):
        with pytest.raises(AfinaError, match="a newer afina"):
            call()


@pytest.mark.slow
def test_a_run_whose_base_is_gone(train: Train, tiny: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(tiny, tmp_path / "moved")
    run = train(base=str(moved))
    shutil.rmtree(moved)
    with pytest.raises(BaseError, match="not a model folder"):
        afina.generate(["a"], adapter=run.folder)
    assert afina.generate(["a"], adapter=run.folder, base=str(tiny), max_new_tokens=2)["answers"]


@pytest.mark.slow
def test_an_adapter_on_another_base_is_refused_everywhere(
    train: Train, tiny: Path, tmp_path: Path
) -> None:
    run = train()
    config = load_base(str(tiny)).model.config
    other = str(save_model(tmp_path / "other", config, tiny_tokenizer(), seed=5))
    for call in (
        lambda: afina.generate(["a"], adapter=run.folder, base=other),
        lambda: afina.evaluate(run.folder, base=other, limit=1),
        lambda: afina.merge(run.folder, base=other, output_dir=tmp_path / "merged"),
    ):
        with pytest.raises(AfinaError, match="trained on another base"):
            call()
    assert (
        afina.merge(run.folder, base=other, output_dir=tmp_path / "merged", allow_other_base=True)[
            "greedy_agreement"
        ]
        == 1.0
    )


def test_state_dicts_compare(base: Any) -> None:
    """The helper that other tests lean on can say no."""
    values = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    assert same(base.model.state_dict(), values)
    values["lm_head.weight"][0, 0] += 1e-7
    assert not same(base.model.state_dict(), values)
