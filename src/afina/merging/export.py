"""`afina export`: what other tools read. A merged model or an adapter alone, in Hugging Face's files or in llama.cpp's."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.errors import SettingsError
from afina.io.adapter_folder import AdapterFolder, adapter_folder
from afina.io.atomic import atomic_directory
from afina.io.verified_copy import verified_copies
from afina.merging.gguf import export_adapter, export_model
from afina.merging.merge_into_base import check_out, merge
from afina.merging.results import ExportResult
from afina.settings import ExportSettings, MergedModelSettings, MergeSettings, make_settings


def export(run: str | Path | ExportSettings | None = None, **values: Any) -> ExportResult:
    """Write the merged model ("hf", "gguf") or the adapter alone ("peft", "gguf-lora")."""
    settings = (
        run
        if isinstance(run, ExportSettings)
        else make_settings(ExportSettings, {"adapter": run, **values})
    )
    if settings.format.startswith("gguf"):
        return _gguf(settings)
    if settings.adapter is None:
        raise SettingsError(
            "which adapter?", where="adapter", hint=f"afina export RUN --format {settings.format}"
        )
    if settings.outtype != "auto":
        raise SettingsError("only GGUF's weights are chosen here", where="outtype", hint="--dtype")
    if settings.format == "hf":
        fields = {name: getattr(settings, name) for name in MergedModelSettings.model_fields}
        fields |= {"adapter": settings.adapter, "output_dir": settings.output}
        return replace(merge(MergeSettings(**fields)), format="hf")
    return _peft(settings.adapter, settings)


def _gguf(settings: ExportSettings) -> ExportResult:
    """One file: `output` itself where it ends in .gguf, else within the folder `output`."""
    if settings.quantization != "none":
        hint = "leave --quantization out; llama-quantize makes 4 bits of a GGUF file"
        raise SettingsError("GGUF is written in 16 or 32 bits", where="quantization", hint=hint)
    lora = settings.format == "gguf-lora"
    if lora and settings.outtype != "auto":
        raise SettingsError(
            "an adapter's factors are always float32", where="outtype", hint="leave --outtype out"
        )
    file = (
        settings.output
        if settings.output.suffix == ".gguf"
        else settings.output / ("adapter.gguf" if lora else "model.gguf")
    )
    if file != settings.output:
        check_out(settings.output)
    if file.exists():
        raise SettingsError(
            "this file is there already", where=str(file), hint="choose another --output"
        )
    write = export_adapter if lora else export_model
    if settings.adapter is None:
        return write(settings, file)
    with verified_copies(settings.require_audit, [settings.adapter]) as [copy]:
        return write(settings.model_copy(update={"adapter": Path(copy)}), file)


def _peft(run: Path, settings: ExportSettings) -> ExportResult:
    check_out(settings.output)
    with verified_copies(settings.require_audit, [run]) as [copy]:
        opened = AdapterFolder.open(Path(copy))
        source, kind = opened.path, opened.peft.peft_type
        if not opened.peft.is_lora:
            raise SettingsError(
                f"PEFT does not know adapters of type {kind}", where=str(run), hint="--format hf"
            )
        _check_recorded_hash(opened)
        with atomic_directory(settings.output) as folder:
            for file in sorted(source.iterdir()):
                if file.name in (
                    "adapter_config.json",
                    "adapter_model.safetensors",
                    "afina.json",
                    "README.md",
                ):
                    shutil.copy2(file, folder / file.name)
    return ExportResult(
        out=str(settings.output), format="peft", adapter=str(adapter_folder(run))
    )


def _check_recorded_hash(opened: AdapterFolder) -> None:
    """Raise `AdapterError` where a file was changed; PEFT's adapters record no hash."""
    if opened.metadata is not None:
        opened.verified_hash()
