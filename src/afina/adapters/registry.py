"""The adapter methods by name: those of this package, and those of installed packages.

A method is one class, registered under its name:

    @register_method("vera")
    class VeRA(AdapterLayer): ...

Another package registers its class by an entry point of the group `afina.methods`, and ships the
formats of its files (see `afina.io.adapter_formats`) by one of the group `afina.formats`.
"""

from afina.adapters.base import AdapterLayer
from afina.errors import SettingsError, did_you_mean
from afina.settings.registry import Registry

METHOD_MODULES = ("lora", "dora", "mora", "full")

methods: Registry[type[AdapterLayer]] = Registry(
    "method", "afina.methods", [f"afina.adapters.{name}" for name in METHOD_MODULES]
)
register_method = methods.register


def registered_methods() -> dict[str, type[AdapterLayer]]:
    """Return the class of every registered method by name, sorted by name."""
    return dict(methods.items())


def get_method(name: str) -> type[AdapterLayer]:
    """Return the class of the method `name`.

    Raises:
        SettingsError: no method has this name; the hint is the nearest one.
    """
    if name not in methods:
        hint = did_you_mean(name, [*methods.names(), "freeze"])
        raise SettingsError(f"unknown method {name!r}", where="method", hint=hint)
    return methods.get(name)
