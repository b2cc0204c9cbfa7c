"""A LoRA adapter as a GGUF file, which llama.cpp applies to the base's own GGUF.

blk.0.attn_q.weight.lora_a, .lora_b    (r, in), (out, r);   y = W x + (adapter.lora.alpha / r) B A x
"""

from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from afina.adapters.load_run import recorded_format
from afina.errors import AdapterError, MergeError, SettingsError
from afina.io.atomic import atomic_file
from afina.io.composition import expand_composition, parse_weighted_list, recorded_base
from afina.merging.chat_export import resolve_template
from afina.merging.gguf_architecture import gguf_architecture, library
from afina.merging.gguf_tokenizer import portable
from afina.merging.gguf_writing import write_gguf
from afina.merging.results import ExportResult
from afina.merging.sources import AdapterSource
from afina.models.loading import load_config, resolve_model_dir
from afina.settings import ExportSettings

MERGED = "--format gguf writes base and adapter as one model"


def export_adapter(settings: ExportSettings, file: Path) -> ExportResult:
    """Write a LoRA to `file`; return its alpha and the number of its modules.

    llama.cpp scales every module by alpha / r with one alpha. It gets that of the first module
    (alpha * sqrt(r) under rsLoRA); B of the others contains what they differ by.
    """
    gguf = library()
    source, config = _source(settings)
    form = gguf_architecture(
        config, recorded_base(source.part.folder).get("name") or str(settings.base)
    )
    first = source.config.target_modules[0]
    alpha = source.config.scale_of(first) * source.config.rank_of(first)
    tensors: list[tuple[str, Tensor, str]] = []
    for path in source.config.target_modules:
        there, low = form.name(f"{path}.weight"), source.low_rank_update(path)
        if low is None:
            raise _not_low(source)
        tied = ("output.weight",) if form.tied else ()
        if there in (None, "token_embd.weight", *tied):
            why = f"{path} is adapted, and llama.cpp supports no lora there on this base"
            raise AdapterError(
                "this adapter cannot be written as GGUF",
                where=str(source.part.folder),
                why=why,
                hint=MERGED,
            )
        b = (
            low.b * (low.rank / alpha) if alpha else low.b
        )  # llama.cpp does not scale by an alpha of 0
        order = form.order(f"{path}.weight", len(b))
        tensors.append((f"{there}.lora_a", low.a, "f32"))
        tensors.append((f"{there}.lora_b", b if order is None else b[order], "f32"))
    chat, template = recorded_format(source.part.folder), None
    if chat is not None:
        _, template = resolve_template(source.part.folder, chat, settings.base)
    with atomic_file(file) as new:
        writer = gguf.GGUFWriter(new, form.family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(source.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_string("afina.adapter", source.hash)
        if template is not None:
            writer.add_chat_template(portable(template))
        write_gguf(writer, tensors)
    return ExportResult(
        out=str(file),
        format="gguf-lora",
        adapter=source.hash,
        alpha=alpha,
        layers=len(tensors) // 2,
    )


def _source(settings: ExportSettings) -> tuple[AdapterSource, PretrainedConfig]:
    """Return the adapter and the configuration of its base.

    Raises:
        AdapterError: It is more than low-rank updates, or not active on all tokens.
    """
    if settings.adapter is None:
        raise SettingsError(
            "no adapter is given", where="adapter", hint="afina export RUN --format gguf-lora"
        )
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
    folder = parts[0].folder
    source = AdapterSource.open(parts[0])
    spec = source.config
    if spec.modules_to_save or spec.trainable_tokens:
        owned = next(iter(spec.modules_to_save or spec.trainable_tokens))
        raise AdapterError(
            f"this adapter contains {owned!r}",
            where=str(folder),
            why="a GGUF adapter has low-rank updates only",
            hint=MERGED,
        )
    if spec.invocation:
        why = "it is active after its invocation, and llama.cpp applies a lora to all tokens"
        raise AdapterError(
            "an activated adapter cannot be written as GGUF",
            where=str(folder),
            why=why,
            hint="afina generate",
        )
    if not source.is_low_rank:
        raise _not_low(source)
    base = recorded_base(folder)
    name = settings.base or base.get("name")
    if name is None:
        raise AdapterError(
            "this adapter does not record its base",
            where=str(folder),
            hint="--base PATH",
        )
    revision = settings.revision or (None if settings.base else base.get("revision"))
    return source, load_config(resolve_model_dir(name, revision), name, settings.trust_remote_code)


def _not_low(source: AdapterSource) -> MergeError:
    why = f"llama.cpp supports low-rank updates only, and this is a {source.config.method} adapter"
    extract = f"afina extract {source.part.folder} --max-rank 16 --output-dir LORA"
    hint = f"{extract}, then export LORA; or {MERGED}"
    return MergeError(
        "this adapter cannot be written as GGUF", where=str(source.part.folder), why=why, hint=hint
    )
