"""`afina export`: models and adapters for other programs, as Hugging Face or GGUF files."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from afina.adapters.load_run import recorded_format
from afina.errors import SettingsError
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder, adapter_folder
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.atomic import atomic_directory, require_new_directory
from afina.io.verified_copy import verified_copies
from afina.merging.chat_export import export_tokenizer
from afina.merging.gguf import export_model
from afina.merging.gguf_adapter import export_adapter
from afina.merging.merge_into_base import merge
from afina.merging.results import ExportResult
from afina.settings import ExportSettings, MergedModelSettings, MergeSettings, as_settings


def export(run: str | Path | ExportSettings | None = None, **values: Any) -> ExportResult:
    """Write the merged model ("hf", "gguf") or the adapter alone ("peft", "gguf-lora")."""
    settings = as_settings(ExportSettings, run, "adapter", values)
    if settings.format.startswith("gguf"):
        return _gguf(settings)
    if settings.adapter is None:
        raise SettingsError(
            "no adapter is given",
            where="adapter",
            hint=f"afina export RUN --format {settings.format}",
        )
    if settings.outtype != "auto":
        raise SettingsError("outtype applies to GGUF files only", where="outtype", hint="--dtype")
    if settings.format == "hf":
        fields = {name: getattr(settings, name) for name in MergedModelSettings.model_fields}
        fields |= {"adapter": settings.adapter, "output_dir": settings.output}
        return replace(merge(MergeSettings(**fields)), format="hf")
    return _peft(settings.adapter, settings)


def _gguf(settings: ExportSettings) -> ExportResult:
    """Write one file: `output` if it ends in .gguf, else a file in the folder `output`."""
    if settings.quantization != "none":
        hint = "leave --quantization out; --outtype q4_0 has 4 bits"
        raise SettingsError("nf4 is no number format of GGUF", where="quantization", hint=hint)
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
        require_new_directory(settings.output)
    if file.exists():
        raise SettingsError(
            "this file exists already", where=str(file), hint="choose another --output"
        )
    write = export_adapter if lora else export_model
    if settings.adapter is None:
        return write(settings, file)
    with verified_copies(settings.require_audit, [settings.adapter]) as [copy]:
        return write(settings.model_copy(update={"adapter": Path(copy)}), file)


def _peft(run: Path, settings: ExportSettings) -> ExportResult:
    require_new_directory(settings.output)
    with verified_copies(settings.require_audit, [run]) as [copy]:
        opened = AdapterFolder.open(Path(copy))
        source, kind = opened.path, opened.peft.peft_type
        if not opened.peft.is_lora:
            raise SettingsError(
                f"PEFT has no adapters of type {kind}", where=str(run), hint="--format hf"
            )
        _check_recorded_hash(opened)
        with atomic_directory(settings.output) as folder:
            for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, "README.md"):
                if (source / name).is_file():
                    shutil.copy2(source / name, folder / name)
            chat_format = recorded_format(source)
            if chat_format is not None and not opened.config().trainable_tokens:
                export_tokenizer(source, chat_format, folder)
    return ExportResult(out=str(settings.output), format="peft", adapter=str(adapter_folder(run)))


def _check_recorded_hash(opened: AdapterFolder) -> None:
    """Raise `AdapterError` where a file was changed; adapters of PEFT record no hash."""
    if opened.metadata is not None:
        opened.verified_hash()
