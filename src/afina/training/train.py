"""`afina train`: train one adapter, or several on one base, each in its run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter
from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.adapters.saving import save_adapter
from afina.errors import SettingsError, TrainingError
from afina.evaluation.retention import retention_loss
from afina.io.migrations import migrate_settings
from afina.io.run_record import FAILURE_FILE
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.models.fsdp import shard_model
from afina.models.loading import choose_device
from afina.objectives.registry import get_objective, register_objective
from afina.planning.checkpointing_policy import choose_checkpointing
from afina.settings import TrainSettings, make_settings
from afina.training import checkpoint
from afina.training.finish import chat_record, embedding_record, finish_run
from afina.training.progress import NullProgress, ProgressDisplay
from afina.training.results import TrainResult
from afina.training.run_folder import (
    begin_run,
    check_folder,
    record_failure,
    removed_on_failure,
    run_identity,
)
from afina.training.setup.prepare import AUTO_TEXT, resolve_objective
from afina.training.setup.processes import ProcessContext, world
from afina.training.setup.set_up import AUTO, RunSetup, default_out, set_up_run
from afina.training.trackers import check_trackers, tracked
from afina.training.trainer import Trainer, train_in_one_pass


def train(
    data: str | Path | Sequence[str | Mapping[str, Any]] | TrainSettings,
    *,
    quiet: bool = True,
    model: Classifier | None = None,
    **values: Any,
) -> TrainResult:
    """Train an adapter on `data`; settings as in `afina train --help`. Return the finished run.

    Args:
        data: A file of rows, several with or without weights, or complete settings.
        quiet: Print no progress.
        model: A classifier built from any torch module; the adapter stays attached to it.
        values: Settings. `objective` may be a class, registered or not.

    Raises:
        AfinaError: Settings or data are wrong, or the run failed; an interrupted run continues
            with `resume=True`.

    Example:
        >>> afina.train("rows.jsonl", method="lora", rank=8).verdict
    """
    if "format_version" in values:  # the settings.yaml of a run, as `--config` reads it
        values = migrate_settings(values)
    if isinstance(values.get("objective"), type):
        objective: Any = values["objective"]
        name = objective.name or objective.__name__.lower()
        values["objective"] = register_objective(name)(objective).name
    settings = data
    if not isinstance(settings, TrainSettings):
        settings = make_settings(TrainSettings, {"data": settings, **values})
    [outcome] = train_many([settings], quiet=quiet, model=model)
    if isinstance(outcome, TrainingError):
        raise outcome
    return outcome


def train_many(
    runs: Sequence[TrainSettings], *, quiet: bool = True, model: Classifier | None = None
) -> list[TrainResult | TrainingError]:
    """Train several adapters, each in its own run folder; those on one base share it.

    Losses are those of the same runs one by one (to float32 rounding; with dropout, to its
    randomness). A run that fails ends alone, and its error is in its position of the result.

    Raises:
        AfinaError: Settings or data are wrong; nothing has begun then.
    """
    processes = world()  # processes that torchrun started connect before anything is read
    with processes.main_process_first():  # all choose a folder before one of them writes it
        folders = [default_out(settings) for settings in runs]
    for folder, settings in zip(folders, runs, strict=True):
        check_folder(folder, settings)
        check_trackers(settings.report_to)
        if folders.count(folder) > 1:
            hint = "give each an --output-dir of its own"
            raise SettingsError("two runs would share a folder", where=str(folder), hint=hint)
        if settings.fsdp and get_method(get_preset(settings.method, 1).method).replaces_base:
            raise SettingsError(
                f"{settings.method} cannot be sharded",
                where="fsdp",
                why="it trains the weights themselves, and each process has all that it trains",
                hint="leave out --fsdp",
            )
    groups: dict[Any, list[int]] = {}
    for number, settings in enumerate(runs):
        groups.setdefault(_shared_base(settings) or number, []).append(number)
    outcomes: dict[int, TrainResult | TrainingError] = {}
    for numbers in groups.values():
        group = [runs[n] for n in numbers], [folders[n] for n in numbers]
        outcomes |= dict(zip(numbers, _train_group(*group, quiet, model), strict=True))
    return [outcomes[number] for number in range(len(runs))]


def _shared_base(settings: TrainSettings) -> tuple[Any, ...] | None:
    """Return the key of the base that runs can share; None where a run needs its own."""
    preset = get_preset(settings.method, 1)
    objective = resolve_objective(settings)
    shares_base = get_objective(AUTO_TEXT if objective == "auto" else objective).shares_base
    needs_own = (
        not shares_base
        or get_method(preset.method).replaces_base
        or settings.target_modules == AUTO  # takes gradients of a base without other adapters
        or settings.new_tokens
        or settings.init_adapter
        or settings.frozen_adapter
    )
    if needs_own:
        return None
    return (
        settings.base,
        settings.revision,
        settings.trust_remote_code,
        settings.dtype,
        settings.device,
        preset.quantization,
    )


def _train_group(
    runs: list[TrainSettings], folders: list[Path], quiet: bool, model: Classifier | None
) -> list[TrainResult | TrainingError]:
    """Train runs on one base, together."""
    processes = world()
    setups: list[RunSetup] = []
    with processes.main_process_first():
        for number, settings in enumerate(runs):
            base = setups[0].prepared.base if setups else model
            assert base is None or isinstance(base, CausalLM | Classifier)
            setups.append(set_up_run(settings, base, f"run-{number}"))
    _resolve_checkpointing(setups, processes)
    if runs[0].fsdp:
        trained = [parameter for setup in setups for parameter in setup.adapter.parameters()]
        shard_model(setups[0].prepared.base, trained, choose_device("auto"), processes.size)
    is_quiet = quiet or not processes.is_main_process
    display = NullProgress() if is_quiet else ProgressDisplay(setups)
    with processes.main_process_first():
        # before the optimizers take their copies of the parameters
        initial_losses = [
            None
            if _has_checkpoint(setup, folder)
            else setup.prepared.task.initialize(setup.adapter)
            for setup, folder in zip(setups, folders, strict=True)
        ]
        trainers = [
            Trainer(
                setup,
                folder,
                run_identity(setup),
                partial(display.tick, run=number),
                partial(_save_best, setup, folder),
                processes,
            )
            for number, (setup, folder) in enumerate(zip(setups, folders, strict=True))
        ]
        new = [trainer for trainer in trainers if not _resume(trainer)]
    with display, tracked(trainers):
        with removed_on_failure([trainer.run for trainer in new]):
            for trainer, initial_loss in zip(trainers, initial_losses, strict=True):
                trainer.setup.prepared.task.start_run(trainer.run)
                if initial_loss is not None:
                    trainer.keep_best(initial_loss)
                if not trainer.progress.before:
                    baseline = trainer.setup.prepared.baseline
                    trainer.progress.before = _losses(trainer.setup, baseline)
                    trainer.save()
        failed = train_in_one_pass(trainers)
        for trainer, error in failed.items():
            record_failure(trainer.run, error)
        return [failed.get(trainer) or _result(trainer) for trainer in trainers]


def _has_checkpoint(setup: RunSetup, folder: Path) -> bool:
    return bool(setup.settings.resume) and checkpoint.exists(folder)


def _resume(trainer: Trainer) -> bool:
    """Load the checkpoint of a run, or begin its folder; return whether there was a checkpoint.

    A run that was interrupted before its first checkpoint begins again: nothing is lost.
    """
    is_resumed = _has_checkpoint(trainer.setup, trainer.run)
    if is_resumed:
        trainer.resume()
        (trainer.run / FAILURE_FILE).unlink(missing_ok=True)
    elif trainer.world.is_main_process:
        begin_run(trainer.setup, trainer.run)
    return is_resumed


def _result(trainer: Trainer) -> TrainResult:
    record = finish_run(trainer)
    return TrainResult(trainer.run, record, record["next_command"])


def _resolve_checkpointing(setups: Sequence[RunSetup], processes: ProcessContext) -> None:
    """Replace gradient checkpointing "auto" by a level, the same on every process."""
    automatic = [setup for setup in setups if setup.settings.gradient_checkpointing == "auto"]
    level, why, peak = choose_checkpointing(setups) if automatic else ("off", None, None)
    number = {"off": 0, "all": 1}.get(level, level) if isinstance(level, str) else level
    agreed = round(processes.broadcast(float(number)))
    for setup in automatic:
        update = {"gradient_checkpointing": {0: "off", 1: "all"}.get(agreed, agreed)}
        setup.settings, setup.why = setup.settings.model_copy(update=update), why
        setup.planned_memory_mb = None if peak is None else peak / 1e6


def _losses(setup: RunSetup, active: ActiveAdapters) -> dict[str, float]:
    """Return eval loss and retention loss in nats per token; of a policy, minus its reward."""
    base = setup.prepared.base
    losses = {"eval_loss": setup.prepared.task.eval_loss(active)}
    if isinstance(base, CausalLM):  # classifiers and encoders have no next token
        losses["retention_loss"] = retention_loss(base, active, setup.settings.retention_text)
    return losses


LABEL_KEYS = ("labels", "task", "pairs")  # of classifiers: what their outputs are


def _save_best(setup: RunSetup, folder: Path, step: int) -> None:
    """Save the adapter of an evaluation that is the best so far."""
    info = setup.prepared.data_info
    data = {key: info[key] for key in ("path", "sha256", *LABEL_KEYS) if key in info}
    metadata = {"data": data, "objective": setup.prepared.objective, "step": step}
    metadata |= chat_record(setup) | embedding_record(setup)
    if setup.prepared.frozen_adapter is not None:
        metadata["frozen_adapter"] = setup.prepared.frozen_adapter
    adapter = setup.adapter
    head = adapter.config.modules_to_save
    if head and not setup.prepared.task.saves_head:
        layers = {path: layer for path, layer in adapter.layers.items() if path not in head}
        adapter = Adapter(adapter.name, replace(adapter.config, modules_to_save=()), layers)
    save_adapter(adapter, setup.prepared.base, folder / "adapter", metadata)
