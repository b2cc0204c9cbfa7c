"""`afina export`: what other tools read. A merged model or an adapter alone, in Hugging Face's files or in llama.cpp's."""

import shutil
from pathlib import Path
from typing import Any

from afina.combining.gguf import export_adapter, export_model
from afina.combining.merge import check_out, merge
from afina.config import ExportSettings, MergeSettings, make_settings
from afina.delta.files import adapter_folder, read_json
from afina.delta.sealed import sealed
from afina.disk import new_folder
from afina.errors import SettingsError


def export(run: str | Path | ExportSettings | None = None, **values: Any) -> dict[str, Any]:
    """Write the merged model ("hf", "gguf") or the adapter alone ("peft", "gguf-lora") to `out`; returns what was written."""
    settings = run if isinstance(run, ExportSettings) else make_settings(ExportSettings, {"run": run, **values})
    if settings.format.startswith("gguf"):
        return _gguf(settings)
    if settings.run is None:
        raise SettingsError("which adapter?", where="run", hint=f"afina export RUN --format {settings.format}")
    if settings.weights != "auto":
        raise SettingsError("only GGUF's weights are chosen here", where="weights", hint="--dtype")
    if settings.format == "hf":
        fields = {name: getattr(settings, name) for name in MergeSettings.model_fields}
        return {"format": "hf"} | merge(MergeSettings(**fields))
    return _peft(settings.run, settings)


def _gguf(settings: ExportSettings) -> dict[str, Any]:
    """One file: `out` itself where it ends in .gguf, else within the folder `out`."""
    if settings.storage != "plain":
        hint = "leave --storage out; llama-quantize makes 4 bits of a GGUF file"
        raise SettingsError("GGUF is written in 16 or 32 bits", where="storage", hint=hint)
    lora = settings.format == "gguf-lora"
    if lora and settings.weights != "auto":
        raise SettingsError("an adapter's factors are always float32", where="weights", hint="leave --weights out")
    file = settings.out if settings.out.suffix == ".gguf" else settings.out / ("adapter.gguf" if lora else "model.gguf")
    if file != settings.out:
        check_out(settings.out)
    if file.exists():
        raise SettingsError("this file is there already", where=str(file), hint="choose another --out")
    write = export_adapter if lora else export_model
    if settings.run is None:
        return write(settings, file)
    with sealed(settings.admit, [settings.run]) as [copy]:
        return write(settings.model_copy(update={"run": Path(copy)}), file)


def _peft(run: Path, settings: ExportSettings) -> dict[str, Any]:
    check_out(settings.out)
    with sealed(settings.admit, [run]) as [copy]:
        source = adapter_folder(Path(copy))
        kind = read_json(source / "adapter_config.json").get("peft_type")
        if kind != "LORA":
            raise SettingsError(f"PEFT does not know adapters of type {kind}", where=str(run), hint="--format hf")
        with new_folder(settings.out) as folder:
            for file in sorted(source.iterdir()):
                if file.name in ("adapter_config.json", "adapter_model.safetensors", "afina.json", "README.md"):
                    shutil.copy2(file, folder / file.name)
    return {"format": "peft", "out": str(settings.out), "adapter": str(adapter_folder(run))}
