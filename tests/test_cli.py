"""The command line: quick help, one declaration for flag, YAML and Python, near names, JSON, exit codes."""

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from afina import settings as all_settings
from afina.cli.main import COMMANDS, parse, run
from afina.cli.progress import signs_of_life
from afina.errors import SettingsError, pluralize
from afina.io.extras import import_extra
from afina.io.migrations import migrate_settings
from afina.models.loading import load_base
from afina.settings import (
    POLICIES,
    ObjectiveSettings,
    TrainSettings,
    job_settings,
    make_settings,
    resolved,
    settings_groups,
)
from afina.settings.renamed import RENAMED_COMMANDS, RENAMED_SETTINGS
from afina.training.setup.set_up import method_settings
from afina.training.sweep import read_sweep
from helpers import ENVIRONMENT, afina, until


@pytest.fixture(scope="module")
def trained(
    tiny: Path, chats: Path, general: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder of a few steps."""
    import afina as library

    out = tmp_path_factory.mktemp("run") / "run"
    library.train(
        chats,
        base=str(tiny),
        output_dir=out,
        max_steps=4,
        learning_rate=3e-3,
        retention_text=general,
    )
    return out


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    """(exit status, the last line as JSON, standard error) of `afina ... --json`."""
    status = run([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out.splitlines()[-1]), err


# help


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    done = afina("--help")
    assert done.returncode == 0
    assert all(
        verb in done.stdout
        for verb in ("demo", "plan", "train", "eval", "generate", "chat", "merge", "export")
    )
    code = "import sys; sys.argv = ['afina', 'train', '--help']\ntry:\n import afina.__main__\nexcept SystemExit: pass\n"
    heavy = "print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib', 'sacrebleu', 'pandas') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code + heavy], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert "--learning-rate" in done.stdout


def test_importing_the_package_imports_neither_torch_nor_a_module_of_it() -> None:
    code = "import sys, afina; print([m for m in sys.modules if m.startswith(('torch', 'afina.'))])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_of_every_verb_names_every_setting(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, field in COMMANDS[verb].settings.model_fields.items():
        assert "--" + name.replace("_", "-") in shown or name == COMMANDS[verb].positional
        assert field.description


def test_version_and_no_verb(capsys: pytest.CaptureFixture[str]) -> None:
    import afina as library

    for arguments in (["--version"], []):
        with pytest.raises(SystemExit) as ended:
            run(arguments)
        assert ended.value.code == 0
    assert f"afina {library.__version__}" in capsys.readouterr().out


# settings

# every setting of `train`: as a flag's text, and as the value that it means
SAMPLES: dict[str, tuple[str, Any]] = {
    "base": ("some/model", "some/model"),
    "revision": ("v2", "v2"),
    "trust_remote_code": ("true", True),
    "dtype": ("bfloat16", "bfloat16"),
    "device": ("cpu", "cpu"),
    "fsdp": ("true", True),
    "data": ("rows.jsonl", "rows.jsonl"),
    "output_dir": ("runs/x", "runs/x"),
    "resume": ("true", True),
    "overwrite": ("true", True),
    "method": ("full", "full"),
    "rank": ("4", 4),
    "alpha": ("3.5", 3.5),
    "scaling": ("rslora", "rslora"),
    "dropout": ("0.1", 0.1),
    "target_modules": ("q_proj, v_proj", ["q_proj", "v_proj"]),
    "layers": ("1,-1", [1, -1]),
    "rank_pattern": ("{q_proj: 4, '.*down.*': 2}", {"q_proj": 4, ".*down.*": 2}),
    "invocation": ("Now:", "Now:"),
    "parameter_budget": ("1000", 1000),
    "new_tokens": ("<a>,<b>", ["<a>", "<b>"]),
    "init_adapter": ("runs/a", "runs/a"),
    "frozen_adapter": ("runs/b", "runs/b"),
    "objective": ("pretrain", "pretrain"),
    "columns": ("{prompt: question}", {"prompt": "question"}),
    "chat_template": ("chatml", "chatml"),
    "template_kwargs": ("{enable_thinking: false}", {"enable_thinking": False}),
    "allow_control_tokens": ("true", True),
    "eval_size": ("0.2", 0.2),
    "eval_data": ("held.jsonl", "held.jsonl"),
    "retention_text": ("general.txt", "general.txt"),
    "max_length": ("64", 64),
    "skip_bad_rows": ("true", True),
    "truncate": ("true", True),
    "num_train_epochs": ("1.5", 1.5),
    "max_steps": ("7", 7),
    "max_tokens_per_batch": ("99", 99),
    "gradient_accumulation_steps": ("2", 2),
    "learning_rate": ("1e-4", 1e-4),
    "learning_rate_pattern": ("{norms: 1e-5}", {"norms": 1e-5}),
    "optimizer": ("adamw_8bit", "adamw_8bit"),
    "lr_scheduler_type": ("linear", "linear"),
    "warmup_ratio": ("0.2", 0.2),
    "weight_decay": ("0.01", 0.01),
    "max_grad_norm": ("0.5", 0.5),
    "gradient_checkpointing": ("4", 4),
    "eval_steps": ("3", 3),
    "early_stopping_patience": ("2", 2),
    "report_to": ("tensorboard,trackio", ["tensorboard", "trackio"]),
    "seed": ("5", 5),
}


# every setting of every group, with the method or objective that reads it
GROUP_SAMPLES: dict[str, tuple[str, Any]] = {
    "lora.restart_steps": ("100", 100),
    "mora.operator": ("sharing", "sharing"),
    "mora.grouping": ("adjacent", "adjacent"),
    "mora.use_alpha": ("true", True),
    "mora.restart_steps": ("100", 100),
    "classify.head_init": ("random", "random"),
    "classify.label_separator": ("|", "|"),
    "classify.min_class_rows": ("2", 2),
    "classify.class_weights": ("balanced", "balanced"),
    "classify.label_smoothing": ("0.1", 0.1),
    "embed.scale": ("10", 10.0),
    "embed.pairs_per_batch": ("8", 8),
    "embed.pooling": ("cls", "cls"),
    "embed.max_score": ("5", 5.0),
    "rerank.head_init": ("random", "random"),
    "tag.head_init": ("random", "random"),
    "rerank.max_score": ("3", 3.0),
    "tag.names": ("[O, B-A]", ["O", "B-A"]),
    "dpo.beta": ("0.2", 0.2),
    "dpo.loss_type": ("ipo", "ipo"),
    "dpo.label_smoothing": ("0.1", 0.1),
    "dpo.sft_weight": ("0.2", 0.2),
    "dpo.reference": ("precomputed", "precomputed"),
    "kto.beta": ("0.2", 0.2),
    "kto.desirable_weight": ("2.0", 2.0),
    "kto.undesirable_weight": ("2.0", 2.0),
    "kto.reference": ("base", "base"),
    "orpo.beta": ("0.2", 0.2),
    "simpo.beta": ("0.2", 0.2),
    "simpo.gamma": ("0.5", 0.5),
    "simpo.sft_weight": ("0.2", 0.2),
} | {
    f"{objective}.{name}": sample
    for objective in ("grpo", "rloo", "ppo")
    for name, sample in {
        "reward_funcs": (
            "{rules.py:form: 1, runs/reward: 0.5}",
            {"rules.py:form": 1.0, "runs/reward": 0.5},
        ),
        "allow_python_graders": ("true", True),
        "num_generations": ("4", 4),
        "prompts_per_step": ("3", 3),
        "max_new_tokens": ("9", 9),
        "temperature": ("0.5", 0.5),
        "num_iterations": ("2", 2),
        "beta": ("0.2", 0.2),
        "clip_range": ("0.1", 0.1),
        "reference": ("base", "base"),
    }.items()
}
GROUP_SAMPLES |= {
    "grpo.scale_rewards": ("false", False),
    "ppo.whiten_advantages": ("false", False),
    "ppo.gamma": ("0.9", 0.9),
    "ppo.lam": ("0.9", 0.9),
    "ppo.vf_coef": ("0.1", 0.1),
}
# of these a fine-tuning job of the server may set; no other, since they name files or run code
JOB_GROUP_SETTINGS = {
    *("lora.restart_steps", "mora.restart_steps", "mora.operator"),
    *("dpo.loss_type", "dpo.label_smoothing", "dpo.sft_weight", "grpo.scale_rewards"),
} | {
    f"grpo.{name}"
    for name in (
        *("num_generations", "prompts_per_step", "max_new_tokens", "temperature"),
        *("num_iterations", "beta", "clip_range"),
    )
}


def test_train_has_at_most_50_settings_and_the_samples_are_all_of_them() -> None:
    assert set(SAMPLES) == set(TrainSettings.model_fields)
    assert len(SAMPLES) <= 50


def test_group_samples_are_every_setting_of_every_group() -> None:
    found = {f"{name}.{key}" for name, kind in settings_groups.items() for key in kind.model_fields}
    assert found == set(GROUP_SAMPLES)


def group_values(name: str) -> tuple[str, str, dict[str, Any]]:
    """The group, its setting, and the other values that make the group the active one."""
    group, _, key = name.partition(".")
    field = "objective" if issubclass(settings_groups.get(group), ObjectiveSettings) else "method"
    values: dict[str, Any] = {"data": "rows.jsonl", field: group}
    needed = {"reward_funcs": "rules.py:f"} if group in POLICIES else {}
    return group, key, values | ({group: needed} if needed else {})


@pytest.mark.parametrize("name", GROUP_SAMPLES)
def test_every_group_setting_is_a_flag_a_yaml_key_and_an_argument(
    name: str, tmp_path: Path
) -> None:
    text, value = GROUP_SAMPLES[name]
    group, key, others = group_values(name)
    own = {key: value}
    if name == "dpo.label_smoothing":
        others, own = others | {"dpo": {"loss_type": "robust"}}, own
    values = others | {group: others.get(group, {}) | own}
    (tmp_path / "others.yaml").write_text(yaml.safe_dump(others))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(values))
    flag = "--" + name.replace("_", "-")
    by_flag = parse(["train", "--config", str(tmp_path / "others.yaml"), flag, text])[1]
    by_yaml = parse(["train", "--config", str(tmp_path / "all.yaml")])[1]
    by_argument = make_settings(TrainSettings, values)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": [values]}))
    [by_sweep] = read_sweep(tmp_path / "sweep.yaml", {})
    assert by_flag == by_yaml == by_argument
    assert getattr(by_flag.group(group), key) == value  # type: ignore[attr-defined]
    assert getattr(by_sweep.group(group), key) == value
    assert resolved(by_argument)[group][key] == value


def test_jobs_may_set_what_the_fields_say() -> None:
    allowed = {
        f"{name}.{key}" for name, kind in settings_groups.items() for key in job_settings(kind)
    }
    inherited = {f"rloo.{name.partition('.')[2]}" for name in JOB_GROUP_SETTINGS if "grpo" in name}
    inherited |= {name.replace("rloo", "ppo") for name in inherited}
    assert allowed - inherited == JOB_GROUP_SETTINGS
    assert "data" not in job_settings(TrainSettings) and "base" not in job_settings(TrainSettings)
    assert not {"init_adapter", "frozen_adapter", "output_dir"} & set(job_settings(TrainSettings))


@pytest.mark.parametrize(
    ("values", "what", "hint"),
    [
        ({"dpo": {"beta": 0.2}}, "dpo.beta has no effect: objective is 'auto'", "--objective dpo"),
        ({"mora": {"operator": "sharing"}}, "has no effect: method is 'lora'", "--method mora"),
        ({"objective": "dpo", "beta": 0.2}, "unknown setting 'beta'", "--dpo.beta"),
        ({"objective": "dpo", "dpo": {"operator": 1}}, "unknown setting dpo.operator", "mora"),
        ({"objective": "dpo", "dpo": {"bta": 1}}, "unknown setting dpo.bta", "'beta'"),
        ({"objective": "dpo", "dpo": {"loss": "ipo"}}, "'dpo.loss' was renamed", "--dpo.loss-type"),
        ({"objective": "dpo", "dpo": 3}, "dpo cannot be 3", "--dpo."),
        ({"objective": "grpo"}, "grpo.reward_funcs is missing", "FILE.py:FUNCTION"),
        ({"objective": "ppo", "ppo": {"scale": True}}, "renamed", "--ppo.whiten-advantages"),
        ({"options": {"beta": 0.2}}, "'options' was renamed", "--dpo.beta"),
        ({"holdout": 0.1}, "'holdout' was renamed", "use --eval-size, or --eval-data FILE"),
        ({"device": "sharded"}, "device cannot be 'sharded'", "--fsdp"),
        ({"optimizer": "adamw-8bit"}, "optimizer cannot be", "--optimizer adamw_8bit"),
        ({"objective": "dpi"}, "objective cannot be 'dpi'", None),
    ],
)
def test_unknown_misplaced_and_old_names_give_the_right_one(
    values: dict[str, Any], what: str, hint: str | None
) -> None:
    with pytest.raises(SettingsError) as caught:
        make_settings(TrainSettings, {"data": "x"} | values, where="s.yaml")
    assert what in str(caught.value) and str(caught.value.where).startswith("s.yaml")
    assert hint is None or hint in str(caught.value.hint)


def test_flags_join_the_groups_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("data: a\nobjective: dpo\ndpo: {beta: 0.3, loss_type: ipo}\n")
    settings = parse(["train", "--config", str(tmp_path / "s.yaml"), "--dpo.beta", "0.5"])[1]
    assert settings.group("dpo").beta == 0.5 and settings.group("dpo").loss_type == "ipo"  # type: ignore[attr-defined]


def test_settings_of_version_1_are_those_of_today(tmp_path: Path) -> None:
    old = {
        **{"out": "runs/x", "targets": "q_proj", "ranks": {"q_proj": 4}, "holdout": "held.jsonl"},
        **{"epochs": 2.0, "steps": 9, "checkpointing": "off", "device": "sharded"},
        **{"data": "x", "method": "qmora", "objective": "dpo", "optimizer": "adamw-8bit"},
        "options": {"beta": 0.2, "loss": "ipo", "sft": 0.1, "operator": "sharing"}
        | {"restart_every": 5, "start": "runs/a", "new_tokens": ["<a>"], "budget": 9, "over": "o"},
    }
    settings = make_settings(TrainSettings, migrate_settings(old))
    assert settings.group("dpo").model_dump(exclude_unset=True) == {
        **{"beta": 0.2, "loss_type": "ipo", "sft_weight": 0.1}
    }
    assert method_settings(settings.group("mora")) == {"operator": "sharing", "restart_every": 5}
    assert (str(settings.init_adapter), str(settings.frozen_adapter)) == ("runs/a", "o")
    assert (settings.new_tokens, settings.parameter_budget) == (["<a>"], 9)
    assert (str(settings.eval_data), settings.fsdp, settings.max_steps) == ("held.jsonl", True, 9)
    (tmp_path / "checkpoint").mkdir()  # a run's folder
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(old))
    resumed = parse(["train", "--config", str(tmp_path / "settings.yaml"), "--resume"])[1]
    assert (
        resumed.model_copy(update={"resume": False, "output_dir": settings.output_dir}) == settings
    )
    assert resumed.output_dir == tmp_path  # type: ignore[attr-defined]
    now = resolved(settings) | {"format_version": 2}
    assert make_settings(TrainSettings, migrate_settings(now)) == make_settings(
        TrainSettings, resolved(settings)
    )


@pytest.mark.parametrize(("old", "new"), RENAMED_COMMANDS.items())
def test_old_commands_hint_the_new_ones(old: str, new: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse([old, "x"])
    assert caught.value.hint == f"use afina {new}" and new in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_old_flags_hint_the_new_ones(command: str) -> None:
    kind = COMMANDS[command].settings
    for parent in kind.__mro__:
        for old, new in RENAMED_SETTINGS.get(parent.__name__, {}).items():
            if old in kind.model_fields:
                continue
            for given in (f"--{old.replace('_', '-')}", f"--{old}=1"):
                with pytest.raises(SettingsError) as caught:
                    parse([command, given, "1"])
                if new.partition(",")[0] in kind.model_fields:
                    assert f"--{new.partition(',')[0].replace('_', '-')}" in str(caught.value.hint)


def test_other_verbs_add_at_most_12_of_their_own() -> None:
    """A server has keys, limits and jobs in addition: 40. What compare passes on to its runs is theirs."""
    own = set(all_settings.ModelSettings.model_fields)
    for name, verb in COMMANDS.items():
        if verb.settings is not TrainSettings:  # which the plan shares
            theirs = issubclass(verb.settings, TrainSettings) or name == "compare"
            known = own | set(TrainSettings.model_fields if theirs else ())
            assert len(set(verb.settings.model_fields) - known) <= (
                40 if name == "serve" else 12
            ), verb


@pytest.mark.parametrize("name", SAMPLES)
def test_every_setting_is_a_flag_a_yaml_key_and_an_argument(name: str, tmp_path: Path) -> None:
    text, value = SAMPLES[name]
    data = [] if name == "data" else ["rows.jsonl"]
    flag = "--" + name.replace("_", "-")
    by_flag = parse(["train", *data, flag, text])[1]
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump({"data": "rows.jsonl", name: value}))
    by_yaml = parse(["train", "--config", str(file)])[1]
    by_argument = make_settings(TrainSettings, {"data": "rows.jsonl", name: value})
    assert by_flag == by_yaml == by_argument
    assert getattr(by_flag, name) != TrainSettings.model_fields[name].default
    found = getattr(by_flag, name)
    assert (str(found) if isinstance(found, Path) else found) == value


@pytest.mark.parametrize(("value", "blocks"), [(0, [0]), (-1, [-1]), ([0, 2], [0, 2])])
def test_blocks_are_chosen_by_their_numbers(tmp_path: Path, value: Any, blocks: list[int]) -> None:
    """One alone too, and the first one: 0 is a block, and not nothing."""
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"data": "x", "layers": value}))
    flag = str(value).strip("[]").replace(" ", "")
    for settings in (
        parse(["train", "--config", str(tmp_path / "s.yaml")])[1],
        parse(["train", "x", "--layers", flag])[1],
        make_settings(TrainSettings, {"data": "x", "layers": value}),
    ):
        assert settings.layers == blocks  # type: ignore[attr-defined]


def test_flags_win_over_yaml(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("data: a.jsonl\nrank: 4\nseed: 3\n")
    settings = parse(["train", "--config", str(tmp_path / "s.yaml"), "--rank", "16"])[1]
    assert (settings.rank, settings.seed) == (16, 3)  # type: ignore[attr-defined]


def test_a_switch_does_not_swallow_the_word_after_it() -> None:
    for line in (
        ["train", "--resume", "rows.jsonl"],
        ["train", "rows.jsonl", "--resume"],
        ["train", "--resume", "true", "rows.jsonl"],
    ):
        settings = parse(line)[1]
        assert (settings.resume, str(settings.data)) == (True, "rows.jsonl")  # type: ignore[attr-defined]
    settings = parse(["train", "rows.jsonl", "--gradient-checkpointing", "false"])[1]
    assert settings.gradient_checkpointing == "off"  # type: ignore[attr-defined]
    assert parse(["generate", "--ignore-chat-template", "Once upon"])[1].prompts == ["Once upon"]  # type: ignore[attr-defined]


def test_the_dial_of_checkpointing_is_a_word_or_a_number_of_blocks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for told, meant, every in (
        ("off", "off", 0),
        ("all", "all", 1),
        ("true", "all", 1),
        ("1", "all", 1),
        ("3", 3, 3),
    ):
        for line in (["--gradient-checkpointing", told], ["--config", str(tmp_path / "s.yaml")]):
            (tmp_path / "s.yaml").write_text(f"gradient_checkpointing: {told}\n")
            settings = parse(["train", "rows.jsonl", *line])[1]
            assert (settings.gradient_checkpointing, settings.recomputed) == (meant, every)  # type: ignore[attr-defined]
    assert parse(["train", "rows.jsonl"])[1].gradient_checkpointing == "auto"  # type: ignore[attr-defined]
    assert run(["train", "rows.jsonl", "--gradient-checkpointing", "0"]) == 2
    assert "every n-th layer" in capsys.readouterr().err


@pytest.mark.slow
def test_the_settings_a_run_writes_are_settings_again(trained: Path) -> None:
    settings = parse(["train", "--config", str(trained / "settings.yaml")])[1]
    assert settings == make_settings(
        TrainSettings,
        migrate_settings(yaml.safe_load((trained / "settings.yaml").read_text())),
    )
    assert settings.max_steps == 4  # type: ignore[attr-defined]


# near names


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        (["trian", "x"], "unknown command 'trian'", "'train'"),
        (["train", "x", "--learning_rte", "1"], "unknown flag --learning-rte", "'--learning-rate'"),
        (
            ["train", "x", "--learning-rate_=1"],
            "unknown flag --learning-rate-",
            "'--learning-rate'",
        ),
        (["train", "x", "--dpo.bta", "1"], "unknown flag --dpo.bta", "did you mean '--dpo.beta'?"),
        (["train", "x", "--beta", "1"], "unknown flag --beta", "--dpo.beta"),
        (["train", "x", "--options", "{}"], "unknown flag --options", "--dpo.beta"),
        (["train", "x", "--lr=1"], "unknown flag --lr", None),
        (["generate", "hi", "--temprature", "1"], "unknown flag --temprature", "'--temperature'"),
        (["train", "x", "y"], "unexpected word 'y'", "afina train --help"),
        (["--jsno"], "unknown flag --jsno", None),
        (["train"], "data is missing", "a file"),
        (["train", "x", "--rank", "many"], "rank cannot be 'many'", "rank of the low-rank update"),
        (["train", "x", "--rank", "0"], "rank cannot be '0'", "rank"),
        (["train", "x", "--dtype", "float8"], "dtype cannot be 'float8'", "dtype"),
        (["train", "x", "--rank-pattern", "{a: "], "cannot read '{a: '", None),
        (["train", "x", "--rank-pattern"], "expected one argument", "afina train --help"),
        (["train", "x", "--config", "/nowhere.yaml"], "cannot read the settings file", None),
        (["merge", "x"], "output_dir is missing", "folder"),
    ],
)
def test_what_cannot_be_understood_names_the_nearest(
    line: list[str], what: str, hint: str | None
) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(line)
    assert what in str(caught.value)
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        ("data: x\nlearning_rte: 1\n", "unknown setting 'learning_rte'", "s.yaml"),
        ("data: x\nrank: [1]\n", "rank cannot be [1]", "s.yaml"),
        ("data: x\nrank: 4\n  bad: : 1\n", "not valid YAML", "s.yaml:3"),
        ("- data\n", "expected one `name: value` per line", "s.yaml"),
        ("", "expected one `name: value` per line", "s.yaml"),
    ],
)
def test_bad_yaml(tmp_path: Path, content: str, what: str, where: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(SettingsError) as caught:
        parse(["train", "--config", str(tmp_path / "s.yaml")])
    assert what in str(caught.value)
    assert str(caught.value.where).endswith(where)
    if "learning_rte" in content:
        assert caught.value.hint == "did you mean 'learning_rate'?"


def test_python_arguments_are_checked_too(chats: Path) -> None:
    import afina as library

    with pytest.raises(SettingsError, match="unknown setting 'learning_rte'"):
        library.train(chats, learning_rte=1)
    with pytest.raises(SettingsError, match="unknown method 'loar'") as caught:
        library.train(chats, method="loar")
    assert caught.value.hint == "did you mean 'lora'?"
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        library.trian  # noqa: B018


def test_one_is_singular() -> None:
    assert [pluralize(n, "row") for n in (0, 1, 2, 1000)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "1,000 rows",
    ]


# verbs, their JSON and exit codes


def test_plan(capsys: pytest.CaptureFixture[str], tiny: Path, chats: Path, tmp_path: Path) -> None:
    status, result, _ = said(
        capsys, "plan", chats, "--base", tiny, "--output-dir", tmp_path / "run"
    )
    assert status == 0
    assert result["data"]["rows"] == 48
    assert "«" in result["example"]
    assert not (tmp_path / "run").exists()
    assert (
        run(["plan", str(chats), "--base", str(tiny), "--output-dir", str(tmp_path / "run")]) == 0
    )
    shown = capsys.readouterr().out
    assert "trainable parameters: " in shown
    assert re.search(r"layers +│ 0 to 3 ", shown)


@pytest.mark.parametrize("method", ["lora", "qlora", "freeze"])
def test_plan_shows_what_would_be_used(
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    chats: Path,
    method: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is left at "auto" or at nothing; a base in 4 bits has as many numbers as the one it came from."""
    monkeypatch.setenv("AFINA_CACHE", str(tmp_path))
    status, result, _ = said(
        capsys, "plan", chats, "--base", tiny, "--method", method, "--rank", 4, "--max-steps", 6
    )
    settings = result["settings"]
    assert status == 0
    assert "auto" not in settings.values()
    assert (settings["objective"], settings["max_length"], settings["dtype"]) == (
        "sft",
        192,
        "float32",
    )
    assert (settings["eval_steps"], settings["max_steps"]) == (1, 6)
    assert settings["alpha"] == (None if method == "freeze" else 8)
    assert settings["layers"] == ([3] if method == "freeze" else [0, 1, 2, 3])
    assert {"q_proj", "down_proj"} <= set(settings["target_modules"])
    assert result["base"]["parameters"] == sum(
        p.numel() for p in load_base(str(tiny)).model.parameters()
    )


def test_train_eval_merge_export(
    capsys: pytest.CaptureFixture[str], tiny: Path, chats: Path, general: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = [
        "--base",
        tiny,
        "--max-steps",
        3,
        "--retention-text",
        general,
        "--learning-rate",
        "3e-3",
    ]
    status, result, err = said(capsys, "train", chats, "--output-dir", out, *flags)
    assert status == 0
    assert result["folder"] == str(out)
    assert "eval loss" in err  # progress goes to standard error
    status, result, _ = said(capsys, "eval", out, "--max-new-tokens", 8, "--limit", 3)
    assert status == 0
    assert {"exact_match", "chrf", "loss"} <= set(result["after"])
    assert len(result["examples"]) == 3
    status, result, _ = said(capsys, "merge", out, "--output-dir", tmp_path / "merged")
    assert status == 0
    assert result["max_logit_difference"] < 1e-4
    for form, file in (("peft", "adapter_config.json"), ("hf", "config.json")):
        status, result, _ = said(
            capsys, "export", out, "--format", form, "--output", tmp_path / form
        )
        assert (status, result["format"]) == (0, form)
        assert (tmp_path / form / file).is_file()
    for line in (
        ["eval", out, "--limit", 2],
        ["merge", out, "--output-dir", tmp_path / "m2"],
        ["export", out, "--output", tmp_path / "e2"],
    ):
        assert run([*map(str, line)]) == 0
    assert "same greedy token" in capsys.readouterr().out


@pytest.mark.slow
def test_generate(
    capsys: pytest.CaptureFixture[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, result, _ = said(
        capsys,
        "generate",
        "say sol mar",
        "say [luna, pan]",
        "--adapter",
        trained,
        "--max-new-tokens",
        6,
    )
    assert status == 0
    assert [answer["prompt"] for answer in result["answers"]] == ["say sol mar", "say [luna, pan]"]
    assert all(0 < answer["tokens"] <= 6 for answer in result["answers"])
    assert result["adapter"] == str(trained)
    monkeypatch.setattr("sys.stdin", io.StringIO("say sol mar\n\nsay a\n"))
    status, piped, _ = said(capsys, "generate", "-", "--adapter", trained, "--max-new-tokens", 6)
    assert [answer["prompt"] for answer in piped["answers"]] == ["say sol mar", "say a"]
    assert piped["answers"][0] == result["answers"][0]
    status, off, _ = said(
        capsys,
        "generate",
        "say sol mar",
        "--adapter",
        trained,
        "--disable-adapter",
        "--max-new-tokens",
        6,
    )
    base = json.loads((trained / "run.json").read_text())["base"]["name"]
    status, alone, _ = said(
        capsys, "generate", "say sol mar", "--base", base, "--max-new-tokens", 6
    )
    assert off["answers"] == alone["answers"]
    assert off["adapter"] is alone["adapter"] is None
    assert off["answers"] != result["answers"][:1]
    status, raw, _ = said(
        capsys,
        "generate",
        "say sol mar",
        "--ignore-chat-template",
        "--base",
        base,
        "--max-new-tokens",
        6,
    )
    assert raw["answers"] != alone["answers"]
    assert run(["generate", "say sol", "--base", base]) == 0


@pytest.mark.slow
def test_chat(
    capsys: pytest.CaptureFixture[str], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scripted through standard input: the adapter off and on, the conversation forgotten."""
    script = (
        "/help\n/of\nsay sol mar\n/off\n/new\nsay sol mar\n/on\n/new\n\nsay sol mar\nand now?\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    status = run(
        ["chat", str(trained), "--max-new-tokens", "5", "--system-prompt", "be kind", "--json"]
    )
    out, err = capsys.readouterr()
    result = json.loads(out.splitlines()[-1])
    assert status == 0
    assert [message["role"] for message in result["messages"]] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert "/off" in err
    assert "/new     start a new conversation" in err
    assert "/of is none of /on, /off, /new, /help" in err
    answers = []
    for adapter in ("on", "off"):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/{adapter}\nsay sol mar\n"))
        run(["chat", str(trained), "--max-new-tokens", "5", "--json"])
        chatted = json.loads(capsys.readouterr().out.splitlines()[-1])["messages"][1]["content"]
        _, generated, _ = said(
            capsys,
            "generate",
            "say sol mar",
            "--adapter",
            trained,
            *(["--disable-adapter"] if adapter == "off" else []),
            "--max-new-tokens",
            5,
        )
        assert chatted.strip() == generated["answers"][0]["text"]
        answers.append(chatted)
    assert answers[0] != answers[1]


def test_a_long_conversation_says_how_to_start_again(
    capsys: pytest.CaptureFixture[str], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 300 + "\n/new\nhi\n"))
    assert run(["chat", "--base", str(tiny), "--max-new-tokens", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "/new starts a new conversation" in err.replace("\n", " ")
    assert [message["content"] for message in json.loads(out.splitlines()[-1])["messages"]][
        0
    ] == "hi"


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (["train", "/nowhere.jsonl"], 1),
        (["train", "x", "--rank", "0"], 2),
        (["frobnicate"], 2),
        (["eval"], 2),
        (["generate", "hi", "--base", "/nowhere"], 1),
        (["merge", "/nowhere", "--output-dir", "/nowhere/x"], 1),
    ],
)
def test_errors_are_an_object_too_and_set_the_exit_code(
    capsys: pytest.CaptureFixture[str], line: list[str], status: int
) -> None:
    assert run(line) == status
    plain = capsys.readouterr()
    assert plain.out == ""
    assert plain.err.startswith("afina: ")
    found, result, err = said(capsys, *line)
    assert found == status
    assert set(result["error"]) == {"what", "where", "why", "hint"}
    assert result["error"]["what"] in err


def test_an_interrupt_tells_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
    tiny: Path,
    chats: Path,
    general: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("afina.training.progress.ProgressDisplay.tick", interrupted)
    line = [
        "train",
        chats,
        "--base",
        tiny,
        "--retention-text",
        general,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        2,
    ]
    assert run([*map(str, line)]) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.slow
def test_the_process_itself(tiny: Path) -> None:
    """Through the real entry point: status, standard error, the last line."""
    done = afina(
        "generate", "-", "--base", tiny, "--max-new-tokens", 3, "--json", input="say sol\n"
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["answers"]) == 1
    done = afina("generate", "hi", "--bse", tiny)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean '--base'?" in done.stderr


@pytest.mark.slow
def test_a_long_command_prints_at_once_and_while_it_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("afina.cli.progress.SILENT_SECONDS", 0.05)
    with signs_of_life("audit", "long"):
        assert capsys.readouterr().err == "afina: audit started\n"
        assert re.search(r"audit has run for \d+ s", until(lambda: capsys.readouterr().err))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else the log is JSON lines only
    monkeypatch.setattr("afina.cli.progress.SILENT_SECONDS", 1.0)
    threads = threading.active_count()
    with signs_of_life("serve", "start"):
        print("ready", file=sys.stderr)
        until(lambda: threading.active_count() == threads)  # the one that watches has ended
    assert capsys.readouterr().err == "afina: serve started\nready\n"
    with signs_of_life("show", "short"):
        assert threading.active_count() == threads
    assert capsys.readouterr().err == ""


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="no_such_package is not installed") as caught:
        import_extra("no_such_package.part", "graders")
    assert caught.value.hint == "pip install 'afina[graders]'"
    with pytest.raises(ImportError):
        import_extra("afina.no_such_module", "graders")
