"""`afina train`: from settings to a run folder that tells its whole story.

RUN/settings.yaml     the resolved settings; `afina train --config` runs them again
RUN/example.txt       one row as the model reads it, the learned tokens marked
RUN/metrics.jsonl     a line a step
RUN/eval.jsonl        the eval rows
RUN/reference.json    dpo, kto, grpo, rloo and ppo: what the policy is compared with
RUN/completions/      grpo, rloo and ppo: some completions of each check
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
from afina.evaluation.loss_report import measure_losses
from afina.evaluation.retention import retention_loss
from afina.evaluation.verdict import forgetting_sentence, verdict
from afina.io.adapter_folder import WEIGHTS_FILE
from afina.io.atomic import recover_interrupted_replace, write_json, write_text
from afina.io.chat_format import CHAT_KEY, ChatFormat
from afina.io.migrations import migrate_settings
from afina.io.run_record import RUN_FORMAT_VERSION
from afina.io.strict_json import read_json_object
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.fsdp import shard_model
from afina.models.loading import choose_device
from afina.objectives.base import perplexity
from afina.objectives.prepared import EVAL_ROWS, to_jsonl
from afina.objectives.registry import get_objective, register_objective
from afina.settings import TrainSettings, make_settings, resolved
from afina.training import checkpoint
from afina.training.checkpoint import SETTINGS
from afina.training.progress import NullProgress, ProgressDisplay
from afina.training.results import TrainResult
from afina.training.run_card import model_card, plot_losses, plot_rewards
from afina.training.setup.prepare import AUTO_TEXT, resolve_objective
from afina.training.setup.processes import ProcessContext, world
from afina.training.setup.set_up import AUTO, RunSetup, default_out, set_up_run
from afina.training.trainer import Trainer, peak_memory_mb, read_metrics, train_in_one_pass

# how much to make again in the backward pass of runs that share a base, and why (see planning/dial.py)
Choose = Callable[[Sequence[RunSetup]], tuple[str | int, str | None]]


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
    if "format_version" in values:  # the settings.yaml of a run, as `--config` reads it
        values = migrate_settings(values)
    if isinstance(values.get("objective"), type):
        objective: Any = values["objective"]
        name = objective.name or objective.__name__.lower()
        values["objective"] = register_objective(name)(objective).name
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
                hint="give each an --output-dir of its own",
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
    objective = resolve_objective(settings)
    shares_base = get_objective(AUTO_TEXT if objective == "auto" else objective).shares_base
    alone = not shares_base or get_method(meant.method).replaces_base
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
            loop.setup.prepared.task.start_run(loop.run)
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
            "this is a file, not a run folder",
            where=str(folder),
            hint="choose another --output-dir",
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
            "add --resume to go on with it, or choose another --output-dir"
            if unfinished
            else "choose another --output-dir"
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
    write_text(folder / EVAL_ROWS, to_jsonl(setup.prepared.eval_records))
    write_text(folder / "metrics.jsonl", "")


def _losses(setup: RunSetup, route: ActiveAdapters | None) -> dict[str, float]:
    """Held-out loss (of a policy: minus its reward) and general loss in nats a token, of the model under `route`."""
    base = setup.prepared.base
    losses = {"eval_loss": setup.prepared.task.eval_loss(route)}
    if isinstance(base, CausalLM):  # classifiers and encoders have no next token
        losses["retention_loss"] = retention_loss(base, route, setup.settings.retention_text)
    return losses


def _save_best(setup: RunSetup, folder: Path, step: int) -> None:
    data = {key: setup.prepared.data_info[key] for key in ("path", "sha256")}
    story = {"data": data, "objective": setup.prepared.objective, "step": step}
    story |= _chat_record(setup)
    if setup.prepared.frozen_adapter is not None:
        story["frozen_adapter"] = setup.prepared.frozen_adapter
    adapter = setup.adapter
    if not setup.prepared.task.saves_head and adapter.config.modules_to_save:
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
    judged, progress = _evaluate(setup, folder, loop, route), loop.progress
    story = (
        _facts(setup, folder)
        | {
            "steps": progress.step,
            "tokens": progress.tokens,
            "seconds": progress.seconds,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "peak_memory_mb": peak_memory_mb(),
            "units": asdict(setup.prepared.units),
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


def _evaluate(
    setup: RunSetup, folder: Path, loop: Trainer, route: ActiveAdapters
) -> dict[str, Any]:
    """Return the losses of the best adapter and those before, the objective's report, a verdict."""
    task, baseline = setup.prepared.task, setup.prepared.baseline
    before = {"loss": loop.progress.before["eval_loss"]}
    if task.report_key and task.has_baseline:
        before = task.evaluate(baseline)
    after = task.evaluate(route)
    report = task.report(before, after)
    sentences = report.pop("verdict")
    losses = _policy_losses if task.maximizes_reward else _losses_with_intervals
    record = losses(setup, loop, route, before["loss"], after["loss"])
    if task.maximizes_reward:
        record["verdict"] = [*sentences, *record["verdict"]]
    else:
        record["verdict"] += sentences
    if task.report_key:
        task.plot(report, folder / "confusion.png", loop.world.is_main_process)
        record[task.report_key] = report | task.run_facts()
    return record


def _losses_with_intervals(
    setup: RunSetup, loop: Trainer, route: ActiveAdapters, before: float, after: float
) -> dict[str, Any]:
    """Return losses of eval rows, training rows and general text, with intervals, and a verdict."""
    units, progress = setup.prepared.units, loop.progress
    now = {"eval_loss": after}
    if isinstance(base := setup.prepared.base, CausalLM):
        now["retention_loss"] = retention_loss(base, route, setup.settings.retention_text)
    losses = replace(
        measure_losses(setup.prepared.task, progress.before, now, setup.prepared.baseline, route),
        best_step=progress.best_step,
        last_step=progress.step,
    )
    return {
        "losses": asdict(losses)
        | {"eval_interval": losses.eval_change.interval, "forgetting": losses.forgetting},
        "perplexity": {
            "before": perplexity(losses.eval_loss_before),
            "after": perplexity(losses.eval_loss_after),
        },
        "verdict": verdict(losses, units.unit, units.choices),
    }


def _policy_losses(
    setup: RunSetup, loop: Trainer, route: ActiveAdapters, before: float, after: float
) -> dict[str, Any]:
    """Return minus the mean reward, as in metrics.jsonl, and the loss on general text."""
    progress, base = loop.progress, setup.prepared.base
    assert isinstance(base, CausalLM)
    retention_before = progress.before["retention_loss"]
    retention_after = retention_loss(base, route, setup.settings.retention_text)
    forgetting = retention_after - retention_before
    stopped = progress.best_step < progress.step
    return {
        "losses": {
            "eval_loss_before": before,
            "eval_loss_after": after,
            "retention_loss_before": retention_before,
            "retention_loss_after": retention_after,
            "forgetting": forgetting,
            "best_step": progress.best_step,
            "last_step": progress.step,
        },
        "verdict": [
            *([f"The best state, of step {progress.best_step}, was kept."] if stopped else []),
            forgetting_sentence(forgetting),
        ],
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
    """Return the profile of the adapter's prompts for routing, and the key of its embedding.

    Without prompts there is none: classifiers and encoders answer no requests.
    """
    base, prompts = setup.prepared.base, setup.prepared.task.profile_prompts()
    if not isinstance(base, CausalLM) or not prompts:
        return None, ""
    frame = ChatFrame.of(_renderer(setup, base))
    embedding = PromptEmbedder(base)
    return build_profile(embedding, [frame.question(tokens) for tokens in prompts]), embedding.key


def _renderer(setup: RunSetup, base: CausalLM) -> Renderer:
    """Return what writes the prompts of the run."""
    return Renderer(base.tokenizer, ChatFormat.from_settings(setup.settings), base.max_positions)


def _chat_record(setup: RunSetup) -> dict[str, Any]:
    """Return how the model is asked, for run.json and afina.json; {} for classifiers and encoders."""
    base = setup.prepared.base
    return (
        {CHAT_KEY: _renderer(setup, base).chat_format.record()}
        if isinstance(base, CausalLM)
        else {}
    )


def _facts(setup: RunSetup, folder: Path) -> dict[str, Any]:
    """What was run, on what, with what."""
    base, source = setup.prepared.base, setup.prepared.data_info
    weights = folder / "adapter" / WEIGHTS_FILE
    return {
        "format_version": RUN_FORMAT_VERSION,
        "settings": resolved(setup.settings),
        "checkpointing": {"used": setup.settings.gradient_checkpointing, "why": setup.why},
        **_chat_record(setup),
        "method": setup.adapter.config.method,
        "objective": setup.prepared.objective,
        "init_adapter": setup.prepared.init_adapter,
        "frozen_adapter": setup.prepared.frozen_adapter,
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
