"""Merge methods: pure functions that combine the updates of one module, registered by name.

Another package adds a method with the decorator and an entry point of the same name:

    @register_merge_method("mean", form="entrywise", precision="float32")
    def mean(updates, settings):
        '''Return the unweighted mean of the updates.'''
        return torch.stack([update.matrix for update in updates]).mean(0)

    [project.entry-points."afina.merge_methods"]
    mean = "afina_mean:mean"
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from afina.errors import SettingsError
from afina.settings import CombineSettings, Settings, make_settings, settings_groups
from afina.settings.combine import RandomDensitySettings, WeightSearchSettings
from afina.settings.registry import Registry

Form = Literal["low_rank", "entrywise", "weight_search"]
Truncation = Literal["never", "if_rank_given", "always"]
RENAMED_MERGE_METHODS = {"dare": "dare_linear", "magnitude": "magnitude_prune"}
RANK = "rank"  # a setting of every method whose result is truncated
# settings of `afina combine` that not every method uses
METHOD_SETTINGS = {RANK, *RandomDensitySettings.model_fields, *WeightSearchSettings.model_fields}


class NoSettings(Settings):
    """Settings of a merge method without parameters."""


@dataclass
class MergeMethod:
    """A registered merge method and what `combine` must know about it.

    Attributes:
        form: "low_rank" functions take `WeightedUpdate` and return a `LowRankUpdate` (or a matrix);
            "entrywise" functions take `WeightedMatrix` and return a matrix `(out, in)`;
            "weight_search" functions take all sources and return `FoundWeights`.
        precision: The dtype in which the function computes, "float32" or "float64".
        reference: The paper, or None.
        settings_class: The typed parameters of the function.
        truncation: When the result is truncated to `rank`: never, if a rank is given, or always.
        accepts_dense: Whether a low-rank function also takes updates that are dense matrices.
        composes: Whether adapters that no single lora can represent are written as a composition.
    """

    name: str
    function: Callable[..., Any]
    form: Form
    precision: str
    reference: str | None
    settings_class: type[Settings]
    truncation: Truncation
    accepts_dense: bool
    composes: bool

    def __post_init__(self) -> None:
        functools.update_wrapper(self, self.function)  # type: ignore[arg-type]

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.function.__doc__ or "").strip().partition("\n")[0]

    @property
    def parameters(self) -> list[str]:
        """Names of the settings that the method uses, `rank` included."""
        rank = [] if self.truncation == "never" else [RANK]
        return [*rank, *(name for name in self.settings_class.model_fields if name != RANK)]

    def settings(self, settings: CombineSettings) -> Settings:
        """Return the method's own settings out of those of `afina combine`.

        Raises:
            SettingsError: A setting is given that belongs to other methods and not to this one.
        """
        given = {name for name in settings.model_fields_set if getattr(settings, name) is not None}
        for name in sorted(given & METHOD_SETTINGS - set(self.parameters)):
            raise SettingsError(
                f"{name} is not a setting of merge method {self.name!r}",
                where=name,
                why=f"its settings are {', '.join(self.parameters) or 'none'}",
                hint=f"{name}: {CombineSettings.model_fields[name].description}",
            )
        shared = set(self.settings_class.model_fields) & set(CombineSettings.model_fields)
        values = {name: getattr(settings, name) for name in shared}
        if self.name in settings_groups:
            return settings.group(self.name)
        return make_settings(self.settings_class, values)


MERGE_METHODS: Registry[MergeMethod] = Registry(
    "merge method",
    "afina.merge_methods",
    ("afina.merging.low_rank", "afina.merging.entrywise", "afina.merging.weight_search"),
)


def register_merge_method(
    name: str,
    *,
    form: Form,
    precision: str,
    reference: str | None = None,
    settings: type[Settings] = NoSettings,
    truncation: Truncation | None = None,
    accepts_dense: bool = False,
    composes: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that registers a function as merge method `name`; see `MergeMethod`.

    `truncation` is "always" for entrywise methods and "if_rank_given" for others, where not given.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        when: Truncation = "always" if form == "entrywise" else "if_rank_given"
        method = MergeMethod(
            name,
            function,
            form,
            precision,
            reference,
            settings,
            truncation or when,
            accepts_dense,
            composes,
        )
        MERGE_METHODS.register(name)(method)
        return function

    return decorate


def get_merge_method(name: str) -> MergeMethod:
    """Return a merge method by name; raises `SettingsError` where there is none."""
    if name in RENAMED_MERGE_METHODS:
        new = RENAMED_MERGE_METHODS[name]
        raise SettingsError(
            f"merge method {name!r} was renamed",
            where="merge_method",
            hint=f"--merge-method {new}",
        )
    return MERGE_METHODS.get(name)


def merge_methods_table() -> str:
    """Return the Markdown table of merge methods, as docs/merge_methods.md has it."""
    lines = ["| method | result | settings | precision | reference |", "|---|---|---|---|---|"]
    for name, method in MERGE_METHODS.items():
        settings = ", ".join(f"`{parameter}`" for parameter in method.parameters) or "none"
        cells = [f"`{name}`", method.summary, settings, method.precision, method.reference or "–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
