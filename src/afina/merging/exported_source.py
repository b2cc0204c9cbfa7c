"""The one adapter that is written for a program with adapters of its own, and its base's shape."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from afina.errors import AdapterError, MergeError
from afina.io.composition import expand_composition, parse_weighted_list, recorded_base
from afina.merging.sources import AdapterSource
from afina.models.loading import load_config, resolve_model_dir
from afina.settings import ExportSettings


@dataclass(frozen=True)
class AdapterTarget:
    """A program that applies adapters.

    Attributes:
        program: Its name.
        kind: What its adapters are called.
        format: Value of --format.
        methods: Those that it computes; "lora" is any method with low-rank updates.
        merged: How it gets base and adapter as one model.
    """

    program: str
    kind: str
    format: str
    methods: tuple[str, ...]
    merged: str


@dataclass(frozen=True)
class ExportedSource:
    """An adapter, the configuration of its base and the base's name."""

    source: AdapterSource
    base_config: PretrainedConfig
    base: str


def open_exported(settings: ExportSettings, target: AdapterTarget) -> ExportedSource:
    """Return the adapter of the settings, for `target`.

    Raises:
        AdapterError: It is more than updates of modules, or not active on all tokens.
        MergeError: The program does not compute its method.
    """
    assert settings.adapter is not None
    parts = [
        part
        for folder, weight in parse_weighted_list(settings.adapter)
        for part in expand_composition(folder, weight)
    ]
    if len(parts) > 1 or parts[0].weight != 1.0:
        hint = "make one adapter of them: afina combine ... --merge-method svd"
        raise AdapterError(
            "this takes one adapter, and these are several, or weighted",
            where=str(settings.adapter),
            hint=hint,
        )
    folder, source = parts[0].folder, AdapterSource.open(parts[0])
    spec = source.config
    if spec.modules_to_save or spec.trainable_tokens:
        owned = next(iter(spec.modules_to_save or spec.trainable_tokens))
        raise AdapterError(
            f"this adapter contains {owned!r}",
            where=str(folder),
            why=f"{target.kind} has low-rank updates only",
            hint=target.merged,
        )
    if spec.invocation:
        why = f"it is active after its invocation, and {target.program} applies it to all tokens"
        raise AdapterError(
            f"an activated adapter cannot be {target.kind}",
            where=str(folder),
            why=why,
            hint=f"afina generate PROMPT --adapter {folder}",
        )
    if not source.is_low_rank and spec.method not in target.methods:
        raise not_low_rank(source, target)
    base = recorded_base(folder)
    name = settings.base or base.get("name")
    if name is None:
        what = "this adapter does not record its base"
        raise AdapterError(what, where=str(folder), hint="--base PATH")
    revision = settings.revision or (None if settings.base else base.get("revision"))
    config = load_config(resolve_model_dir(name, revision), name, settings.trust_remote_code)
    return ExportedSource(source, config, str(name))


def cannot_write(source: AdapterSource, target: AdapterTarget, why: str) -> AdapterError:
    """Return the error of an adapter that the program would apply otherwise."""
    return AdapterError(
        f"this adapter cannot be {target.kind}",
        where=str(source.part.folder),
        why=why,
        hint=target.merged,
    )


def not_low_rank(source: AdapterSource, target: AdapterTarget) -> MergeError:
    """Return the error of an adapter whose method the program does not compute."""
    known = "low-rank updates" if target.methods == ("lora",) else " and ".join(target.methods)
    why = f"{target.program} supports {known} only, and this is a {source.config.method} adapter"
    extract = f"afina extract {source.part.folder} --max-rank 16 --output-dir LORA"
    return MergeError(
        f"this adapter cannot be {target.kind}",
        where=str(source.part.folder),
        why=why,
        hint=f"{extract}, then export LORA; or {target.merged}",
    )
