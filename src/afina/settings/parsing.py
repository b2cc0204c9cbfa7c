"""Settings from YAML and plain values, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from afina.errors import SettingsError
from afina.settings.common import Settings
from afina.settings.groups import GroupedSettings, from_validation_error, unknown_setting
from afina.settings.renamed import renamed_setting

AnySettings = TypeVar("AnySettings", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file of settings as a mapping; raise `SettingsError` on anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"cannot read the settings file: {error.strerror}", where=str(path)
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SettingsError(
            "not valid YAML", where=where, why=getattr(error, "problem", None)
        ) from error
    if not isinstance(content, dict):
        raise SettingsError("expected one `name: value` per line", where=str(path))
    return content


def make_settings(
    kind: type[AnySettings], values: Mapping[str, Any], where: str | None = None
) -> AnySettings:
    """Return the settings of a command from plain values; `where` is the file that they are from.

    Raises:
        SettingsError: A name is unknown (the hint is the nearest one), renamed, or misplaced, a
            value does not fit, or a required one is missing.
    """
    try:
        for name in values:
            if renamed := renamed_setting(kind, name):
                raise renamed
            if name not in kind.model_fields and not issubclass(kind, GroupedSettings):
                raise unknown_setting(kind, name)
        return kind(**values)
    except ValidationError as error:
        raise from_validation_error(error, kind).at(where) from None
    except SettingsError as error:
        raise error.at(where) from None


def as_settings(
    kind: type[AnySettings], given: Any, name: str, values: Mapping[str, Any]
) -> AnySettings:
    """Return `given` if it is the settings of a command, else settings in which it is `name`."""
    return given if isinstance(given, kind) else make_settings(kind, {name: given, **values})


def resolved(settings: Settings) -> dict[str, Any]:
    """Return settings as plain values, ready for YAML or JSON, with the groups that are in use."""
    values = settings.model_dump(mode="json")
    if isinstance(settings, GroupedSettings):
        groups = settings.active_groups().items()
        values |= {name: group.model_dump(mode="json") for name, group in groups}
    return values
