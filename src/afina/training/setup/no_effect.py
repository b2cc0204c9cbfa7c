"""Settings of `train` that others make useless: an error instead of a run that ignores them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from afina.adapters.presets import get_preset
from afina.adapters.registry import get_method
from afina.errors import SettingsError
from afina.objectives.base import Objective
from afina.objectives.registry import get_objective
from afina.settings import TrainSettings
from afina.settings.common import EMBEDDED


class NoEffect(NamedTuple):
    """When a setting changes nothing, and what to type instead."""

    when: Callable[[TrainSettings], bool]
    why: str
    hint: str


def _replaces_base(settings: TrainSettings) -> bool:
    return get_method(get_preset(settings.method, 1).method).replaces_base


def _is_not_activated(settings: TrainSettings) -> bool:
    return not get_preset(settings.method, 1).is_activated


def _has_no_chats(settings: TrainSettings) -> bool:
    return not _objective(settings).renders_chats


def _objective(settings: TrainSettings) -> type[Objective]:
    # auto is left where the rows are texts
    return get_objective("sft" if settings.objective == "auto" else settings.objective)


def _is_local(settings: TrainSettings) -> bool:
    return settings.base == EMBEDDED or Path(settings.base).expanduser().is_dir()


_NO_RANK = NoEffect(_replaces_base, "this method trains the weights themselves", "--method lora")
_NO_CHAT = NoEffect(_has_no_chats, "the rows of this objective are no chats", "leave it out")
NO_EFFECT: dict[str, NoEffect] = {
    "alpha": _NO_RANK,
    "scaling": _NO_RANK,
    "rank_pattern": _NO_RANK,
    "chat_template": _NO_CHAT,
    "template_kwargs": _NO_CHAT,
    "allow_control_tokens": _NO_CHAT,
    "new_tokens": NoEffect(_has_no_chats, "only language models have new tokens", "leave it out"),
    "invocation": NoEffect(
        _is_not_activated, "only an activated method has an invocation", "--method alora"
    ),
    "parameter_budget": NoEffect(
        lambda settings: settings.target_modules != "auto",
        "only target_modules auto distributes a budget",
        "--target-modules auto",
    ),
    "eval_size": NoEffect(
        lambda settings: settings.eval_data is not None,
        "the eval rows are those of eval_data",
        "leave one of the two out",
    ),
    "truncate": NoEffect(
        lambda settings: _objective(settings).chunks_texts,
        "texts of any length are trained in chunks of max_length tokens",
        "leave it out",
    ),
    "revision": NoEffect(_is_local, "the base is a folder, which has one revision", "leave it out"),
}


def check_effects(settings: TrainSettings) -> None:
    """Raise `SettingsError` for a setting that is given and that nothing reads.

    Args:
        settings: Settings of a run, with the objective that its rows imply.
    """
    for name, rule in NO_EFFECT.items():
        field = TrainSettings.model_fields.get(name)
        if field is None or name not in settings.model_fields_set:
            continue
        value = getattr(settings, name)
        if value != field.get_default(call_default_factory=True) and rule.when(settings):
            what = f"{name} {value} has no effect here"
            raise SettingsError(what, where=name, why=rule.why, hint=rule.hint)
