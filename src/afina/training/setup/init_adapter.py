"""Beginning with an adapter: going on from one, and learning over one.

    --init-adapter runs/sft    its copy learns; it stays, frozen, as what came before
    --frozen-adapter runs/task    a new adapter learns while it acts beside, frozen: the outputs' parts are summed

What a copy is (method, rank, layers, invocation) is the adapter's. A setting that says otherwise is an error.
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
    settings: TrainSettings, prepared: PreparedData, asked: AdapterConfig, name: str
) -> Adapter:
    """Attach the adapter that `settings` go on from twice: a frozen copy, told to `prepared`, and `name`, which learns.

    `asked` is the adapter that the other settings mean. Raises `SettingsError` where the two contradict each other, and
    `AdapterError` where there is no single adapter, or it is another base's.
    """
    told = settings.init_adapter
    assert told is not None
    folder = adapter_folder(told)
    base: Any = prepared.base
    frozen = load_adapter(folder, base, f"{name}-start")
    try:
        spec = _spec(settings, prepared, asked, frozen.config, str(folder))
    except SettingsError:
        detach(base.model, frozen)
        raise
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter = attach(base.model, base.forward_context, name, spec, settings.seed)
    load_state(
        adapter, tensors_of(adapter) | tensors_of(frozen), str(folder)
    )  # a new head keeps its own start
    prepared.baseline, prepared.init_adapter = frozen.active, read_metadata(folder).get("hash", "")
    return adapter


def stack_on_adapter(
    settings: TrainSettings, prepared: PreparedData, adapter: Adapter, name: str
) -> None:
    """Attach the adapter that `settings` learn over, frozen, and have it act wherever `adapter` does, and before.

    Raises `SettingsError` where one of the two cannot act beside another, and `AdapterError` where there is none, or it is
    another base's.
    """
    told = settings.frozen_adapter
    assert told is not None
    folder, base = adapter_folder(told), prepared.base
    frozen = load_adapter(folder, base, f"{name}-over")
    for one, where in ((adapter, "method"), (frozen, str(folder))):
        if any(
            delta.replaces_base
            for path, delta in one.layers.items()
            if path not in one.config.modules_to_save
        ):
            why = "a trained layer takes the base's place, and acts alone"
            raise SettingsError(
                f"{one.config.method} does not act beside another",
                where=where,
                why=why,
                hint="--method lora",
            )
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter.frozen_companions = (frozen.active,)
    before = prepared.baseline
    prepared.baseline = (
        frozen.active if before is None else ActiveAdapters.combine([before, frozen.active])
    )
    prepared.frozen_adapter = read_metadata(folder).get("hash", "")


def _spec(
    settings: TrainSettings,
    prepared: PreparedData,
    asked: AdapterConfig,
    found: AdapterConfig,
    where: str,
) -> AdapterConfig:
    """The spec of the adapter to go on with; raises `SettingsError` where it is not what the settings ask for."""
    meant = get_preset(settings.method, 1)
    activated = bool(found.invocation)
    if meant.method != found.method or meant.is_activated != activated:
        is_, q = (
            f"{'a' if activated else ''}{found.method}",
            "q" if meant.quantization == "nf4" else "",
        )
        raise SettingsError(
            f"the adapter is {is_}, and not {settings.method}",
            where=where,
            hint=f"--method {q}{is_}",
        )
    if found.invocation != prepared.invocation:
        hint = "--invocation as it was, and the same --chat-template"
        raise SettingsError("the adapter has another invocation", where=where, hint=hint)
    if left := [
        module for module in found.modules_to_save if module not in prepared.modules_to_save
    ]:
        why = f"it has a trained {left[0]}"
        raise SettingsError(
            f"this is no adapter to go on from by {prepared.objective}", where=where, why=why
        )
    fields = TrainSettings.model_fields
    changed = [
        n
        for n in INHERITED_SETTINGS
        if getattr(settings, n) != fields[n].get_default()
        and getattr(asked, n) != getattr(found, n)
    ]
    if settings.target_modules is not None and asked.target_modules != found.target_modules:
        changed.append("target_modules")
    if settings.new_tokens and dict(asked.trainable_tokens) != dict(found.trainable_tokens):
        changed.append("new_tokens")
    if changed:
        raise SettingsError(
            f"{changed[0]} is not the adapter's",
            where=where,
            why="what goes on stays what it is",
            hint=f"leave {changed[0]} out",
        )
    return replace(found, modules_to_save=prepared.modules_to_save)
