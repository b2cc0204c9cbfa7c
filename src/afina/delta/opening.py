"""A base and the adapter on it, as the verbs name them: from a run folder, an adapter folder, or a base alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afina.base.classifier import Classifier, load_classifier, load_masked
from afina.base.frozen import Frozen
from afina.base.load import load_base
from afina.base.model import Base
from afina.config import EMBEDDED, BaseSettings
from afina.delta.attach import Adapter
from afina.delta.files import adapter_folder, load_adapter, read_json, read_run, read_story
from afina.errors import AdapterError
from afina.route.invocation import Route


@dataclass
class Opened:
    """A loaded base, the adapter on it if there is one, and the story of the run (empty where there is none)."""

    base: Frozen
    adapter: Adapter | None
    run: dict[str, Any]

    @property
    def route(self) -> Route | None:
        """How the adapter acts; None for the base alone."""
        return self.adapter.route if self.adapter is not None else None

    @property
    def template(self) -> str | None:
        """The chat template that the run was trained with, where it is not the tokenizer's own."""
        return self.run.get("settings", {}).get("template")

    @property
    def language(self) -> Base:
        """The base as a language model; raises `AdapterError` where it is a classifier or an encoder."""
        if not isinstance(self.base, Base):
            raise AdapterError("this model gives labels, not text", where=self.base.name, hint="afina eval RUN")
        return self.base


def open_run(run: Path | None, settings: BaseSettings, *, adapter: bool = True, allow_other_base: bool = False) -> Opened:
    """Load what `run` was trained on, or the base that the settings name, and attach the run's adapter.

    The base is held as the run held it (in 4 bits for qlora), and is a classifier where the run trained one.
    """
    story = read_run(run) if run is not None else {}
    name, revision, storage = _origin(run, settings)
    shared = (settings.revision or revision, settings.trust_remote_code, settings.dtype, settings.device)
    objective = story.get("objective")
    base: Frozen
    if objective == "classify":
        base = load_classifier(name, story["data"]["labels"], story["data"]["format"] == "pictures", *shared)
    elif objective == "mlm":
        base = load_masked(name, *shared)
    else:
        base = load_base(name, *shared, storage)
    on = load_adapter(run, base, allow_other_base=allow_other_base) if run is not None and adapter else None
    return Opened(base, on, story)


def _origin(run: Path | None, settings: BaseSettings) -> tuple[str, str | None, Any]:
    """(base, revision, storage): as told, else as the run or adapter was made, else the embedded base."""
    if run is None:
        return settings.base or EMBEDDED, None, "plain"
    folder = adapter_folder(run)
    origin = read_story(folder).get("base", {})
    storage = origin.get("storage", "plain")
    if settings.base is not None:
        return settings.base, None, storage
    name = origin.get("name") or read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise AdapterError("this adapter does not say what it was trained on", where=str(folder), hint="--base PATH")
    return name, origin.get("revision"), storage


def is_text(base: Frozen) -> bool:
    """Whether the model reads text."""
    return not (isinstance(base, Classifier) and base.images is not None)
