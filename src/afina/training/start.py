"""Beginning with an adapter: going on from one, and learning over one.

    --options '{start: runs/sft}'    its copy learns; it stays, frozen, as what came before
    --options '{over: runs/task}'    a new adapter learns while it acts beside, frozen: the outputs' parts are summed

What a copy is (method, rank, layers, invocation) is the adapter's. A setting that says otherwise is an error.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.config import TrainSettings
from afina.delta.attach import Adapter, attach, detach
from afina.delta.contract import Spec
from afina.delta.files import adapter_folder, fill, load_adapter, read_story, tensors_of
from afina.delta.presets import preset
from afina.errors import SettingsError
from afina.route.invocation import Route
from afina.training.prepared import OVER, START, Prepared, new_tokens

TOLD = ("rank", "alpha", "scaling", "dropout", "ranks")


def go_on_from(settings: TrainSettings, prepared: Prepared, asked: Spec, name: str) -> Adapter:
    """Attach the adapter that `settings` go on from twice: a frozen copy, told to `prepared`, and `name`, which learns.

    `asked` is the adapter that the other settings mean. Raises `SettingsError` where the two contradict each other, and
    `AdapterError` where there is no single adapter, or it is another base's.
    """
    told = settings.options[START]
    if not isinstance(told, str | Path) or not str(told):
        raise SettingsError(f"{START} cannot be {told!r}", where="options", hint=f"--options '{{{START}: RUN}}'")
    folder = adapter_folder(Path(told))
    base: Any = prepared.base
    frozen = load_adapter(folder, base, f"{name}-start")
    try:
        spec = _spec(settings, prepared, asked, frozen.spec, str(folder))
    except SettingsError:
        detach(base.model, frozen)
        raise
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter = attach(base.model, base.board, name, spec, settings.seed)
    fill(adapter, tensors_of(adapter) | tensors_of(frozen), str(folder))  # a new head keeps its own start
    prepared.before, prepared.start = frozen.route, read_story(folder).get("hash", "")
    return adapter


def learn_over(settings: TrainSettings, prepared: Prepared, adapter: Adapter, name: str) -> None:
    """Attach the adapter that `settings` learn over, frozen, and have it act wherever `adapter` does, and before.

    Raises `SettingsError` where one of the two cannot act beside another, and `AdapterError` where there is none, or it is
    another base's.
    """
    told = settings.options[OVER]
    if not isinstance(told, str | Path) or not str(told):
        raise SettingsError(f"{OVER} cannot be {told!r}", where="options", hint=f"--options '{{{OVER}: RUN}}'")
    folder, base = adapter_folder(Path(told)), prepared.base
    frozen = load_adapter(folder, base, f"{name}-over")
    for one, where in ((adapter, "method"), (frozen, str(folder))):
        if any(delta.replaces for path, delta in one.deltas.items() if path not in one.spec.modules):
            why = "a trained layer takes the base's place, and acts alone"
            raise SettingsError(f"{one.spec.method} does not act beside another", where=where, why=why, hint="--method lora")
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    adapter.beside = (frozen.route,)
    before = prepared.before
    prepared.before = frozen.route if before is None else Route.together([before, frozen.route])
    prepared.over = read_story(folder).get("hash", "")


def _spec(settings: TrainSettings, prepared: Prepared, asked: Spec, found: Spec, where: str) -> Spec:
    """The spec of the adapter to go on with; raises `SettingsError` where it is not what the settings ask for."""
    meant = preset(settings.method, 1)
    activated = bool(found.invocation)
    if meant.delta != found.method or meant.activated != activated:
        is_, q = f"{'a' if activated else ''}{found.method}", "q" if meant.storage == "nf4" else ""
        raise SettingsError(f"the adapter is {is_}, and not {settings.method}", where=where, hint=f"--method {q}{is_}")
    if found.invocation != prepared.invocation:
        hint = "--invocation as it was, and the same --template"
        raise SettingsError("the adapter has another invocation", where=where, hint=hint)
    if left := [module for module in found.modules if module not in prepared.modules]:
        why = f"it has a trained {left[0]}"
        raise SettingsError(f"this is no adapter to go on from by {prepared.objective}", where=where, why=why)
    fields = TrainSettings.model_fields
    changed = [n for n in TOLD if getattr(settings, n) != fields[n].get_default() and getattr(asked, n) != getattr(found, n)]
    if settings.targets is not None and asked.targets != found.targets:
        changed.append("targets")
    if new_tokens(settings) and dict(asked.tokens) != dict(found.tokens):
        changed.append("new_tokens")
    if changed:
        raise SettingsError(f"{changed[0]} is not the adapter's", where=where, why="what goes on stays what it is",
                            hint=f"leave {changed[0]} out")  # fmt: skip
    return replace(found, modules=prepared.modules)
