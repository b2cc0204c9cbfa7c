"""`afina export`: models and adapters for other programs, one writer for each format."""

import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afina.adapters.load_run import recorded_format
from afina.errors import SettingsError
from afina.io.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, AdapterFolder
from afina.io.adapter_metadata import METADATA_FILE
from afina.io.atomic import atomic_directory, require_new_directory
from afina.io.verified_copy import verified_copies
from afina.merging.chat_export import export_tokenizer
from afina.merging.foreign_adapter import peft_folder
from afina.merging.gguf import export_model
from afina.merging.gguf_adapter import export_adapter
from afina.merging.merge_into_base import merge
from afina.merging.mlx_adapter import export_mlx
from afina.merging.modelfile import MODELFILE, export_ollama
from afina.merging.onnx_model import export_onnx
from afina.merging.results import ExportResult
from afina.settings import ExportSettings, MergedModelSettings, MergeSettings, as_settings

Writer = Callable[[ExportSettings, Path], ExportResult]
OF_MODELS = ("dtype", "quantization", "max_kl", "allow_other_base", "outtype")


@dataclass(frozen=True)
class ExportFormat:
    """One value of --format.

    Attributes:
        write: Writes it, to a folder or file that is new.
        next_command: What uses it; `{out}`, `{base}` and `{name}` are filled in.
        file: Name of the one file in the folder; --output may name another that ends in .gguf.
        needs_adapter: Whether there is nothing to write without an adapter.
        unused: Settings without effect.
    """

    write: Writer
    next_command: str
    file: str = ""
    needs_adapter: bool = True
    unused: tuple[str, ...] = OF_MODELS


def export(run: str | Path | ExportSettings | None = None, **values: Any) -> ExportResult:
    """Write a merged model or the adapter alone for another program; see `FORMATS`."""
    settings = as_settings(ExportSettings, run, "adapter", values)
    form = FORMATS[settings.format]
    if settings.adapter is None and form.needs_adapter:
        hint = f"afina export RUN --format {settings.format}"
        raise SettingsError("no adapter is given", where="adapter", hint=hint)
    for name in form.unused:
        if getattr(settings, name) != ExportSettings.model_fields[name].default:
            what = f"{name} has no effect on --format {settings.format}"
            hint = f"leave --{name.replace('_', '-')} out"
            if name == "quantization" and "outtype" not in form.unused:
                hint += "; --outtype q4_0 has 4 bits"
            raise SettingsError(what, where=name, hint=hint)
    out = _destination(settings, form)
    if settings.adapter is None:
        result = form.write(settings, out)
    else:
        with (
            verified_copies(settings.require_audit, [settings.adapter]) as [copy],
            peft_folder(settings.model_copy(update={"adapter": Path(copy)})) as adapter,
        ):
            result = form.write(settings.model_copy(update={"adapter": adapter}), out)
    model = re.sub(r"[^a-z0-9._-]+", "-", settings.output.name.lower()) or "model"
    base = shlex.quote(str(result.base or settings.base))
    gaps = {"out": shlex.quote(result.out), "base": base, "name": model}
    gaps["onnx"] = str(settings.output / "model.onnx")
    gaps["modelfile"] = shlex.quote(str(settings.output / MODELFILE))
    return replace(result, format=settings.format, next_command=form.next_command.format(**gaps))


def _destination(settings: ExportSettings, form: ExportFormat) -> Path:
    """Return the file or folder to write; raise `SettingsError` where it exists."""
    if not (form.file and settings.output.suffix == ".gguf"):
        require_new_directory(settings.output)
        return settings.output / form.file if form.file else settings.output
    if settings.output.exists():
        what, hint = "this file exists already", "choose another --output"
        raise SettingsError(what, where=str(settings.output), hint=hint)
    return settings.output


def _hf(settings: ExportSettings, out: Path) -> ExportResult:
    fields = {name: getattr(settings, name) for name in MergedModelSettings.model_fields}
    # the copy is verified
    fields |= {"adapter": settings.adapter, "output_dir": out, "require_audit": False}
    return merge(MergeSettings(**fields))


def _peft(settings: ExportSettings, out: Path) -> ExportResult:
    assert settings.adapter is not None
    opened = AdapterFolder.open(settings.adapter)
    source, kind = opened.path, opened.peft.peft_type
    if not opened.peft.is_lora:
        raise SettingsError(
            f"PEFT has no adapters of type {kind}", where=str(source), hint="--format hf"
        )
    _check_recorded_hash(opened)
    with atomic_directory(out) as folder:
        for name in (CONFIG_FILE, WEIGHTS_FILE, METADATA_FILE, "README.md"):
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        chat_format = recorded_format(source)
        if chat_format is not None and not opened.config().trainable_tokens:
            export_tokenizer(source, chat_format, folder)
    return ExportResult(out=str(out))


def _check_recorded_hash(opened: AdapterFolder) -> None:
    """Raise `AdapterError` where a file was changed; adapters of PEFT record no hash."""
    if opened.metadata is not None:
        opened.verified_hash()


FORMATS = {
    "hf": ExportFormat(_hf, "afina generate PROMPT --base {out}", unused=("outtype",)),
    "peft": ExportFormat(_peft, "afina generate PROMPT --adapter {out}"),
    "gguf": ExportFormat(
        export_model, "llama-cli -m {out}", "model.gguf", False, unused=("quantization",)
    ),
    "gguf-lora": ExportFormat(
        export_adapter, "llama-cli -m BASE.gguf --lora {out}", "adapter.gguf"
    ),
    "ollama": ExportFormat(
        export_ollama,
        "ollama create {name} -f {modelfile}",
        needs_adapter=False,
        unused=("quantization",),
    ),
    "mlx": ExportFormat(
        export_mlx, "mlx_lm.generate --model {base} --adapter-path {out} --prompt PROMPT"
    ),
    "onnx": ExportFormat(
        export_onnx,
        "python -c 'import onnxruntime as o; print(o.InferenceSession(\"{onnx}\").get_inputs())'",
        unused=("dtype", "quantization", "outtype"),
    ),
}
