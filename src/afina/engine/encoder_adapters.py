"""Adapters of a served encoder: registered, and attached to the model while there is memory.

Each is attached under its hash. A classifier's head has as many outputs as it has classes, so that
heads of several adapters, and rows of all of them, are in one batch.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from afina.adapters.attach import Adapter, attach, detach
from afina.adapters.loading import load_state
from afina.adapters.lora import LoRA
from afina.adapters.modules import ModuleWithAdapters
from afina.adapters.registry import get_method
from afina.adapters.serving_layers import LoRAView
from afina.engine.adapter_registry import AdapterRecord, AdapterRegistry
from afina.engine.loaded_adapter import AdapterLayoutCache, get_or_insert_wrapper
from afina.engine.memory import read_verified
from afina.errors import AdapterError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import PREFIX, AdapterFolder
from afina.io.adapter_metadata import METADATA_FILE, read_metadata
from afina.models.classifier import Classifier
from afina.models.encoder import EMBEDDING_KEY, EmbeddingConfig, Encoder
from afina.models.encoder_views import EncoderViews


def replaces_modules(config: AdapterConfig) -> bool:
    """Return whether an adapter has modules of its own, and is active alone, with weight 1."""
    return bool(config.modules_to_save) or get_method(config.method).replaces_base


@dataclass(frozen=True, slots=True)
class EncoderRecord(AdapterRecord):
    """An adapter of an encoder on disk.

    Attributes:
        view: what it is attached to, and computes its rows.
        num_outputs: length of a row's result.
    """

    view: Classifier
    num_outputs: int = 0


class EncoderLayouts(AdapterLayoutCache):
    """Layouts of an encoder's adapters, which may have modules of their own."""

    def _check_servable(self, spec: AdapterConfig, where: str) -> None:
        if spec.invocation:
            why = "an activated adapter needs a text with an answer"
            raise AdapterError("this adapter cannot be served", where=where, why=why)
        if spec.trainable_tokens:
            why = "an encoder's vocabulary is fixed"
            raise AdapterError("tokens of its own", where=where, why=why)

    def _check_shapes(self, spec: AdapterConfig, entries: Any, where: str) -> None:
        """Check nothing: an adapter is registered once it has been attached."""

    def _lora_offsets(self, spec: AdapterConfig, entries: Any, size: int, where: str) -> None:
        return None


class EncoderRegistry(AdapterRegistry):
    """Adapters that requests to an encoder may name."""

    def __init__(
        self,
        views: EncoderViews,
        try_to_load: Callable[[EncoderRecord], int],
        require_audit: bool = False,
        reserved_names: Collection[str] = (),
    ) -> None:
        """Store the rules of all adapters.

        Args:
            views: the encoder.
            try_to_load: returns an adapter's number of outputs; raises `AdapterError` where its
                tensors do not fit.
            require_audit: accept only adapters with an audit report that approves them.
            reserved_names: names that no adapter may have.
        """
        super().__init__(views.classifier, require_audit, reserved_names)
        self._encoder, self._try_to_load = views, try_to_load
        self._layouts_of = {id(v): EncoderLayouts(v) for v in (views.classifier, views.encoder)}

    def view_of(self, digest: str) -> Classifier:
        """Return the view of the encoder to which an adapter belongs; raises `AdapterError`."""
        record = self._contents.get(digest)
        if not isinstance(record, EncoderRecord):
            raise AdapterError("the adapter was removed", hint="load it again")
        return record.view

    def _layouts_for(self, opened: AdapterFolder) -> AdapterLayoutCache:
        config = opened.config(self._encoder.classifier.tokenizer)
        paths = (*config.target_modules, *config.modules_to_save)
        return self._layouts_of[id(self._encoder.of(paths))]

    def _read(self, folder: Any) -> EncoderRecord:
        found = super()._read(folder)
        base = self._encoder.of((*found.config.target_modules, *found.config.modules_to_save))
        opened = AdapterFolder.open(folder)
        if isinstance(base, Encoder):
            config = read_metadata(opened.path).get(EMBEDDING_KEY)
            if config is not None:
                where = str(opened.path / METADATA_FILE)
                base = self._encoder.embedding_as(EmbeddingConfig.from_record(config, where))
        else:
            self._check_classifies(opened, found.config)
        values = {one.name: getattr(found, one.name) for one in fields(found)}
        record = EncoderRecord(**values, view=base)
        return replace(record, num_outputs=self._try_to_load(record))

    def _check_classifies(self, opened: AdapterFolder, config: AdapterConfig) -> None:
        """Raise `AdapterError` where scores of a text would not be what was trained."""
        what, where = "this adapter is no classifier of texts", str(opened.path)
        objective = read_metadata(opened.path).get("objective")
        if objective == "tag" or opened.peft.task_type == "TOKEN_CLS":
            hint = "afina generate TEXT --adapter RUN tags texts"
            raise AdapterError(what, where=where, why="it gives each word a tag", hint=hint)
        trained = set(config.modules_to_save)
        if get_method(config.method).replaces_base:
            trained |= set(config.target_modules)
        inner = f"{self._encoder.classifier.model.base_model_prefix}."
        if not self._encoder.has_head and all(path.startswith(inner) for path in trained):
            why = "it has no classification head, and neither has the base"
            raise AdapterError(what, where=where, why=why)


@dataclass(frozen=True)
class AttachedAdapter:
    """An adapter in the layers, and the bytes that it takes."""

    adapter: Adapter
    view: Classifier
    bytes: int


class AttachedAdapters:
    """The adapters in an encoder's layers; beyond `max_bytes` the least recently used leave.

    Only the engine's thread calls.
    """

    def __init__(self, registry: EncoderRegistry, max_bytes: int) -> None:
        self.registry, self.max_bytes = registry, max_bytes
        self._attached: OrderedDict[str, AttachedAdapter] = OrderedDict()  # by hash
        self.loads = self.evictions = 0

    def __len__(self) -> int:
        return len(self._attached)

    def load(self, record: EncoderRecord, needed: Collection[str]) -> None:
        """Attach an adapter, unless it is; `needed` ones are not detached for it.

        Raises:
            AdapterError: its file has changed, or its tensors do not fit.
        """
        if record.hash in self._attached:
            return self._attached.move_to_end(record.hash)
        self._free_memory(record.bytes, needed)
        numbers = read_verified(record, self.registry.require_audit)
        tensors = record.layout.tensors(numbers)
        view = record.view
        with _own_heads(view, record.config, tensors):
            adapter = attach(view.model, view.forward_context, record.hash, record.config)
        try:
            load_state(adapter, tensors, record.file)
        except BaseException:
            detach(view.model, adapter)
            raise
        adapter.train(False)
        _serve_as_views(view, adapter)
        self._attached[record.hash] = AttachedAdapter(adapter, view, record.bytes)
        self.registry.locations[record.hash] = "device" if view.device.type != "cpu" else "host"
        self.loads += 1

    def forget(self, digest: str) -> None:
        """Detach an adapter, if it is attached."""
        found = self._attached.pop(digest, None)
        if found is not None:
            for wrapper in _wrappers(found.view, found.adapter):
                wrapper.serving_layers.pop(digest, None)
            detach(found.view.model, found.adapter)
            self.registry.locations.pop(digest, None)

    def _free_memory(self, size: int, needed: Collection[str]) -> None:
        free = self.max_bytes - size - sum(one.bytes for one in self._attached.values())
        for digest in [name for name in self._attached if name not in needed]:
            if free >= 0:
                return
            free += self._attached[digest].bytes
            self.forget(digest)
            self.evictions += 1


def _wrappers(view: Classifier, adapter: Adapter) -> Iterator[ModuleWithAdapters]:
    modules = (view.model.get_submodule(path) for path in adapter.layers)
    return (module for module in modules if isinstance(module, ModuleWithAdapters))


@torch.no_grad()
def _serve_as_views(view: Classifier, adapter: Adapter) -> None:
    """Let LoRA layers of linear modules be served by their packed weights.

    These do not change, and nothing looks for changes of their parameters in each batch.
    """
    for wrapper in _wrappers(view, adapter):
        layer: Any = wrapper.adapter_layer(adapter.name)
        if type(layer) is LoRA and isinstance(wrapper.base, nn.Linear) and layer.can_fuse:
            a, bt = layer.inference_weights(view.dtype)
            wrapper.serving_layers[adapter.name] = LoRAView(a, bt, layer.scale)


@contextmanager
def _own_heads(
    view: Classifier, config: AdapterConfig, tensors: dict[str, Tensor]
) -> Iterator[None]:
    """Give each linear module that an adapter replaces its number of outputs, within `with`."""
    changed: list[tuple[Any, nn.Module]] = []
    try:
        for path in config.modules_to_save:
            weight = tensors.get(f"{PREFIX}{path}.weight")
            wrapper: Any = get_or_insert_wrapper(view, path)
            module = wrapper.base
            if isinstance(module, nn.Linear) and weight is not None and weight.ndim == 2:
                head = nn.Linear(module.in_features, len(weight), module.bias is not None)
                changed.append((wrapper, module))
                wrapper.base = head.to(module.weight)
        yield
    finally:
        for wrapper, module in changed:
            wrapper.base = module
