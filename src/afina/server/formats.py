"""The chat format of each served model: that of an adapter's training rows.

The server's settings apply to all of them: a chat template instead of the adapters' own, or
arguments of it. Whether control tokens in texts are read is a setting of the server alone.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from afina.adapters.load_run import recorded_format
from afina.data.renderer import Renderer
from afina.engine.adapter_registry import AdapterRegistry
from afina.io.chat_format import ChatFormat
from afina.models.causal_lm import CausalLM
from afina.models.classifier import Classifier
from afina.server.errors import APIError
from afina.server.prompts import ChatPrompts
from afina.settings import ServeSettings


class ServedFormats:
    """Prompts of the base and of adapters; for one thread at a time.

    Attributes:
        base: prompts of the base.
    """

    def __init__(
        self, model: CausalLM | Classifier, registry: AdapterRegistry, settings: ServeSettings
    ) -> None:
        self._model, self._registry, self._settings = model, registry, settings
        self._by_rendering: dict[str, ChatPrompts] = {}
        self._by_hash: dict[str, ChatPrompts] = {}
        self.base = self._prompts(ChatFormat.from_settings(settings))

    def of(self, names: Sequence[str]) -> ChatPrompts:
        """Return the prompts of a sum of adapters; of the base without names.

        Raises:
            APIError: 400 where the adapters were trained with different chat templates.
        """
        found = [self._of_adapter(name) for name in names] or [self.base]
        for name, prompts in zip(names, found, strict=False):
            if prompts is not found[0]:
                what = f"model: {names[0]} and {name} were trained with different chat templates"
                raise APIError(400, what, "model")
        return found[0]

    def _of_adapter(self, name: str) -> ChatPrompts:
        entry = self._registry.get(name)
        if entry is None:  # removed since the request named it: the engine answers
            return self.base
        if entry.hash not in self._by_hash:
            self._by_hash[entry.hash] = self._read(Path(entry.folder))
        return self._by_hash[entry.hash]

    def _read(self, folder: Path) -> ChatPrompts:
        recorded = recorded_format(folder)
        if recorded is None or self._settings.chat_template is not None:
            return self.base
        own = recorded.with_arguments(self._settings.template_kwargs)
        return self._prompts(replace(own, allow_control_tokens=self._settings.allow_control_tokens))

    def _prompts(self, chat_format: ChatFormat) -> ChatPrompts:
        assert self._model.tokenizer is not None
        renderer = Renderer(self._model.tokenizer, chat_format, self._model.max_positions)
        resolved = renderer.template
        key = json.dumps([resolved.jinja, renderer.uses_chat_template, dict(chat_format.kwargs)])
        return self._by_rendering.setdefault(key, ChatPrompts(renderer))
