"""`afina train`: from settings to a run folder that tells its whole story.

RUN/settings.yaml     the resolved settings; `afina train --config` runs them again
RUN/example.txt       one row as the model reads it, the learned tokens marked
RUN/metrics.jsonl     a line a step
RUN/held_out.jsonl    the rows kept for judging
RUN/reference.json    dpo, kto, grpo, rloo and ppo: what the policy is compared with
RUN/answers/          grpo, rloo and ppo: some answers of each check
RUN/checkpoint/       the state from which --resume goes on
RUN/adapter/          the best adapter, in PEFT's files, and what its prompts look like to the base
RUN/run.json          data, base, environment, figures, verdict
RUN/curve.png, RUN/README.md
"""

import hashlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor

import afina
from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter, detach
from afina.adapters.loading import load_adapter
from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.adapters.saving import save_adapter
from afina.data.renderer import Renderer
from afina.engine.routing_profile import ChatFrame, PromptEmbedder, build_profile, write_profile
from afina.errors import SettingsError, TrainingError
from afina.evaluation.confusion import classify_held_out
from afina.evaluation.intervals import row_loss_change
from afina.evaluation.policy_eval import judge_policy
from afina.evaluation.preference_eval import HELD_OUT, judge_preferences
from afina.evaluation.retention import perplexity, retention_loss
from afina.evaluation.verdict import LossReport, forgetting_sentence, verdict
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.adapter_metadata import FORMAT_VERSION
from afina.io.atomic import recover_interrupted_replace, write_json, write_text
from afina.io.strict_json import read_json_object
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.fsdp import shard_model
from afina.models.loading import choose_device
from afina.objectives.base import train_sample
from afina.objectives.classification import ClassificationObjective
from afina.objectives.language_modeling import LanguageModelingObjective
from afina.objectives.policy import PolicyObjective, TokenizedPrompt
from afina.objectives.preference import PairwiseObjective, PreferenceObjective
from afina.settings import POLICIES, TrainSettings, make_settings, resolved
from afina.training import checkpoint
from afina.training.checkpoint import SETTINGS
from afina.training.progress import NullProgress, ProgressDisplay
from afina.training.results import TrainResult
from afina.training.run_card import model_card, plot_losses, plot_rewards
from afina.training.setup.prepare import resolve_objective
from afina.training.setup.prepared import to_jsonl
from afina.training.setup.processes import ProcessContext, world
from afina.training.setup.set_up import AUTO, RunSetup, default_out, set_up_run
from afina.training.trainer import Trainer, peak_memory_mb, read_metrics, train_in_one_pass

# how much to make again in the backward pass of runs that share a base, and why (see planning/dial.py)
Choose = Callable[[Sequence[RunSetup]], tuple[str | int, str | None]]
BEGINNING = 64  # tokens of a text without a question that stand for it in the profile


def train(
    data: str | Path | TrainSettings,
    *,
    quiet: bool = True,
    model: Classifier | None = None,
    choose: Choose | None = None,
    **values: Any,
) -> TrainResult:
    """Adapt a base to `data`; settings as in `afina train --help`. Returns the finished run.

    `model` is a classifier made in Python out of any torch module; the adapter stays attached to it. `choose` turns the dial
    of checkpointing where that is "auto"; without it nothing is made again.
    Raises an `AfinaError` that says what is wrong; a run that was interrupted goes on with `resume=True`.
    """
    settings = (
        data
        if isinstance(data, TrainSettings)
        else make_settings(TrainSettings, {"data": Path(data), **values})
    )
    [outcome] = train_many([settings], quiet=quiet, model=model, choose=choose)
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def train_many(
    runs: Sequence[TrainSettings],
    *,
    quiet: bool = True,
    model: Classifier | None = None,
    choose: Choose | None = None,
) -> list[TrainResult | TrainingError]:
    """Train several adapters; those on one language model share it, and its passes. Each has its own run folder.

    Losses are those of the same runs one by one (to the rounding of float32; with dropout, to its chance). A run that
    breaks ends alone, and its error stands in its place. Settings and data that are wrong raise before anything begins.
    """
    folders = [default_out(settings) for settings in runs]
    world()  # processes that torchrun started meet before anything is read
    for folder, settings in zip(folders, runs, strict=True):
        _check_folder(folder, settings)
        if folders.count(folder) > 1:
            raise SettingsError(
                "two runs would share a folder",
                where=str(folder),
                hint="give each an --out of its own",
            )
        if settings.fsdp and get_method(get_preset(settings.method, 1).method).replaces_base:
            why = "it trains the weights themselves, and each process holds what it trains whole"
            raise SettingsError(
                f"{settings.method} cannot be sharded",
                where="device",
                why=why,
                hint="--device auto",
            )
    groups: dict[Any, list[int]] = {}
    for number, settings in enumerate(runs):
        groups.setdefault(_shares(settings) or number, []).append(number)
    outcomes: dict[int, TrainResult | TrainingError] = {}
    for numbers in groups.values():
        made = _train_group(
            [runs[n] for n in numbers], [folders[n] for n in numbers], quiet, model, choose
        )
        outcomes |= dict(zip(numbers, made, strict=True))
    return [outcomes[number] for number in range(len(runs))]


def _shares(settings: TrainSettings) -> tuple[Any, ...] | None:
    """What runs that can share a base have in common; None where a run needs one of its own."""
    meant = get_preset(settings.method, 1)
    alone = (
        resolve_objective(settings) in ("classify", "mlm", "reward", *POLICIES)
        or get_method(meant.method).replaces_base
    )
    auto = (
        settings.target_modules == AUTO
    )  # looks at the gradient of a base on which nobody else sits
    if alone or auto or settings.new_tokens or settings.init_adapter or settings.frozen_adapter:
        return None
    return (
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.device,
        meant.quantization,
    )


def _train_group(
    runs: list[TrainSettings],
    folders: list[Path],
    quiet: bool,
    model: Classifier | None,
    choose: Choose | None,
) -> list[TrainResult | TrainingError]:
    """Runs on one base, together."""
    all_of_us = world()
    setups: list[RunSetup] = []
    loops: list[Trainer] = []
    with all_of_us.main_process_first():
        for number, settings in enumerate(runs):
            base = setups[0].prepared.base if setups else model
            assert base is None or isinstance(base, CausalLM | Classifier)
            setups.append(set_up_run(settings, base, f"run-{number}"))
    _turn_dial(setups, choose, all_of_us)
    if runs[0].fsdp:
        learned = [parameter for setup in setups for parameter in setup.adapter.parameters()]
        shard_model(setups[0].prepared.base, learned, choose_device("auto"), all_of_us.size)
    with all_of_us.main_process_first():
        display = (
            NullProgress() if quiet or not all_of_us.is_main_process else ProgressDisplay(setups)
        )
        for number, (setup, folder) in enumerate(zip(setups, folders, strict=True)):
            tell, keep = partial(display.tick, run=number), partial(_save_best, setup, folder)
            loop = Trainer(setup, folder, _identity(setup), tell, keep, all_of_us)
            if checkpoint.exists(
                folder
            ):  # else it may have been cut off before the first one: nothing is lost then
                loop.resume()
            elif all_of_us.is_main_process:
                _begin(setup, folder)
            loops.append(loop)
    with display:
        for loop in loops:
            if isinstance(task := loop.setup.prepared.task, PreferenceObjective | PolicyObjective):
                task.start_run(loop.run)
            if not loop.progress.before:
                loop.progress.before = _losses(loop.setup, loop.setup.prepared.baseline)
                loop.save()
        failed = train_in_one_pass(loops)
        return [
            failed[loop]
            if loop in failed
            else TrainResult(loop.run, _finish(loop.setup, loop.run, loop))
            for loop in loops
        ]


def _turn_dial(
    setups: Sequence[RunSetup], choose: Choose | None, all_of_us: ProcessContext
) -> None:
    """Put what is used in the place of checkpointing "auto", in the settings that the run keeps; the same everywhere."""
    open_ones = [setup for setup in setups if setup.settings.gradient_checkpointing == "auto"]
    value, why = choose(setups) if choose and open_ones else ("off", None)
    agreed = round(
        all_of_us.broadcast({"off": 0.0, "all": 1.0}[value] if isinstance(value, str) else value)
    )
    for setup in open_ones:
        dial = {"gradient_checkpointing": {0: "off", 1: "all"}.get(agreed, agreed)}
        setup.settings, setup.why = setup.settings.model_copy(update=dial), why


def _check_folder(folder: Path, settings: TrainSettings) -> None:
    """A new run never writes over an old one; a resumed one must have begun."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(
            "this is a file, not a run folder", where=str(folder), hint="choose another --out"
        )
    begun = (folder / SETTINGS).is_file()
    if settings.resume and not begun:
        raise TrainingError(
            "nothing to resume here", where=str(folder), hint="leave out --resume to start"
        )
    if not settings.resume and folder.exists() and any(folder.iterdir()):
        unfinished = begun and not (folder / "README.md").exists()
        what = "there is a run in this folder already" if begun else "this folder is not empty"
        hint = (
            "add --resume to go on with it, or choose another --out"
            if unfinished
            else "choose another --out"
        )
        raise SettingsError(what, where=str(folder), hint=hint)


def _identity(setup: RunSetup) -> dict[str, Any]:
    """What must be the same when a run is resumed: every setting that changes the result, data, base.

    Files may lie elsewhere by then: data and base are known by their content. Checkpointing changes no number.
    """
    elsewhere = ("resume", "output_dir", "data", "base", "device", "gradient_checkpointing")
    return {
        "settings": {k: v for k, v in resolved(setup.settings).items() if k not in elsewhere},
        "data": setup.prepared.data_info["sha256"],
        "base": setup.prepared.base.hash,
        "held-out rows": hashlib.sha256(to_jsonl(setup.prepared.eval_records).encode()).hexdigest(),
    } | {
        name: value
        for name, value in (
            ("adapter it goes on from", setup.prepared.init_adapter),
            ("adapter it learns over", setup.prepared.frozen_adapter),
            ("judge that gives the rewards", setup.prepared.reward_hash),
        )
        if value is not None
    }


def _begin(setup: RunSetup, folder: Path) -> None:
    settings = {"format_version": 2} | resolved(setup.settings)
    settings |= {"resume": False, "output_dir": str(folder)}
    write_text(folder / SETTINGS, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_text(folder / "example.txt", setup.prepared.example + "\n")
    write_text(folder / HELD_OUT, to_jsonl(setup.prepared.eval_records))
    write_text(folder / "metrics.jsonl", "")


def _losses(setup: RunSetup, route: ActiveAdapters | None) -> dict[str, float]:
    """Held-out loss (of a policy: minus its reward) and general loss in nats a token, of the model under `route`."""
    base = setup.prepared.base
    losses = {"held_out": setup.prepared.task.eval_loss(route)}
    if isinstance(base, CausalLM):  # classifiers and encoders have no next token
        losses["general"] = retention_loss(base, route, setup.settings.retention_text)
    return losses


def _save_best(setup: RunSetup, folder: Path, step: int) -> None:
    data = {key: setup.prepared.data_info[key] for key in ("path", "sha256")}
    story = {"data": data, "objective": setup.prepared.objective, "step": step}
    if setup.prepared.frozen_adapter is not None:
        story["over"] = setup.prepared.frozen_adapter
    adapter = setup.adapter
    if (
        setup.prepared.objective in POLICIES and adapter.config.modules_to_save
    ):  # the head that guesses rewards has done its work
        deltas = {
            path: delta
            for path, delta in adapter.layers.items()
            if path not in adapter.config.modules_to_save
        }
        adapter = Adapter(adapter.name, replace(adapter.config, modules_to_save=()), deltas)
    save_adapter(adapter, setup.prepared.base, folder / "adapter", story)


def _finish(setup: RunSetup, folder: Path, loop: Trainer) -> dict[str, Any]:
    """Judge the best adapter, and write run.json, the curve and the card."""
    if loop.world.is_main_process:
        recover_interrupted_replace(folder / "adapter")
    loop.world.barrier()
    best = load_adapter(folder / "adapter", setup.prepared.base, "best")
    best.frozen_companions = setup.adapter.frozen_companions
    route = best.active
    policy = isinstance(setup.prepared.task, PolicyObjective)
    judged = _judge_policy(setup, loop, route) if policy else _judge(setup, folder, loop, route)
    progress = loop.progress
    story = (
        _facts(setup, folder)
        | {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "peak_memory_mb": peak_memory_mb(),
            "words": asdict(setup.prepared.words),
        }
        | judged
    )
    detach(setup.prepared.base.model, best)
    profile, key = _profile(setup)  # in every process: the base may be spread over them
    if loop.world.is_main_process:
        _write(folder, story)
        if profile is not None:
            write_profile(folder / "adapter", profile, key)
    loop.world.barrier()
    return story


def _judge(setup: RunSetup, folder: Path, loop: Trainer, route: ActiveAdapters) -> dict[str, Any]:
    """The losses of the best adapter beside those before, and what can be said of them."""
    after, task, first = _losses(setup, route), setup.prepared.task, setup.prepared.baseline
    before, progress, words = loop.progress.before, loop.progress, setup.prepared.words
    losses = LossReport(
        held_before=before["held_out"],
        held_after=after["held_out"],
        train_before=task.train_loss(first),
        train_after=task.train_loss(route),
        held=row_loss_change(task, task.eval_rows, route, first),
        train=row_loss_change(task, train_sample(task), route, first),
        held_rows=len(task.eval_rows),
        general_before=before.get("general"),
        general_after=after.get("general"),
        best_step=progress.best_step,
        last_step=progress.step,
    )
    story = {
        "losses": asdict(losses)
        | {"held_interval": losses.held.interval, "forgetting": losses.forgetting},
        "perplexity": {
            "before": perplexity(losses.held_before),
            "after": perplexity(losses.held_after),
        },
        "verdict": verdict(losses, words.unit, words.choices),
    }
    if isinstance(task, ClassificationObjective):
        story |= {
            "classes": classify_held_out(
                task, route, folder / "confusion.png", loop.world.is_main_process
            )
        }
    if isinstance(task, PairwiseObjective):
        found = judge_preferences(task, setup.prepared.objective, first, route)
        story["verdict"] += found.pop("verdict")
        story |= {"preferences": found | {"start": setup.prepared.init_adapter}}
    return story


def _judge_policy(setup: RunSetup, loop: Trainer, route: ActiveAdapters) -> dict[str, Any]:
    """The rewards of the best adapter beside those before. `losses` has minus the mean reward, as metrics.jsonl does."""
    task, first, progress = setup.prepared.task, setup.prepared.baseline, loop.progress
    assert isinstance(task, PolicyObjective)
    assert isinstance(setup.prepared.base, CausalLM)
    found = judge_policy(task, first, route)
    before, after = (
        progress.before["general"],
        retention_loss(setup.prepared.base, route, setup.settings.retention_text),
    )
    said = found.pop("verdict")
    if progress.best_step < progress.step:
        said.append(f"The best state, of step {progress.best_step}, was kept.")
    losses = {
        "held_before": -found["before"]["reward"],
        "held_after": -found["after"]["reward"],
        "general_before": before,
        "general_after": after,
        "forgetting": after - before,
        "best_step": progress.best_step,
        "last_step": progress.step,
    }
    policy = found | {
        "start": setup.prepared.init_adapter,
        "seconds_here": task.seconds,
    }  # of this sitting, where it was resumed
    return {
        "losses": losses,
        "policy": policy,
        "verdict": [*said, forgetting_sentence(after - before)],
    }


def _write(folder: Path, story: dict[str, Any]) -> None:
    """The end of a run's story, for machines, as a picture and as a card."""
    write_json(folder / "run.json", story)
    draw = plot_rewards if "policy" in story else plot_losses
    draw(read_metrics(folder), story, folder / "curve.png")
    card = model_card(story)
    write_text(folder / "adapter" / "README.md", card)
    write_text(folder / "README.md", card)


def _profile(setup: RunSetup) -> tuple[Tensor | None, str]:
    """What the adapter's own prompts (or the beginnings of its texts) look like to the base, and what made that.

    Nothing where there are no prompts: classifiers and encoders answer no queries.
    """
    base, task = setup.prepared.base, setup.prepared.task
    if not isinstance(base, CausalLM) or not isinstance(
        task, LanguageModelingObjective | PreferenceObjective | PolicyObjective
    ):
        return None, ""
    rows: Sequence[Any] = task.train
    if isinstance(task, PreferenceObjective):
        rows = [e for row in task.train if (e := row.chosen or row.rejected)]
    frame, embedding = (
        ChatFrame.of(Renderer(base.tokenizer, setup.settings.chat_template, base.max_positions)),
        PromptEmbedder(base),
    )
    asked = [
        e.token_ids
        if isinstance(e, TokenizedPrompt)
        else e.token_ids[: e.prompt_length] or e.token_ids[:BEGINNING]
        for e in rows
    ]
    prompts = [frame.question(tokens) for tokens in asked]
    return build_profile(embedding, prompts), embedding.key


def _facts(setup: RunSetup, folder: Path) -> dict[str, Any]:
    """What was run, on what, with what."""
    base, source = setup.prepared.base, setup.prepared.data_info
    weights = folder / "adapter" / WEIGHTS_FILE
    return {
        "format_version": FORMAT_VERSION,
        "settings": resolved(setup.settings),
        "checkpointing": {"used": setup.settings.gradient_checkpointing, "why": setup.why},
        "method": setup.adapter.config.method,
        "objective": setup.prepared.objective,
        "over": setup.prepared.frozen_adapter,
        "learning_rate": setup.learning_rate,
        "trainable_parameters": setup.adapter.num_parameters(),
        "adapter": read_json_object(folder / "adapter" / "afina.json")["hash"],
        "adapter_kb": weights.stat().st_size / 1000,
        "base": {
            "name": base.name,
            "revision": base.revision,
            "hash": base.hash,
            "dtype": str(base.dtype).removeprefix("torch."),
            "licence": _licence(base.folder),
            "remote_code": base.remote_code,
        },
        "data": source | {"skipped": setup.prepared.skipped, "licence": None},
        "environment": {
            "afina": afina.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": world().size,
        },
    }


def _licence(folder: Path | None) -> str | None:
    """The licence that a base's model card names in its header, if it has one."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---")
    try:
        header = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:  # somebody's card, and the run is done: no reason to fail
        return None
    return header.get("license") if isinstance(header, dict) else None
