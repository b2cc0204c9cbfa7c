"""A base and the adapter on it, as the verbs name them: from a run folder, an adapter folder, or a base alone."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter
from afina.adapters.loading import load_adapter
from afina.errors import AdapterError
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import METADATA_FILE, read_metadata
from afina.io.chat_format import CHAT_KEY, ChatFormat
from afina.io.composition import (
    WeightedAdapter,
    common_base,
    expand_composition,
    parse_weighted_list,
)
from afina.io.run_record import read_run_record
from afina.models.causal_lm import SCORE, CausalLM
from afina.models.classifier import Classifier, load_classifier, load_masked
from afina.models.frozen import FrozenModel
from afina.models.loading import load_base
from afina.settings import EMBEDDED, ModelSettings


@dataclass
class LoadedRun:
    """A loaded base, the adapters on it with their weights, and the story of the run (empty where there is none)."""

    base: FrozenModel
    adapters: list[tuple[Adapter, float]]
    run: dict[str, Any]
    frozen_adapter: ActiveAdapters | None = (
        None  # the adapter over which that of the run was trained, which acts along with it
    )
    chat_format: ChatFormat = field(default_factory=ChatFormat)  # as in training

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, if there is one; raises `AdapterError` where there are several, or one that acts in part."""
        if self.frozen_adapter is not None:
            told = f"{self.run['settings']['frozen_adapter']}:1"
            why, hint = (
                "its run trained it over another",
                f"make one of both: afina combine {told} RUN/adapter:1",
            )
            what = "this takes one adapter, and this one acts with another"
            raise AdapterError(what, where=self.base.name, why=why, hint=hint)
        if len(self.adapters) > 1 or any(weight != 1.0 for _, weight in self.adapters):
            hint = "make one adapter of them: afina combine ... --merge-method svd"
            raise AdapterError(
                "this takes one adapter, and these are several, or weighted",
                where=self.base.name,
                hint=hint,
            )
        return self.adapters[0][0] if self.adapters else None

    @property
    def active(self) -> ActiveAdapters:
        """Adapters that are active together; empty for the base alone."""
        routes = [adapter.active.scaled(weight) for adapter, weight in self.adapters]
        routes += [self.frozen_adapter] if self.frozen_adapter is not None and routes else []
        return ActiveAdapters.combine(routes)

    @property
    def causal_lm(self) -> CausalLM:
        """The base as a language model; raises `AdapterError` where it is a classifier or an encoder."""
        if not isinstance(self.base, CausalLM):
            raise AdapterError(
                "this model gives labels, not text", where=self.base.name, hint="afina eval RUN"
            )
        if any(SCORE in adapter.config.modules_to_save for adapter, _ in self.adapters):
            what = "this adapter is a reward model: it gives numbers, not text"
            raise AdapterError(what, where=self.base.name, hint="afina eval RUN")
        return self.base


def load_run(
    run: Path | None,
    settings: ModelSettings,
    *,
    adapter: bool = True,
    allow_other_base: bool = False,
    model: Classifier | None = None,
) -> LoadedRun:
    """Load what `run` was trained on, or the base that the settings name, and attach the run's adapter.

    A run that was trained over another adapter brings that along; RUN/adapter is its own adapter alone.
    `run` may be a composition, or several runs with weights ("A:0.6,B:0.4"): they act together, on one base. The base is
    held as the (first) run held it (in 4 bits for qlora), and is a classifier where the run trained one; `model` is one
    made in Python, which no file could bring.
    """
    named = parse_weighted_list(run) if run is not None else []
    story = read_run_record(named[0][0]) if named else {}
    parts = [part for folder, weight in named for part in expand_composition(folder, weight)]
    base = model or _load(story, common_base(parts) if parts else {}, parts, settings)
    on: list[tuple[Adapter, float]] = []
    for number, part in enumerate(parts if adapter else []):
        name = "adapter" if len(parts) == 1 else f"adapter{number + 1}"
        on.append((load_adapter(part.folder, base, name, allow_other_base), part.weight))
    _check_together(on, parts)
    over = _over(story, base) if on and len(named) == 1 else None
    asked = _chat_format(story, parts).with_arguments(getattr(settings, "template_kwargs", {}))
    return LoadedRun(base, on, story, over, asked)


def _chat_format(story: dict[str, Any], parts: list[WeightedAdapter]) -> ChatFormat:
    """Return how the run, or else its adapters, were asked in training.

    Raises:
        AdapterError: The adapters were asked in different ways.
    """
    recorded = [(part.folder, recorded_format(part.folder)) for part in parts]
    known = [(folder, found) for folder, found in recorded if found is not None]
    for folder, found in known:
        if found.rendering != known[0][1].rendering:
            raise AdapterError(
                "its chat template is not that of the other adapters",
                where=str(folder),
                why="one prompt cannot be written in two formats",
                hint="adapters that were trained with the same --chat-template",
            )
    return known[0][1] if known else ChatFormat.from_record(story)


def recorded_format(folder: Path) -> ChatFormat | None:
    """Return how an adapter was asked in training; None where its afina.json does not say."""
    metadata = read_metadata(folder)
    if CHAT_KEY not in metadata:
        return None
    return ChatFormat.from_record(metadata, str(folder / METADATA_FILE))


def _over(story: dict[str, Any], base: FrozenModel) -> ActiveAdapters | None:
    """The adapter over which the run was trained, attached; alone the run's would answer as nobody trained it."""
    if story.get("frozen_adapter") is None:
        return None
    folder = adapter_folder(Path(str(story["settings"]["frozen_adapter"])))
    if (digest := read_metadata(folder).get("hash")) != story["frozen_adapter"]:
        why = f"its hash was {story['frozen_adapter'][:12]}, and is {str(digest)[:12]}"
        raise AdapterError(
            "the adapter over which the run was trained has changed", where=str(folder), why=why
        )
    return load_adapter(folder, base, "over").active


def _check_together(on: list[tuple[Adapter, float]], parts: list[WeightedAdapter]) -> None:
    """Raise `AdapterError` where an adapter that replaces its layers is not alone and whole."""
    alone = len(on) == 1 and on[0][1] == 1.0
    for (adapter, _), part in zip(on, parts, strict=False):
        if not alone and any(delta.replaces_base for delta in adapter.layers.values()):
            why = "a trained layer takes the base's place, and cannot act in part or beside others"
            hint = "afina extract makes a lora of it"
            raise AdapterError(
                "this adapter acts alone", where=str(part.folder), why=why, hint=hint
            )


def _load(
    story: dict[str, Any],
    origin: dict[str, Any],
    parts: list[WeightedAdapter],
    settings: ModelSettings,
) -> FrozenModel:
    """The base: as told in the settings, else as the run or adapter was made, else the embedded one."""
    name = settings.base or origin.get("name") or (None if parts else EMBEDDED)
    if name is None:
        where = str(parts[0].folder)
        raise AdapterError(
            "this adapter does not say what it was trained on", where=where, hint="--base PATH"
        )
    revision = settings.revision or (None if settings.base else origin.get("revision"))
    shared = (revision, settings.trust_remote_code, settings.dtype, settings.device)
    objective = story.get("objective")
    if objective == "classify":
        return load_classifier(
            name, story["data"]["labels"], story["data"]["format"] == "pictures", *shared
        )
    if objective == "mlm":
        return load_masked(name, *shared)
    return load_base(name, *shared, "nf4" if origin.get("storage") == "nf4" else "none")
