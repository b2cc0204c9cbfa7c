"""Settings from YAML and plain values, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from afina.errors import SettingsError, did_you_mean
from afina.settings.common import Settings

AnySettings = TypeVar("AnySettings", bound=Settings)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings as a mapping; raises `SettingsError` on anything else."""
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
        raise SettingsError("expected one `name: value` a line", where=str(path))
    return content


def make_settings(
    kind: type[AnySettings], values: Mapping[str, Any], where: str | None = None
) -> AnySettings:
    """Settings of a verb from plain values; raises `SettingsError` naming what is wrong and the nearest name."""
    for name in values:
        if name not in kind.model_fields:
            raise SettingsError(
                f"unknown setting {name!r}", where=where, hint=did_you_mean(name, kind.model_fields)
            )
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        if first["type"] == "missing":
            raise SettingsError(
                f"{name} is missing", where=where, hint=kind.model_fields[name].description
            ) from None
        raise SettingsError(
            f"{name} cannot be {first['input']!r}",
            where=where,
            why=first["msg"].removeprefix("Value error, "),
            hint=f"{name}: {kind.model_fields[name].description}"
            if name in kind.model_fields
            else None,
        ) from None


def resolved(settings: Settings) -> dict[str, Any]:
    """Settings as plain values, ready for YAML or JSON."""
    return settings.model_dump(mode="json")
