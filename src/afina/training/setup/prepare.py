"""From settings to a base and an objective with its rows. Nothing is attached yet."""

from afina.data.table import detect_schema
from afina.errors import SettingsError
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.objectives.prepared import PreparedData
from afina.objectives.registry import get_objective
from afina.settings import TrainSettings
from afina.training.setup.no_effect import check_effects
from afina.training.setup.processes import world

AUTO_TEXT = "sft"  # "auto" on rows of text: sft, or pretrain where no row has an answer


def resolve_objective(settings: TrainSettings) -> str:
    """Return the objective of the settings, or the one that the data file's fields imply."""
    if settings.objective != "auto" or settings.data is None:  # a plan without data is for texts
        return settings.objective
    detected = detect_schema(settings.data, settings.columns)
    return "auto" if detected is None else detected.schema.objective(detected.format)


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
    settings = settings.model_copy(update={"objective": name})
    check_effects(settings)
    return objective.prepare(settings, base)
