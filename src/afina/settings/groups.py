"""Settings groups: what only one method, objective or merge method reads.

A group is a class under one name, that of its method or objective. On the command line it is
`--dpo.beta 0.2`, in YAML `dpo: {beta: 0.2}`, in Python `dpo={"beta": 0.2}`. Packages that register
a method of their own register its group by an entry point of the same name in `afina.settings`;
the module of that class must not import torch, because `afina --help` imports it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import ConfigDict, ValidationError, model_validator

from afina.errors import SettingsError, did_you_mean
from afina.settings.common import ModelSettings, Settings
from afina.settings.registry import Registry
from afina.settings.renamed import renamed_setting, renamed_value

METHOD_PREFIXES = ("", "qa", "q", "a")  # before a method's name; see adapters/presets.py

GroupClass = TypeVar("GroupClass", bound=type[Settings])


class MethodSettings(Settings):
    """Settings that only one adapter method reads."""


class ObjectiveSettings(Settings):
    """Settings that only one objective reads."""


class MergeMethodSettings(Settings):
    """Settings that only one merge method reads."""


settings_groups: Registry[type[Settings]] = Registry(
    "settings group", "afina.settings", ["afina.settings.methods", "afina.settings.objectives"]
)
register_group = settings_groups.register


class GroupedSettings(ModelSettings):
    """Settings of a command that reads groups; those given are extra fields of the model."""

    model_config = ConfigDict(extra="allow")
    # kind of group -> the setting that chooses among groups of this kind
    group_fields: ClassVar[Mapping[type[Settings], str]] = {}

    @classmethod
    def group_names(cls) -> list[str]:
        """Return the names of the groups that this command reads."""
        found = []
        for name in settings_groups.names():
            try:
                kind = settings_groups.get(name)
            except SettingsError:  # a broken package breaks its own group, when that is used
                continue
            if issubclass(kind, tuple(cls.group_fields)):
                found.append(name)
        return found

    def group(self, name: str) -> Any:
        """Return the settings of the method or objective `name`, with defaults where not given.

        The class is the one registered under `name`; a name without settings has an empty group.
        """
        if name in (given := self.model_extra or {}):
            return given[name]
        return build(settings_groups.get(name), {}, name) if name in settings_groups else Settings()

    def active_groups(self) -> dict[str, Settings]:
        """Return the groups of the chosen method and objective by name, with their defaults."""
        names = [_base_name(getattr(self, field)) for field in self.group_fields.values()]
        return {name: self.group(name) for name in names if name in settings_groups}

    @model_validator(mode="before")
    @classmethod
    def _build_groups(cls, values: Any) -> Any:
        """Turn the mappings of groups into their classes; raise `SettingsError` on other names."""
        if not isinstance(values, Mapping):
            return values
        built = dict(values)
        for name in built.keys() - cls.model_fields.keys():
            if name not in cls.group_names():
                if renamed := renamed_setting(cls, str(name)):
                    raise renamed
                raise unknown_setting(cls, str(name), values)
            built[name] = build(settings_groups.get(name), built[name], name)
        return built

    @model_validator(mode="after")
    def _only_active_groups(self) -> "GroupedSettings":
        """Raise `SettingsError` where a group is given that nothing will read."""
        active = self.active_groups()
        for name, group in (self.model_extra or {}).items():
            if name in active:
                continue
            field = next(f for kind, f in self.group_fields.items() if isinstance(group, kind))
            given = ", ".join(f"{name}.{key}" for key in sorted(group.model_fields_set)) or name
            raise SettingsError(
                f"{given} has no effect: {field} is {getattr(self, field)!r}",
                hint=f"--{field.replace('_', '-')} {name}, or leave {name} out",
            )
        return self


def build(kind: type[Settings], values: Any, name: str) -> Settings:
    """Return the group `name` from plain values.

    Raises:
        SettingsError: A name is unknown, a value does not fit, or a required one is missing.
    """
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        example = next(iter(kind.model_fields))
        raise SettingsError(
            f"{name} cannot be {values!r}: it is a group of settings",
            hint=f"{name}: {{{example}: ...}}, or --{name}.{example.replace('_', '-')}",
        )
    for key in values:
        if renamed := renamed_setting(kind, str(key), f"{name}."):
            raise renamed
        if key not in kind.model_fields:
            raise SettingsError(
                f"unknown setting {name}.{key}", where=name, hint=_nearest(name, str(key), kind)
            )
    try:
        return kind(**values)
    except ValidationError as error:
        raise from_validation_error(error, kind, f"{name}.") from None


def unknown_setting(
    kind: type[Settings], name: str, values: Mapping[str, Any] | None = None
) -> SettingsError:
    """Return the error of a name that is no setting, with the nearest one or the group it is in."""
    groups = kind.group_names() if issubclass(kind, GroupedSettings) else []
    owners = [group for group in groups if name in settings_groups.get(group).model_fields]
    if owners:
        chosen = {_base_name(str(value)) for value in (values or {}).values()}
        owner = next((group for group in owners if group in chosen), owners[0])
        hint = f"it is a setting of {', '.join(owners)}: --{owner}.{name.replace('_', '-')}"
    else:
        hint = did_you_mean(name, [*kind.model_fields, *groups])
    return SettingsError(f"unknown setting {name!r}", hint=hint)


def from_validation_error(
    error: ValidationError, kind: type[Settings], prefix: str = ""
) -> SettingsError:
    """Return the first problem that pydantic found as an error with the setting's help text."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    field = kind.model_fields.get(key)
    help_text = f"{prefix}{key}: {field.description}" if field else None
    if first["type"] == "missing":
        return SettingsError(f"{prefix}{key} is missing", hint=help_text)
    why = first["msg"].removeprefix("Value error, ")
    if not key:
        return SettingsError(f"{prefix.rstrip('.') or 'settings'}: {why}")
    hint = renamed_value(key, first["input"]) or help_text
    return SettingsError(f"{prefix}{key} cannot be {first['input']!r}", why=why, hint=hint)


def _base_name(choice: str) -> str:
    """Return the registered group behind a choice: "lora" for "qalora", "dpo" for "dpo"."""
    names = (choice.removeprefix(p) for p in METHOD_PREFIXES if choice.startswith(p))
    return next((name for name in names if name in settings_groups), choice)


def _nearest(group: str, key: str, kind: type[Settings]) -> str:
    """Return a hint for an unknown name of a group: a group that has it, or the nearest name."""
    owners = [
        other
        for other in settings_groups.names()
        if other != group and key in settings_groups.get(other).model_fields
    ]
    if owners:
        return f"it is a setting of {', '.join(owners)}"
    return did_you_mean(key, kind.model_fields)
