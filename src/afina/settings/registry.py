"""Registries: names of one kind (methods, objectives, merge methods, ...) and what each stands for.

A name comes from this package, by the decorator `register`, or from another installed package, by
an entry point whose name is the registered name:

    [project.entry-points."afina.methods"]
    vera = "afina_vera.method:VeRA"

Nothing is imported before a name is looked up. Only installed packages are searched: no code is
loaded from the folder of an adapter.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Generic, TypeVar

from afina.errors import AfinaError, SettingsError, did_you_mean

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Names of one kind and what each stands for.

    Args:
        kind: What an entry is called in messages, in the singular: "method".
        group: The entry-point group in which other packages register: "afina.methods".
        modules: Modules of this package that register their names when they are imported.
        error: The error of an unknown name.
    """

    def __init__(
        self,
        kind: str,
        group: str,
        modules: Sequence[str] = (),
        error: type[AfinaError] = SettingsError,
    ) -> None:
        self.kind, self.group, self.error = kind, group, error
        self._modules = tuple(modules)
        self._entries: dict[str, Entry] = {}
        self._plugins: dict[str, EntryPoint] | None = None

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that registers a class or function under `name`.

        Raises:
            SettingsError: `name` is registered already, for another object.
        """

        def decorate(entry: Entry) -> Entry:
            known = self._entries.get(name, entry)
            if known is not entry and _origin(known) != _origin(entry):
                raise self._registered_twice(name, _origin(known), _origin(entry))
            self._entries[name] = entry
            return entry

        return decorate

    def get(self, name: str) -> Entry:
        """Return what `name` stands for.

        Raises:
            AfinaError: The name is unknown (of the class `error`), registered twice, or belongs
                to a package that cannot be imported (`SettingsError`).
        """
        self._load()
        if name in self._entries:
            return self._entries[name]
        plugin = (self._plugins or {}).get(name)
        if plugin is None:
            what = f"unknown {self.kind} {name!r}"
            raise self.error(what, hint=did_you_mean(name, self.names()))
        return self._load_plugin(plugin)

    def names(self) -> list[str]:
        """Return every registered name, sorted; the code of other packages is not imported."""
        self._load()
        return sorted({*self._entries, *(self._plugins or {})})

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def items(self) -> Iterator[tuple[str, Entry]]:
        """Yield every name with what it stands for; imports the code of other packages."""
        for name in self.names():
            yield name, self.get(name)

    def _load(self) -> None:
        """Import this package's modules and find the entry points, once."""
        modules, self._modules = self._modules, ()
        for module in modules:
            importlib.import_module(module)
        if self._plugins is not None:
            return
        plugins: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            other = plugins.get(point.name)
            if other is not None and other.value != point.value:
                raise self._registered_twice(point.name, other.value, point.value)
            if point.name in self._entries:
                known = _origin(self._entries[point.name])
                raise self._registered_twice(point.name, known, point.value)
            plugins[point.name] = point
        self._plugins = plugins

    def _load_plugin(self, point: EntryPoint) -> Entry:
        try:
            entry = point.load()
        except Exception as error:  # any error of code that is not ours
            raise SettingsError(
                f"{self.kind} {point.name!r} cannot be loaded",
                where=f"entry point {point.name} = {point.value} of {self.group}",
                why=f"{type(error).__name__}: {error}",
                hint="repair or uninstall that package",
            ) from error
        if point.name not in self._entries:
            if isinstance(entry, ModuleType):
                raise SettingsError(
                    f"{point.value} does not register the {self.kind} {point.name!r}",
                    where=f"entry point {point.name} of {self.group}",
                )
            self._entries[point.name] = entry
        return self._entries[point.name]

    def _registered_twice(self, name: str, first: str, second: str) -> SettingsError:
        return SettingsError(
            f"{self.kind} {name!r} is registered twice",
            why=f"by {first} and by {second}",
            hint="rename one, or uninstall one of the two packages",
        )


def _origin(entry: object) -> str:
    """Return the module and name that define an entry; a module that is reloaded keeps them."""
    module = getattr(entry, "__module__", type(entry).__module__)
    return f"{module}:{getattr(entry, '__qualname__', type(entry).__qualname__)}"
