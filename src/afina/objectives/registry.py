"""Objectives by name: this package's own, and those of installed packages.

[project.entry-points."afina.objectives"]
unlikelihood = "my_package.objective:UnlikelihoodObjective"
"""

from collections.abc import Callable
from typing import TypeVar

from afina.objectives.base import Objective
from afina.settings.objectives import declare_objective
from afina.settings.registry import Registry

ObjectiveClass = TypeVar("ObjectiveClass", bound=type[Objective])

OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    "afina.objectives",
    modules=(
        "afina.objectives.language_modeling",
        "afina.objectives.classification",
        "afina.objectives.embedding",
        "afina.objectives.reranking",
        "afina.objectives.tagging",
        "afina.objectives.masked_lm",
        "afina.objectives.preference",
        "afina.objectives.reward_model",
        "afina.objectives.policy_gradients",
    ),
)


def register_objective(name: str) -> Callable[[ObjectiveClass], ObjectiveClass]:
    """Return a class decorator that registers an objective under `name`.

    Example:
        >>> @register_objective("unlikelihood")
        ... class UnlikelihoodObjective(LanguageModelingObjective):
        ...     ...
    """

    def decorate(objective: ObjectiveClass) -> ObjectiveClass:
        objective.name = name
        OBJECTIVES.register(name)(objective)
        declare_objective(name)
        return objective

    return decorate


def get_objective(name: str) -> type[Objective]:
    """Return the objective registered as `name`; raise `SettingsError` on an unknown name."""
    return OBJECTIVES.get(name)
