"""Optional dependencies: an import that names the extra of afina to install where it is missing."""

import importlib
from types import ModuleType

from afina.errors import SettingsError


def import_extra(module: str, extra: str) -> ModuleType:
    """Return a module that the extra `extra` installs, or one of afina that needs it.

    Raises:
        SettingsError: A package of the extra is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or "afina").partition(".")[0]
        if missing == "afina":  # a module of afina itself: no matter of extras
            raise
        hint = f"pip install 'afina[{extra}]'"
        raise SettingsError(f"{missing} is not installed", hint=hint) from error
