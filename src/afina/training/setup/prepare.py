"""From settings to a base and an objective with its rows. Nothing is attached yet."""

from pathlib import Path

from afina.data.table import detect_schema
from afina.errors import DataError, SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.objectives.prepared import PreparedData
from afina.objectives.registry import get_objective
from afina.objectives.run_rows import unread_folders, with_split_folders
from afina.settings import TrainSettings
from afina.training.setup.no_effect import check_effects
from afina.training.setup.processes import world

AUTO_TEXT = "sft"  # "auto" on rows of text: sft, or pretrain where no row has an answer


def resolve_objective(settings: TrainSettings) -> str:
    """Return the objective of the settings, or the one that the data file's fields imply."""
    if settings.objective != "auto" or settings.data is None:  # a plan without data is for texts
        return settings.objective
    found: dict[str, Path] = {}
    for file in settings.data_files:
        detected = detect_schema(file.path, file.columns or {})
        name = "auto" if detected is None else detected.schema.objective(detected.format)
        found.setdefault(name, file.path)
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"files for different objectives: {_name(one)} and {_name(other)}",
            where=str(second),
            why=f"{first} has rows for {_name(one)}, and {second} for {_name(other)}",
            hint="--objective NAME, if all files have rows for it; else a run for each",
        )
    return next(iter(found))


def _name(objective: str) -> str:
    return f"{AUTO_TEXT} or pretrain" if objective == "auto" else objective


def prepare(settings: TrainSettings, base: CausalLM | Classifier | None = None) -> PreparedData:
    """Load, read, tokenize and check; raise the error of the first thing that is wrong.

    Args:
        settings: The settings of a run.
        base: A language model that is loaded already and that runs share, or a classifier built
            in Python.
    """
    name = resolve_objective(settings)
    if isinstance(base, Classifier) and name not in ("auto", "classify"):
        raise SettingsError(
            f"a classifier cannot be trained by {name}",
            where="objective",
            hint="--objective classify",
        )
    if isinstance(base, Classifier):
        name = "classify"
    objective = get_objective(AUTO_TEXT if name == "auto" else name)
    if not objective.supports_processes and (world().size > 1 or settings.fsdp):
        why = "each process would generate and score all completions"
        raise SettingsError(f"{name} runs in one process only", where="torchrun", why=why)
    unread = unread_folders(settings)
    settings = with_split_folders(settings.model_copy(update={"objective": name}))
    check_effects(settings)
    prepared = objective.prepare(settings, base)
    if unread:
        prepared.data_info["unread_folders"] = unread
        prepared.counts["unread_folders"] = ", ".join(unread)
    return prepared
