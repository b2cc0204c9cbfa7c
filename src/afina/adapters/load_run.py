"""Load a base and its adapters as commands name them: a run, an adapter folder, or a base only."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afina.adapters.active import BASE_ONLY, ActiveAdapters
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
from afina.models.classifier import Classifier, load_classifier, load_masked, load_tagger
from afina.models.encoder import EMBEDDING_KEY, EmbeddingConfig, load_encoder
from afina.models.frozen import FrozenModel
from afina.models.loading import load_base
from afina.settings import EMBEDDED, ModelSettings


@dataclass
class LoadedRun:
    """A loaded base with adapters.

    Attributes:
        base: The base.
        adapters: The attached adapters with their weights.
        run: The record of the run, run.json; empty where there is none.
        frozen_adapter: Adapters over which the run's was trained, active with it; empty if none.
        chat_format: The chat format of training.
    """

    base: FrozenModel
    adapters: list[tuple[Adapter, float]]
    run: dict[str, Any]
    frozen_adapter: ActiveAdapters = BASE_ONLY
    chat_format: ChatFormat = field(default_factory=ChatFormat)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, or None.

        Raises:
            AdapterError: there are several, one is weighted, or one was trained over another.
        """
        if self.frozen_adapter:
            frozen = f"{self.run['settings']['frozen_adapter']}:1"
            why = "its run trained it over another"
            hint = f"merge both into one: afina combine {frozen} RUN/adapter:1"
            what = "one adapter is needed, and this one is active with another"
            raise AdapterError(what, where=self.base.name, why=why, hint=hint)
        if len(self.adapters) > 1 or any(weight != 1.0 for _, weight in self.adapters):
            hint = "merge them into one: afina combine ... --merge-method svd"
            raise AdapterError(
                "one adapter with weight 1 is needed, and these are several, or weighted",
                where=self.base.name,
                hint=hint,
            )
        return self.adapters[0][0] if self.adapters else None

    @property
    def active(self) -> ActiveAdapters:
        """Adapters that are active together; empty for the base alone."""
        active = [adapter.active.scaled(weight) for adapter, weight in self.adapters]
        return ActiveAdapters.combine([*active, self.frozen_adapter] if active else [])

    @property
    def causal_lm(self) -> CausalLM:
        """The base as a language model.

        Raises:
            AdapterError: it is a classifier or an encoder, or the adapter is a reward model.
        """
        if not isinstance(self.base, CausalLM):
            raise AdapterError(
                "this model predicts labels and cannot generate text",
                where=self.base.name,
                hint="afina eval RUN",
            )
        if any(SCORE in adapter.config.modules_to_save for adapter, _ in self.adapters):
            what = "this adapter is a reward model and cannot generate text"
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
    """Load the base of `run`, or the one in the settings, and attach the run's adapter.

    An adapter over which the run was trained is attached too; RUN/adapter is the run's own only.

    Args:
        run: A run or adapter folder, a composition, or several with weights ("A:0.6,B:0.4"), which
            are active together on one base. The base is quantized as in the (first) run, and a
            classifier where the run trained one.
        settings: Base, revision, dtype and device.
        adapter: False loads the base only.
        allow_other_base: Accept an adapter that records another base.
        model: A classifier built in Python, which no file describes.

    Raises:
        AdapterError: an adapter does not fit, or cannot be combined with the others.
        BaseError: the base cannot be loaded.
    """
    weighted = parse_weighted_list(run) if run is not None else []
    record = read_run_record(weighted[0][0]) if weighted else {}
    parts = [part for folder, weight in weighted for part in expand_composition(folder, weight)]
    base = model or _load(record, common_base(parts) if parts else {}, parts, settings)
    loaded: list[tuple[Adapter, float]] = []
    for number, part in enumerate(parts if adapter else []):
        name = "adapter" if len(parts) == 1 else f"adapter{number + 1}"
        loaded.append((load_adapter(part.folder, base, name, allow_other_base), part.weight))
    _check_together(loaded, parts)
    frozen = _frozen_adapter(record, base) if loaded and len(weighted) == 1 else BASE_ONLY
    chat_format = _chat_format(record, parts)
    arguments = getattr(settings, "template_kwargs", {})
    return LoadedRun(base, loaded, record, frozen, chat_format.with_arguments(arguments))


def _chat_format(record: dict[str, Any], parts: list[WeightedAdapter]) -> ChatFormat:
    """Return the chat format of the adapters' training, else that of the run.

    Raises:
        AdapterError: the adapters were trained with different formats.
    """
    recorded = [(part.folder, recorded_format(part.folder)) for part in parts]
    known = [(folder, found) for folder, found in recorded if found is not None]
    for folder, found in known:
        if found.rendering != known[0][1].rendering:
            raise AdapterError(
                "its chat template differs from that of the other adapters",
                where=str(folder),
                why="one prompt cannot have two formats",
                hint="adapters that were trained with the same --chat-template",
            )
    return known[0][1] if known else ChatFormat.from_record(record)


def recorded_format(folder: Path) -> ChatFormat | None:
    """Return the chat format of an adapter's training; None where afina.json does not record it."""
    metadata = read_metadata(folder)
    if CHAT_KEY not in metadata:
        return None
    return ChatFormat.from_record(metadata, str(folder / METADATA_FILE))


def _frozen_adapter(record: dict[str, Any], base: FrozenModel) -> ActiveAdapters:
    """Attach the adapter over which the run was trained, and return it; empty without one."""
    if record.get("frozen_adapter") is None:
        return BASE_ONLY
    folder = adapter_folder(Path(str(record["settings"]["frozen_adapter"])))
    if (digest := read_metadata(folder).get("hash")) != record["frozen_adapter"]:
        why = f"its hash was {record['frozen_adapter'][:12]}, and is {str(digest)[:12]}"
        raise AdapterError(
            "the adapter over which the run was trained has changed", where=str(folder), why=why
        )
    return load_adapter(folder, base, "over").active


def _check_together(loaded: list[tuple[Adapter, float]], parts: list[WeightedAdapter]) -> None:
    """Raise `AdapterError` where an adapter that replaces modules is not alone with weight 1."""
    alone = len(loaded) == 1 and loaded[0][1] == 1.0
    for (adapter, _), part in zip(loaded, parts, strict=False):
        if not alone and any(delta.replaces_base for delta in adapter.layers.values()):
            why = "its modules replace the base's, and cannot be weighted or combined with others"
            raise AdapterError(
                "this adapter can only be active alone, with weight 1",
                where=str(part.folder),
                why=why,
                hint="convert it to a lora: afina extract",
            )


def _load(
    record: dict[str, Any],
    origin: dict[str, Any],
    parts: list[WeightedAdapter],
    settings: ModelSettings,
) -> FrozenModel:
    """Load the base of the settings, else that of the run or adapter, else the embedded one."""
    name = settings.base or origin.get("name") or (None if parts else EMBEDDED)
    if name is None:
        where = str(parts[0].folder)
        raise AdapterError("this adapter records no base", where=where, hint="--base PATH")
    revision = settings.revision or (None if settings.base else origin.get("revision"))
    shared = (revision, settings.trust_remote_code, settings.dtype, settings.device)
    objective = record.get("objective")
    if objective in ("classify", "rerank"):
        about = record["data"]
        is_images, task = about["format"] == "pictures", about.get("task", "classes")
        return load_classifier(name, about["labels"], is_images, *shared, task=task)
    if objective == "tag":
        return load_tagger(name, record["data"]["labels"], *shared)
    embedding = read_metadata(parts[0].folder).get(EMBEDDING_KEY) if parts else None
    if embedding is not None:
        where = f"{parts[0].folder / METADATA_FILE}: {EMBEDDING_KEY}"
        return load_encoder(name, EmbeddingConfig.from_record(embedding, where), *shared)
    if objective == "mlm":
        return load_masked(name, *shared)
    return load_base(name, *shared, "nf4" if origin.get("storage") == "nf4" else "none")
