"""Keys of another trainer on their way to settings: what became of each of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from afina.errors import SettingsError
from afina.importing.tool_table import ToolTable

NUMBERS = (  # common names whose values are numbers
    "alpha",
    "batch_size",
    "beta",
    "clip_range",
    "desirable_weight",
    "dropout",
    "early_stopping_patience",
    "eval_size",
    "eval_steps",
    "freeze_trainable_layers",
    "gradient_accumulation_steps",
    "iters",
    "label_smoothing",
    "learning_rate",
    "max_grad_norm",
    "max_length",
    "max_new_tokens",
    "max_samples",
    "max_steps",
    "num_generations",
    "num_iterations",
    "num_layers",
    "num_train_epochs",
    "quantization_bit",
    "rank",
    "relora_steps",
    "seed",
    "sft_weight",
    "simpo_gamma",
    "temperature",
    "undesirable_weight",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)
MAPPINGS = ("lora_parameters", "lr_schedule", "optimizer_config")
Outcome = Literal["setting", "default", "comment", "missing"]
NO_EFFECT, NO_TWIN = "no effect with this value", "no setting does this"


@dataclass(frozen=True)
class ImportedKey:
    """What became of a key.

    Attributes:
        key: The key.
        value: Its value.
        outcome: setting: it became settings; default: the same, of a value that the tool uses
            where the key is left out; comment: it has no twin, and what is learned stays the
            same; missing: it has none, and what is learned would be another.
        settings: Names of the settings.
        note: How they differ, or why there is none.
    """

    key: str
    value: Any
    outcome: Outcome
    settings: tuple[str, ...] = ()
    note: str | None = None


def _is_number(value: Any) -> bool:
    """Return whether a value is a number, or a text of one."""
    try:
        return not isinstance(value, bool) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


class Conversion:
    """The keys of a configuration, by common names, and the settings that they became.

    Args:
        table: The keys of the tool.
        keys: Those of the configuration.
        trainer: Kind of trainer, for its defaults.
        leave_out: Keys that change what is learned and are left out all the same.
        unread: Keys whose values are not constants, with their source.
    """

    def __init__(
        self,
        table: ToolTable,
        keys: Mapping[str, Any],
        trainer: str = "sft",
        leave_out: Iterable[str] = (),
        unread: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.table, self.keys, self.leave_out = table, dict(keys), set(leave_out)
        self.settings: dict[str, Any] = {}
        self.findings: dict[str, ImportedKey] = {}
        self._given: dict[str, str] = {}  # common name -> key
        for key, value in keys.items():
            self._sort(key, value)
        self._check_types()
        for key, source in unread.items():
            if key in table.comments:
                self._note(key, source, "comment", note=table.comments[key])
            else:
                self._note(key, source, "missing", note="its value is no constant")
        open_names = {table.names.get(key) for key in unread.keys() - self.leave_out}
        for key, value in {**table.defaults, **table.defaults_of.get(trainer, {})}.items():
            if table.names[key] not in {*self._given, *open_names}:
                self._given[table.names[key]] = key
                self.keys[key] = value
        self._defaults = self.keys.keys() - keys.keys()

    def _check_types(self) -> None:
        """Raise `SettingsError` where a value is of another type than its key needs."""
        for name, key in self._given.items():
            value = self.keys[key]
            if value is None:
                continue
            if name in MAPPINGS and not isinstance(value, Mapping):
                raise SettingsError(f"{key} cannot be {value!r}", why="a mapping is expected")
            if name in NUMBERS and not _is_number(value):
                raise SettingsError(f"{key} cannot be {value!r}", why="a number is expected")

    def _sort(self, key: str, value: Any) -> None:
        """Note a key of no use at once; the others wait under their common names."""
        name = self.table.names.get(key)
        if name is not None and key not in self.leave_out:
            if (other := self._given.get(name)) is not None:
                same = self.keys[other] == value
                self._note(other, self.keys[other], "comment" if same else "missing", note=key)
            self._given[name] = key
        elif key in self.table.comments:
            self._note(key, value, "comment", note=self.table.comments[key])
        elif self.table.has_no_effect(key, value):
            self._note(key, value, "comment", note=NO_EFFECT)
        else:
            self._note(key, value, "missing", note=NO_TWIN)

    def _note(
        self,
        key: str,
        value: Any,
        outcome: Outcome,
        settings: tuple[str, ...] = (),
        note: str | None = None,
    ) -> None:
        if key in self.leave_out:
            outcome, note = "comment", "left out"
        self.findings[key] = ImportedKey(key, value, outcome, settings, note)

    def has(self, name: str) -> bool:
        """Return whether a common name is given by the file, not by a default."""
        return name in self._given and self._given[name] not in self._defaults

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a common name; None counts as not given."""
        value = self.keys.get(self._given.get(name, ""))
        return default if value is None else value

    def use(
        self,
        name: str,
        settings: Mapping[str, Any],
        note: str | None = None,
        shown: tuple[str, ...] | None = None,
    ) -> None:
        """Take settings from a common name; `shown` are their names where they are of a group."""
        self.settings |= settings
        self._found(name, shown or tuple(settings), note)

    def _found(self, name: str, settings: tuple[str, ...], note: str | None) -> None:
        if (key := self._given.get(name)) is not None:
            outcome: Outcome = "default" if key in self._defaults else "setting"
            self._note(key, self.keys[key], outcome, settings, note)

    def comment(self, name: str, note: str = NO_EFFECT) -> None:
        """Note that a common name changes nothing."""
        if self.has(name):
            self._note(self._given[name], self.get(name), "comment", note=note)
        elif name in self._given:
            self._note(self._given[name], self.get(name), "default", note=note)

    def missing(self, name: str, note: str = NO_TWIN) -> None:
        """Note that no setting does what a common name does."""
        if name in self._given:
            self._note(self._given[name], self.get(name), "missing", note=note)

    def part_missing(self, key: str, value: Any, note: str = NO_TWIN) -> None:
        """Note a key inside another, such as datasets.type, that no setting does."""
        self._note(key, value, "missing", note=note)

    def part_comment(self, key: str, value: Any, note: str = NO_EFFECT) -> None:
        """Note a key inside another that changes nothing."""
        self._note(key, value, "comment", note=note)

    def finish(self) -> list[ImportedKey]:
        """Return what became of each key; one that no rule has used is empty, or missing."""
        for name, key in self._given.items():
            if key in self.findings or key in self._defaults:
                continue
            if self.table.has_no_effect(key, self.get(name)):
                self.comment(name)
            else:
                self.missing(name)
        return list(self.findings.values())
