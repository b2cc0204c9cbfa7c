"""Runs that begin with an adapter: those that continue it, and those that train on top of it.

    --init-adapter runs/sft       a copy is trained; the original stays, frozen, as the reference
    --frozen-adapter runs/task    a new adapter is trained while this one is active, frozen; their
                                  updates are summed

Method, rank, layers and invocation of a continued adapter are its own. A setting that contradicts
them is an error.
"""

from dataclasses import replace
from typing import Any

from afina.adapters.active import ActiveAdapters
from afina.adapters.attach import Adapter, attach, detach
from afina.adapters.loading import load_adapter, load_state
from afina.adapters.presets import get_preset
from afina.adapters.saving import tensors_of
from afina.errors import SettingsError
from afina.io.adapter_config import AdapterConfig
from afina.io.adapter_folder import adapter_folder
from afina.io.adapter_metadata import read_metadata
from afina.objectives.prepared import PreparedData
from afina.settings import TrainSettings

INHERITED_SETTINGS = ("rank", "alpha", "scaling", "dropout", "rank_pattern")


def continue_adapter(
    settings: TrainSettings, prepared: PreparedData, wanted: AdapterConfig, name: str
) -> Adapter:
    """Attach the adapter `init_adapter` twice: frozen, as the baseline, and as `name`, trainable.

    Args:
        settings: The settings; `init_adapter` is set.
        prepared: Base and data; its `baseline` and `init_adapter` are set here.
        wanted: The adapter that the other settings describe.
        name: Name of the trainable copy.

    Raises:
        SettingsError: `wanted` contradicts the adapter.
        AdapterError: There is no single adapter, or it belongs to another base.
    """
    assert settings.init_adapter is not None
    folder = adapter_folder(settings.init_adapter)
    base: Any = prepared.base
    frozen = load_adapter(folder, base, f"{name}-start")
    try:
        config = _inherited(settings, prepared, wanted, frozen.config, str(folder))
    except SettingsError:
        detach(base.model, frozen)
        raise
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter = attach(base.model, base.forward_context, name, config, settings.seed)
    tensors = tensors_of(adapter) | tensors_of(frozen)  # a new head keeps its own initial values
    load_state(adapter, tensors, str(folder))
    prepared.baseline, prepared.init_adapter = frozen.active, read_metadata(folder).get("hash", "")
    return adapter


def stack_on_adapter(
    settings: TrainSettings, prepared: PreparedData, adapter: Adapter, name: str
) -> None:
    """Attach the adapter `frozen_adapter`, active wherever `adapter` is, and in the baseline.

    Raises:
        SettingsError: One of the two replaces the base's modules.
        AdapterError: There is no such adapter, or it belongs to another base.
    """
    assert settings.frozen_adapter is not None
    folder, base = adapter_folder(settings.frozen_adapter), prepared.base
    frozen = load_adapter(folder, base, f"{name}-over")
    for one, where in ((adapter, "method"), (frozen, str(folder))):
        own = one.layers.keys() - set(one.config.modules_to_save)
        if any(one.layers[path].replaces_base for path in own):
            raise SettingsError(
                f"{one.config.method} cannot be active together with another adapter",
                where=where,
                why="a trained layer replaces that of the base",
                hint="--method lora",
            )
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter.frozen_companions = (frozen.active,)
    prepared.baseline = ActiveAdapters.combine([prepared.baseline, frozen.active])
    prepared.frozen_adapter = read_metadata(folder).get("hash", "")


def _inherited(
    settings: TrainSettings,
    prepared: PreparedData,
    wanted: AdapterConfig,
    found: AdapterConfig,
    where: str,
) -> AdapterConfig:
    """Return the configuration of a continued adapter; raise where the settings contradict it."""
    preset = get_preset(settings.method, 1)
    is_activated = bool(found.invocation)
    if preset.method != found.method or preset.is_activated != is_activated:
        name = f"{'a' if is_activated else ''}{found.method}"
        quantized = "q" if preset.quantization == "nf4" else ""
        raise SettingsError(
            f"the adapter is {name}, and not {settings.method}",
            where=where,
            hint=f"--method {quantized}{name}",
        )
    if found.invocation != prepared.invocation:
        hint = "--invocation as it was, and the same --chat-template"
        raise SettingsError("the adapter has another invocation", where=where, hint=hint)
    other = [path for path in found.modules_to_save if path not in prepared.modules_to_save]
    if other:
        what = f"{prepared.objective} cannot continue this adapter"
        raise SettingsError(what, where=where, why=f"it has a trained {other[0]}")
    if changed := _contradictions(settings, wanted, found):
        raise SettingsError(
            f"{changed[0]} is not the adapter's",
            where=where,
            why="a continued adapter keeps its configuration",
            hint=f"leave {changed[0]} out",
        )
    return replace(found, modules_to_save=prepared.modules_to_save)


def _contradictions(
    settings: TrainSettings, wanted: AdapterConfig, found: AdapterConfig
) -> list[str]:
    """Return the settings that were given and are not those of the adapter."""
    fields = TrainSettings.model_fields
    changed = [
        name
        for name in INHERITED_SETTINGS
        if getattr(settings, name) != fields[name].get_default()
        and getattr(wanted, name) != getattr(found, name)
    ]
    if settings.target_modules is not None and wanted.target_modules != found.target_modules:
        changed.append("target_modules")
    if settings.new_tokens and dict(wanted.trainable_tokens) != dict(found.trainable_tokens):
        changed.append("new_tokens")
    return changed
